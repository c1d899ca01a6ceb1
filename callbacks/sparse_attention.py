"""SparseAttention: a model that was trained with dense attention goes on with InfLLM-v2's blocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lit_rl import adapters, ops, ranks, sparse_attention
from lit_rl.checks import ConfigurationError, require
from lit_rl.hooks import RLCallback
from lit_rl.kernels.infllm import Sequences, Settings

QUERIES = 64
"""Of a layer, whose recall is measured."""


class SparseAttention(RLCallback):
    """Switches the attention of every language model in a module, a reference model too, to InfLLM-v2 (arXiv 2506.07900,
    2509.24663): for sequences of at least `dense_len` tokens, and from training step `start_step` on. Generation and
    evaluation follow. There is nothing to convert: weights stay as they are, and a model that is exported carries the settings
    in its config.

    Logs, every `every_n_steps` steps in which the training forward was sparse: sparse_attention/recall, the share of dense
    attention's mass that is on the chosen blocks, over queries that do not see everything; sparse_attention/visible, tokens
    that a query sees; and for one layer, and the longest sequence of its batch, seconds/sparse_attention and
    seconds/dense_attention, of the forward with and without the choice of blocks.

    Works on any LightningModule that holds a Hugging Face model. A group's prompt is computed once for each of its rows where
    they are longer than what is seen whole, and the native generator keeps each row's keys and values apart. Engines outside
    this process, such as vLLM, go on sampling densely: correct for it with `tis_cap`.

    Args:
        settings: Sizes; None is what the model's config has (`sparse_config`), or MiniCPM4's defaults.
        start_step: Training steps before it are dense.
        every_n_steps: How often recall and speed are measured; 0 is never.
    """

    def __init__(self, settings: Settings | None = None, start_step: int = 0, every_n_steps: int = 50) -> None:
        require(start_step >= 0, "start_step", start_step, "at least 0")
        require(every_n_steps >= 0, "every_n_steps", every_n_steps, "at least 0")
        self.settings = Settings(**settings) if isinstance(settings, dict) else settings
        self.start_step, self.every_n_steps = start_step, every_n_steps
        self._before: dict[Any, str] = {}
        self._numbers: dict[str, list[float]] = {}
        self._layers: set[Any] = set()
        self._seen: set[Any] = set()
        self._ever = self._measuring = False

    def _switch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the models of the module the attention of this step. They may be made as late as in `configure_model`."""
        from transformers import PreTrainedModel

        sparse_attention.register()
        found = [adapters.inner(m) for m in pl_module.modules()]
        models = {m for m in found if isinstance(m, PreTrainedModel) and m.get_output_embeddings() is not None}
        if not models:
            raise ConfigurationError(
                f"SparseAttention found no Hugging Face causal language model in {type(pl_module).__name__}"
            )
        fitting = trainer.state.fn == "fit"
        for model in models:
            config = model.config.get_text_config()
            if self.settings is not None:
                config.sparse_config = asdict(self.settings)
            sparse_attention.check(model)
            name = self._before.setdefault(model, config._attn_implementation)
            if not fitting or trainer.global_step >= self.start_step:
                name = sparse_attention.NAME
            elif config._attn_implementation != sparse_attention.NAME:
                continue  # as somebody else has set it
            if name != config._attn_implementation:
                model.set_attn_implementation(name)
        self._layers = {m for model in models for m in model.modules()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()
        self._switch(trainer, pl_module)
        sparse_attention.watchers.append(self._watch)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._switch(trainer, pl_module)

    on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._switch(trainer, pl_module)
        self._numbers, self._seen = {}, set()
        self._measuring = self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._measuring:
            return
        self._measuring = False
        everyone = ranks.gather(self._numbers) if trainer.world_size > 1 else [self._numbers]
        for name in sorted({name for numbers in everyone for name in numbers}):
            values = [value for numbers in everyone for value in numbers.get(name, [])]
            pl_module.log(name, fmean(values), rank_zero_only=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._ever and trainer.global_step > self.start_step:
            reach = min(sparse_attention.covered(model) for model in self._before)
            rank_zero_warn(
                f"SparseAttention changed nothing: no training sequence had more than {reach} tokens, and up to there all are"
                " seen. For shorter sequences lower dense_len, topk and window_size"
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._forget()  # there is no teardown then

    def _forget(self) -> None:
        if self._watch in sparse_attention.watchers:
            sparse_attention.watchers.remove(self._watch)
        self._before, self._layers, self._ever, self._measuring = {}, set(), False, False

    @torch.no_grad()
    def _watch(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, seqs: Sequences, settings: Settings,
        scale: float,
    ) -> None:  # fmt: skip
        if module not in self._layers or not q.requires_grad:
            return  # another module's; generation, a reference model, validation
        self._ever = True
        if not self._measuring or module in self._seen:
            return
        if not self._seen:
            self._time(q, k, v, seqs, settings, scale)
        self._seen.add(module)
        of, column, position = seqs.queries()
        counts = (blocks >= 0).sum(-1)  # (M, K)
        unseen = settings.block_size - 1 - position % settings.block_size  # the rest of a query's own block
        self._add("sparse_attention/visible", float((counts * settings.block_size - unseen[:, None]).float().mean()))
        partial = (counts.amin(-1) <= position // settings.block_size).nonzero().flatten()
        for m in partial[:: max(1, len(partial) // QUERIES)].tolist():
            row, start, t = int(seqs.row[of[m]]), int(seqs.k_start[of[m]]), int(position[m])
            query = q[row, :, column[m]].float().unflatten(0, (k.shape[1], -1))  # (K, G, D)
            weights = (query @ k[row, :, start : start + t + 1].float().mT * scale).softmax(-1)  # (K, G, t + 1)
            at = torch.arange(t + 1, device=q.device) // settings.block_size
            chosen = (at[:, None] == blocks[m, :, None]).any(-1)  # (K, t + 1)
            self._add("sparse_attention/recall", float((weights * chosen[:, None]).sum(-1).mean()))

    def _time(self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, settings: Settings, scale: float) -> None:
        n = int(seqs.k_length.argmax())
        row, q_start, q_length, k_start, k_length = (int(x[n]) for x in seqs)
        q = q[row : row + 1, :, q_start : q_start + q_length]
        k, v = (x[row : row + 1, :, k_start : k_start + k_length] for x in (k, v))
        whole, group = Sequences.whole(q, k), q.shape[1] // k.shape[1]
        k_, v_ = (x.repeat_interleave(group, 1) for x in (k, v))

        def sparse() -> None:
            chosen = ops.select_blocks(q, k, whole, settings, scale)
            ops.block_attention(q, k, v, chosen, whole, settings, scale)

        self._add("seconds/sparse_attention", _seconds(sparse, q))
        dense = lambda: F.scaled_dot_product_attention(q, k_, v_, is_causal=True, scale=scale)  # noqa: E731
        self._add("seconds/dense_attention", _seconds(dense, q))

    def _add(self, name: str, value: float) -> None:
        self._numbers.setdefault(name, []).append(value)


def _seconds(work: Callable[[], Any], like: Tensor) -> float:
    def now() -> float:
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
        return time.perf_counter()

    start = now()
    work()
    return now() - start
