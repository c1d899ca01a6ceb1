"""InnerLoop: one Trainer step is one experience, however many optimizer steps are taken on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lit_rl import hooks, run, schedules
from lit_rl.checks import ConfigurationError
from lit_rl.experience import Experience
from lit_rl.resume import ExactResume
from lit_rl.schedules import Schedule
from lit_rl.stopping import Stopping
from lit_rl.task import Task


class Part(NamedTuple):
    """A slice, and the policy that learns from it."""

    policy: Any
    x: Experience


class InnerLoop(L.LightningModule):
    """What trains policies in a Trainer: a `Policy` itself, or a module that holds several.

    One Trainer batch is a list of tasks. From it `prepare` makes the `minibatches` of each policy, each of slices, and
    `optimizer_step` takes `epochs * minibatches` steps. Each is a full cycle of Lightning's precision plugin, whose closure
    (training_step and backward) runs once a slice. So clipping, schedulers, checkpoints, loggers and every other Trainer
    flag mean what they always mean, but `accumulate_grad_batches`, which is refused.

    A subclass sets the attributes below and defines `prepare` and `log_step`.
    """

    refused: ClassVar[dict[type[L.Callback], str]] = {
        GradientAccumulationScheduler: "a policy accumulates by itself: set the DataModule's batch_size for larger batches",
        BatchSizeFinder: "memory does not depend on batch_size: lower model.microbatch_tokens or model.max_rows when it runs out",
    }
    """Callbacks that cannot work, and what to do instead."""
    epochs: int
    schedule: Schedule
    warmup_steps: int
    decay_share: float
    stopping: Stopping
    _minibatch: Sequence[Part] = ()
    _part: Part | None = None

    @property
    def policies(self) -> Sequence[Any]:
        """What learns here, each a `Policy`."""
        return [self]

    def prepare(self, batch: list[Task]) -> None:
        """Samples what the policies learn from in this step, and lays it out as their `minibatches`."""
        raise NotImplementedError

    def log_step(self) -> dict[str, float]:
        """Logs the step's own numbers at its end, before any checkpoint of it is saved. Returns the main ones."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for callback in self.trainer.callbacks if stage == "fit" else []:  # type: ignore[attr-defined]
            for kind, why in self.refused.items():
                if isinstance(callback, kind):
                    raise ConfigurationError(
                        f"the callback {kind.__name__} does not work with {type(self).__name__}: {why}"
                    )

    def configure_callbacks(self) -> list[L.Callback]:
        if self.trainer.state.fn == "fit":
            kinds = [type(one) for one in self.trainer.callbacks]  # type: ignore[attr-defined]
            hooks.refuse(type(self), kinds, self.hparams)
        return [self.stopping, ExactResume()]

    def on_fit_start(self) -> None:
        if self.trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: a policy accumulates by itself. Leave it"
                " at 1; set the DataModule's batch_size for larger batches, model.microbatch_tokens for less memory."
            )
        self._check_precision()

    def _check_precision(self) -> None:
        """Refuses weights in which AdamW cannot compute, and warns of those that its steps would leave unchanged."""
        half = [p.detach() for p in self.parameters() if p.requires_grad and p.dtype in (torch.float16, torch.bfloat16)]
        if any(p.dtype == torch.float16 for p in half):
            raise ConfigurationError(
                "the weights to train are float16, in which AdamW's eps is zero: leave model.dtype at float32 and set the"
                " Trainer's precision to 16-mixed or bf16-mixed"
            )
        rates = [g.get("initial_lr", g["lr"]) for o in self.trainer.optimizers for g in o.param_groups]
        lost = sum(int((p.abs() * torch.finfo(p.dtype).eps / 4 > max(rates)).sum()) for p in half)
        if half and lost > 0.5 * sum(p.numel() for p in half):
            rank_zero_warn(
                f"the weights to train are bfloat16, which keeps three digits: a step of lr {max(rates):g} is rounded away in"
                f" {lost / sum(p.numel() for p in half):.0%} of them. Leave model.dtype at float32 and set the Trainer's"
                " precision to bf16-mixed"
            )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if self.trainer.training:  # a step begins, and none of its hooks has logged yet
            run.forget_step(self.trainer)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for policy in self.policies:
            policy.begin(batch)
        self.prepare(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self._part is None:  # nothing to learn from anywhere
            return torch.zeros((), device=self.device, requires_grad=True)
        policy, x = self._part
        loss: Tensor = policy.loss(x)
        policy.losses.append(float(loss.detach()))
        return loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        every = zip(*(policy.planned for policy in self.policies), strict=True)  # each policy's slices of a minibatch
        minibatches = [
            [Part(policy, x) for policy, slices in zip(self.policies, each, strict=True) for x in slices]
            for each in every
        ]
        minibatches = [m for _ in range(self.epochs) for m in minibatches if m]
        for parts in minibatches:
            parts = [Part(p, replace(x, extra=dict(x.extra))) for p, x in parts]  # a hook's changes end with the step
            for policy, slices in self._by_policy(parts):
                hooks.call(self.trainer, "on_minibatch", slices, module=policy)
            step = partial(self._accumulate, parts, optimizer, optimizer_closure)
            super().optimizer_step(epoch, batch_idx, optimizer, step)
        if not minibatches:  # Lightning wants its closure run; the weights stay as they are
            self._part = None
            with self._no_sync():
                optimizer_closure()

    def _by_policy(self, parts: Sequence[Part]) -> list[tuple[Any, list[Experience]]]:
        """The policies that have any of these slices, and theirs."""
        every = [(policy, [x for owner, x in parts if owner is policy]) for policy in self.policies]
        return [(policy, slices) for policy, slices in every if slices]

    def _accumulate(self, parts: list[Part], optimizer: Any, closure: Callable[[], Any]) -> Any:
        optimizer.zero_grad()
        self._minibatch = parts
        for i, (policy, x) in enumerate(parts):
            self._part = Part(policy, x.to(policy.device))
            with nullcontext() if i == len(parts) - 1 else self._no_sync():
                result = closure()
        self._part = None
        return result

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for policy, slices in self._by_policy(self._minibatch):
            policy.guard(policy, weights(policy, optimizer), slices, policy.losses[-len(slices) :])
            policy.log("grad_norm", policy.guard.norm)

    def _no_sync(self) -> AbstractContextManager[Any]:
        return getattr(self.trainer.strategy, "block_backward_sync", nullcontext)()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: `_accumulate` does it once a minibatch, and Lightning would do it once a slice."""

    def sum_over_ranks(self, value: float) -> float:
        if self.trainer.world_size == 1:
            return float(value)
        total = self.trainer.strategy.reduce(
            torch.tensor(float(value), dtype=torch.float64, device=self.device), reduce_op="sum"
        )
        return float(total)

    def configure_optimizers(self) -> Any:
        groups = [group for policy in self.policies for group in policy.parameter_groups()]
        optimizer: Any = torch.optim.AdamW(groups, fused=True)
        # By this Lightning knows fused optimizers, for which it refuses to clip gradients.
        optimizer._step_supports_amp_scaling = False
        total = partial(getattr, self.trainer, "estimated_stepping_batches")
        scheduler = schedules.make(self.schedule, optimizer, total, self.warmup_steps, self.decay_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def weights(policy: Any, optimizer: Any) -> list[Tensor]:
    """Those of the policy that the optimizer moves."""
    own = set(map(id, policy.parameters()))
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
