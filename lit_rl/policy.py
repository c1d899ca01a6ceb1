"""Policy: a LightningModule that turns tasks into experience and experience into a loss, and takes the inner steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_rl import models, run
from lit_rl.experience import Experience, build
from lit_rl.forward import Forward
from lit_rl.generation.base import Completion, Generator, Sampling
from lit_rl.metrics import Evaluation, Table
from lit_rl.objectives import token_weights
from lit_rl.scoring import Scorer
from lit_rl.task import Task, Verdict

Aggregate = Literal["token", "sequence", "constant"]


class Policy(L.LightningModule):
    """A causal language model that learns. A method defines `collect(tasks) -> Experience` and `loss(slice) -> Tensor`.

    One Trainer batch is a list of tasks and becomes one experience (`on_train_batch_start`). The experience is cut into
    `minibatches`, each into slices that fit `microbatch_tokens`. `optimizer_step` takes `epochs * minibatches` steps;
    each is a full cycle of Lightning's precision plugin, whose closure (training_step and backward) runs once a slice.
    So clipping, schedulers, checkpoints, loggers and every other Trainer flag mean what they always mean, but
    `accumulate_grad_batches`, which is refused.

    Args:
        model: "tiny" (about a million parameters, offline), "smollm2-135m", a hub id, a folder, a GGUF file, or a module.
        tokenizer: A hub id or folder, when it is not the model's own; or a tokenizer, when `model` is a module.
        dtype: Of the weights; "auto" is as stored. On a GPU, keep float32 here and set the Trainer's precision.
        attn_implementation: As in transformers; None is its own choice.
        chat: Whether prompts go through the tokenizer's chat template; "auto": when it has one.
        sampling: How responses are drawn, in training and (but for `eval_temperature`) in evaluation.
        generator: The engine that samples; None is the native one.
        scoring: Where and within what limits responses are scored.
        lr: Learning rate of AdamW; LightningCLI's `--optimizer` and `--lr_scheduler` replace both.
        weight_decay: Of AdamW.
        schedule: Of the learning rate, over the Trainer's steps.
        warmup_steps: Trainer steps in which the learning rate rises from zero.
        epochs: Passes over each experience.
        minibatches: Optimizer steps a pass; a group is never divided between two.
        microbatch_tokens: Tokens in one forward and backward: lower it when memory runs out, the gradient stays the same.
        gradient_checkpointing: Trades time for memory.
        eval_samples: Responses a task in validate and test; pass@k and maj@k want several.
        eval_temperature: Sampling temperature in evaluation; None is that of training.
        seed: Of all sampling; None is the one of `seed_everything`, or 0.
    """

    splits_groups: bool = True
    """Whether rows of a group may be in different slices (not different minibatches) when memory demands it."""
    aggregate: Aggregate = "token"

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        tokenizer: str | Any | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        attn_implementation: str | None = None,
        chat: Literal["auto", "always", "never"] = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008  (a default the command line can show; never changed in place)
        generator: Generator | None = None,
        scoring: Scorer = Scorer(),  # noqa: B008
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_steps: int = 0,
        epochs: int = 1,
        minibatches: int = 1,
        microbatch_tokens: int = 16384,
        gradient_checkpointing: bool = False,
        eval_samples: int = 1,
        eval_temperature: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("epochs", epochs),
            ("minibatches", minibatches),
            ("microbatch_tokens", microbatch_tokens),
            ("eval_samples", eval_samples),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        self.save_hyperparameters(ignore=[] if isinstance(model, str) else ["model", "tokenizer"])
        self.hparams.update(
            {k: asdict(v) for k, v in self.hparams.items() if is_dataclass(v) and not isinstance(v, type)}
        )
        self.sampling = sampling if isinstance(sampling, Sampling) else Sampling(**sampling)
        self.scorer = scoring if isinstance(scoring, Scorer) else Scorer(**scoring)
        self.lr, self.weight_decay, self.schedule, self.warmup_steps = lr, weight_decay, schedule, warmup_steps
        self.epochs, self.minibatches, self.microbatch_tokens = epochs, minibatches, microbatch_tokens
        self.eval_samples, self.eval_temperature, self.chat, self.seed = eval_samples, eval_temperature, chat, seed
        if isinstance(model, str):
            model, tokenizer = models.load(model, tokenizer, dtype, attn_implementation)
        self.model: Any = model.train()
        self.tokenizer: Any = tokenizer
        models.disable_dropout(self.model)  # on-policy, the ratio must be one
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.eos = models.prepare_tokenizer(
            self.tokenizer, getattr(self.model, "generation_config", None) or self.model.config
        )
        self.token_terms = Forward(self.model)
        if generator is None:
            from lit_rl.generation.native import NativeGenerator

            generator = NativeGenerator(self.eos, self.tokenizer.pad_token_id or 0, self.decode)
        self.generator: Generator = generator
        self.evaluation = Evaluation()
        self.table = Table([])
        """Of the latest evaluation."""
        self.counts: dict[str, float] = {}
        """Events of one experience, such as prompts that are too long; logged once a step."""
        self.seconds: dict[str, float] = {}
        """Spent on this experience, by activity."""
        self.sampled_tokens = 0
        self._plan: list[list[Experience]] = []
        self._slice: Experience | None = None

    # ---------------------------------------------------------------- what a method defines

    def collect(self, tasks: list[Task]) -> Experience:
        """The experience of one batch of tasks, with advantages (if the method has any) but without weights."""
        raise NotImplementedError

    def loss(self, x: Experience) -> Tensor:
        """The loss of one slice: a sum over its tokens, already weighted. Slices of a minibatch add up."""
        raise NotImplementedError

    # ---------------------------------------------------------------- text and tokens

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def encode(self, tasks: list[Task], room: int) -> tuple[list[Task], list[list[int]]]:
        """The tasks whose prompts leave `room` tokens of the model's context, and those prompts. The rest is counted."""
        limit = models.context_length(self.model) - room
        prompts = [models.encode_prompt(self.tokenizer, task.prompt, self.chat) for task in tasks]
        fit = [i for i, prompt in enumerate(prompts) if 0 < len(prompt) <= limit]
        if len(fit) < len(tasks):
            self.count("skipped/prompt_too_long", len(tasks) - len(fit))
            longest = max(map(len, prompts))
            rank_zero_warn(
                f"left out {len(tasks) - len(fit)} of {len(tasks)} prompts: the longest has {longest} tokens, and the model's"
                f" context of {limit + room} leaves {limit} beside {room} for the response. Lower the tasks' level or"
                " sampling.max_new_tokens. Counted as skipped/prompt_too_long; this message comes once."
            )
        return [tasks[i] for i in fit], [prompts[i] for i in fit]

    @property
    def seed_value(self) -> int:
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    def seeds(self, tasks: list[Task], samples: int, purpose: str) -> list[list[int]]:
        """A seed a response, from (seed, step, prompt, sample) alone; equal prompts of a batch are told apart by order."""
        step = self.trainer.global_step if purpose == "train" and self._trainer is not None else 0
        seen: dict[str, int] = {}
        result = []
        for task in tasks:
            copy = seen[task.key()] = seen.get(task.key(), -1) + 1
            keys = (f"{self.seed_value}\0{purpose}\0{step}\0{task.key()}\0{copy}\0{i}" for i in range(samples))
            result.append([int.from_bytes(blake2b(k.encode(), digest_size=8).digest(), "big") >> 1 for k in keys])
        return result

    def respond(
        self, tasks: list[Task], samples: int, purpose: str = "predict", sampling: Sampling | None = None
    ) -> tuple[list[Task], list[list[int]], list[list[Completion]]]:
        """Samples responses. Returns the tasks whose prompts fit, their prompts' tokens and `samples` completions each."""
        sampling = sampling or self.sampling
        tasks, prompts = self.encode(tasks, sampling.max_new_tokens)
        with self.clock("generate"), self.precision():
            self.generator.sync(self.model)
            completions = self.generator.generate(prompts, self.seeds(tasks, samples, purpose), sampling)
        self.sampled_tokens += sum(len(c.tokens) for group in completions for c in group)
        return tasks, prompts, completions

    def score(self, tasks: list[Task], completions: list[list[Completion]]) -> list[list[Verdict]]:
        """A verdict a completion; a task without a scorer is an error."""
        for task in tasks:
            if task.score is None:
                raise ValueError(f"the task {task.key()[:80]!r} has no `score`: only SFT can use it")
        items = [
            (task.score, c.text) for task, group in zip(tasks, completions, strict=True) for c in group if task.score
        ]
        with self.clock("score"):
            flat = iter(self.scorer(items))
        verdicts = [[next(flat) for _ in group] for group in completions]
        if failed := [v for group in verdicts for v in group if not v.valid]:
            self.count("skipped/verifier_failed", len(failed))
            rank_zero_warn(
                f"{len(failed)} responses could not be scored and count nowhere; the first: {failed[0].reason}"
            )
        return verdicts

    def count(self, name: str, value: float = 1.0) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + value

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    def precision(self) -> AbstractContextManager[Any]:
        """The Trainer's forward context (autocast), for passes outside training_step."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def demonstrations(self, tasks: list[Task]) -> Experience:
        """The tasks' known responses as rows; those that do not fit the model's context are left out and counted."""
        tasks, prompts = self.encode(tasks, 1)
        limit = models.context_length(self.model)
        rows = []
        for g, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            for i, text in enumerate(task.responses):
                response = models.encode_response(self.tokenizer, text, self.eos)
                if response and len(prompt) + len(response) <= limit:
                    rows.append((prompt, response, g, task.rewards[i] if task.rewards else 1.0, text))
                else:
                    self.count("skipped/response_too_long")
        x = build(
            [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], tasks, self.tokenizer.pad_token_id or 0
        )
        x.rewards, x.texts = torch.tensor([r[3] for r in rows]), [r[4] for r in rows]
        return x

    # ---------------------------------------------------------------- the inner loop

    def on_fit_start(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: a policy accumulates by itself. Leave it"
                " at 1; set the DataModule's batch_size for larger batches, model.microbatch_tokens for less memory."
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # tasks are text

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if not isinstance(batch, list) or not all(isinstance(task, Task) for task in batch):
            raise TypeError(
                f"a policy trains on lists of lit_rl.Task, not on {type(batch).__name__}: give the loader collate_fn=list"
            )
        self.counts, self.seconds, self.sampled_tokens = {}, {}, 0
        self._plan = self.plan(self.collect(batch))
        self._loss = 0.0

    def plan(self, x: Experience) -> list[list[Experience]]:
        """Minibatches of slices. Fills `x.weights`, so that over all ranks they add up to one in each minibatch (or to less:
        rows that cannot give a gradient are then left out)."""
        if len(x):
            x.weights = torch.zeros_like(x.mask, dtype=torch.float32)
        minibatches = []
        for groups in torch.arange(len(x.tasks)).tensor_split(self.minibatches):
            rows = torch.isin(x.group, groups).nonzero().flatten()
            mask = x.mask[rows] & x.valid[rows, None]
            total = float(mask.sum()) if self.aggregate == "token" else float(mask.any(1).sum())
            everywhere = self.sum_over_ranks(total)
            if len(rows) and x.weights is not None:
                share = total / everywhere * self.trainer.world_size if everywhere else 0.0
                x.weights[rows] = token_weights(mask, self.aggregate, self.sampling.max_new_tokens).float() * share
                rows = rows[self.has_gradient(x)[rows]]
            slices = self.slices(x, rows)
            if self.sum_over_ranks(len(slices)) and not slices:
                slices = [self._idle_slice()]  # other ranks have rows: this one must take part in their backward
            minibatches.append(slices)
        return minibatches

    def has_gradient(self, x: Experience) -> Tensor:
        """(N,) bool: the rows that the loss depends on."""
        assert x.weights is not None
        return (x.weights != 0).any(1)

    def slices(self, x: Experience, rows: Tensor) -> list[Experience]:
        """Cuts rows into slices of about equally long groups, each within `microbatch_tokens` unless one unit exceeds it."""
        units: list[tuple[int, list[int]]] = []  # (tokens, rows): groups, or parts of those that are too large
        for g in x.group[rows].unique_consecutive().tolist():
            members = rows[x.group[rows] == g].tolist()
            size = sum(int(x.lengths[r]) for r in members)
            parts = math.ceil(size / self.microbatch_tokens) if self.splits_groups else 1
            step = math.ceil(len(members) / parts)
            for i in range(0, len(members), step):
                part = members[i : i + step]
                units.append((sum(int(x.lengths[r]) for r in part), part))
        units.sort(key=lambda unit: -unit[0])
        slices: list[list[int]] = []
        longest = count = 0
        for size, part in units:
            held = count * longest  # with padding to the longest unit
            mixed = size < 0.75 * longest and held >= self.microbatch_tokens / 8  # padding would cost more than a slice
            if not slices or held + longest > self.microbatch_tokens or mixed:
                slices.append([])
                longest, count = size, 0
            slices[-1] += part
            count += 1
        return [x.rows(sorted(part)) for part in slices]

    def _idle_slice(self) -> Experience:
        x = build([[0]], [[0]], [0], [])
        x.weights = x.advantages = x.logps = torch.zeros_like(x.tokens, dtype=torch.float32)
        return x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self._slice is None:  # nothing to learn from anywhere
            return torch.zeros((), device=self.device, requires_grad=True)
        loss = self.loss(self._slice)
        self._loss += float(loss.detach())
        return loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """One Trainer step is one experience, however many optimizer steps it affords."""
        minibatches = [m for _ in range(self.epochs) for m in self._plan if m]
        self.count("skipped/no_signal", float(not minibatches))
        for slices in minibatches:
            super().optimizer_step(
                epoch, batch_idx, optimizer, partial(self._accumulate, slices, optimizer, optimizer_closure)
            )
        if (
            not minibatches and optimizer_closure is not None
        ):  # Lightning wants its closure run; the weights stay as they are
            self._slice = None
            with self._no_sync():
                optimizer_closure()

    def _accumulate(self, slices: list[Experience], optimizer: Any, closure: Callable[[], Any]) -> Any:
        optimizer.zero_grad()
        for i, part in enumerate(slices):
            self._slice = part.to(self.device)
            with nullcontext() if i == len(slices) - 1 else self._no_sync():
                result = closure()
        self._slice = None
        return result

    def _no_sync(self) -> AbstractContextManager[Any]:
        return getattr(self.trainer.strategy, "block_backward_sync", nullcontext)()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: `_accumulate` does it once a minibatch, and Lightning would do it once a slice."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss", self._loss / max(1, self.epochs * self.minibatches))
        for name, value in self.counts.items():
            self.log(name, value, reduce_fx="sum")

    def sum_over_ranks(self, value: float) -> float:
        if self.trainer.world_size == 1:
            return float(value)
        total = self.trainer.strategy.reduce(
            torch.tensor(float(value), dtype=torch.float64, device=self.device), reduce_op="sum"
        )
        return float(total)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        if self.schedule == "constant" and not self.warmup_steps:
            return optimizer
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / (self.warmup_steps + 1)
            if self.schedule == "constant":
                return 1.0
            done = min(1.0, (step - self.warmup_steps) / max(1.0, total - self.warmup_steps))
            return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

        if self.schedule != "constant" and math.isinf(total):
            raise ValueError(f"schedule {self.schedule!r} needs an end: set the Trainer's max_steps or max_epochs")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---------------------------------------------------------------- evaluation

    def evaluate(self, tasks: list[Task]) -> None:
        temperature = self.sampling.temperature if self.eval_temperature is None else self.eval_temperature
        kept, _, completions = self.respond(
            tasks, self.eval_samples, "eval", replace(self.sampling, temperature=temperature)
        )
        verdicts = self.score(kept, completions)
        for task, group, judged in zip(kept, completions, verdicts, strict=True):
            self.evaluation.update(task.family or "all", judged, [len(c.tokens) for c in group])

    def validation_step(self, batch: list[Task], batch_idx: int) -> None:
        self.evaluate(batch)

    def test_step(self, batch: list[Task], batch_idx: int) -> None:
        self.evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, stage: str) -> None:
        self.table = self.evaluation.compute()
        self.evaluation.reset()
        run.save_evaluation(self.trainer, stage, self.table)
        for name, value in self.table.scalars().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "pass@1", sync_dist=False)

    def predict_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:
        """One record a response: task, prompt, response and verdict."""
        kept, _, completions = self.respond(batch, self.eval_samples, "eval")
        judged = self.score(kept, completions) if all(t.score for t in kept) else [[None] * len(g) for g in completions]
        return [
            {"task": t.id, "family": t.family, "prompt": t.text(), "response": c.text, "verdict": v and vars(v)}
            for t, group, vs in zip(kept, completions, judged, strict=True)
            for c, v in zip(group, vs, strict=True)
        ]

    # ---------------------------------------------------------------- saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lit_rl"] = {
            "model": models.checkpoint_state(self.model, self.tokenizer),
            "generator": self.generator.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.generator.load_state_dict(checkpoint.get("lit_rl", {}).get("generator", {}))

    def export(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes a Hugging Face folder that transformers and vLLM load."""
        models.export(self.model, self.tokenizer, folder, overwrite=overwrite)


def export_checkpoint(checkpoint: str | Path, folder: str | Path, overwrite: bool = False) -> None:
    """Writes a Hugging Face folder from a Lightning checkpoint of any policy, and from nothing else."""
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if "lit_rl" not in content:
        raise ValueError(f"{path} is not the checkpoint of a lit-rl policy: it has no entry 'lit_rl'")
    model, tokenizer = models.from_checkpoint_state(content["lit_rl"]["model"])
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    )
    models.export(model, tokenizer, folder, overwrite=overwrite)
