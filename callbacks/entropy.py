"""EntropyMonitor: the entropy of the next-token distribution while training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rl import adapters, ranks
from lit_rl.checks import ConfigurationError
from lit_rl.experience import Experience, Terms
from lit_rl.hooks import RLCallback
from lit_rl.policy import Policy

CHUNK = 2**22
"""Logits taken to float32 at once, in elements."""


class EntropyMonitor(RLCallback):
    """Logs "entropy", in nats: the mean over the response tokens of each optimizer step, on all ranks.

    On any LightningModule that holds a Hugging Face causal language model it reads the logits of the training forward
    (no forward of its own). Tokens whose label is -100 are left out; without labels, those that a 2-D attention_mask
    leaves out. A lit-rl policy, or a module that calls the hook `on_loss`, hands over its entropies instead: those of
    the tokens that count in the loss, rows without signal not among them.
    """

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0
        self._step = 0
        self._handles: list[Any] = []
        self._warned = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Here and not in `setup`, since a module's `configure_model` may make the model."""
        from transformers import PreTrainedModel

        self._remove()
        self._sum, self._tokens, self._step = 0.0, 0, trainer.global_step

        def is_language_model(module: Any) -> bool:
            inner = adapters.inner(module)  # a PeftModel may call it without its hooks
            return isinstance(inner, PreTrainedModel) and inner.get_output_embeddings() is not None

        found = [m for m in pl_module.modules() if is_language_model(m)]
        if not found:
            raise ConfigurationError(
                f"EntropyMonitor found no Hugging Face causal language model in {type(pl_module).__name__}"
            )
        inner = {part for model in found for part in model.modules() if part is not model}
        self._handles = [
            model.register_forward_hook(self._on_forward, with_kwargs=True) for model in found if model not in inner
        ]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def _on_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not _carries_gradient(output):
            return  # generation, a reference model, validation
        logits = getattr(output, "logits", None)
        if logits is None:
            raise ConfigurationError(
                "EntropyMonitor needs logits, and this model's fused loss returns none: turn the fused loss off"
            )
        labels = kwargs.get("labels")
        if labels is not None:
            logits = logits[:, :-1][labels[:, 1:] != -100]
        elif (mask := kwargs.get("attention_mask")) is not None and mask.dim() == 2:
            logits = logits[mask.bool()]
        logits = logits.reshape(-1, logits.shape[-1])
        for part in logits.split(max(1, CHUNK // logits.shape[-1])):
            logps = part.float().log_softmax(-1)
            self._sum -= float((logps.exp() * logps).sum())
        self._tokens += len(logits)

    def on_loss(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience, terms: Terms) -> None:
        if self._handles:  # the terms are better: only response tokens, and what the policy is trained at
            self._remove()
            self._sum, self._tokens = 0.0, 0
        counted = terms.weights != 0
        self._sum += float(terms.entropy.detach()[counted].sum())
        self._tokens += int(counted.sum())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still being accumulated
        self._step = trainer.global_step
        if not self._tokens and self._handles and not self._warned and not isinstance(pl_module, Policy):
            self._warned = True
            rank_zero_warn(
                "EntropyMonitor saw no training forward in a step: call the language model itself with gradient, not parts"
                ' of it, or call lit_rl.hooks.call(self.trainer, "on_loss", experience, terms)'
            )
        entropy, tokens = ranks.total(self._sum, self._tokens)
        if tokens:
            pl_module.log("entropy", entropy / tokens, batch_size=int(tokens), rank_zero_only=False)
        self._sum, self._tokens = 0.0, 0


def _carries_gradient(output: Any) -> bool:
    logits = getattr(output, "logits", None)
    loss = getattr(output, "loss", None)
    return any(isinstance(t, Tensor) and t.requires_grad for t in (logits, loss))
