"""Guard: keeps losses and gradients that are not finite away from the weights."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rl import run
from lit_rl.checks import require
from lit_rl.experience import Experience
from lit_rl.tolerance import tolerate

DUMPS = 3
"""Files that a run writes at most: the first tell most."""


class Guard:
    """Takes away the gradient of a minibatch whose loss or gradient is not finite, so that no optimizer moves weights or
    its state by it, on all ranks alike. Counts it as skipped/non_finite, keeps what it was made of, and raises
    FloatingPointError after `limit` in a row.

    `norm` is that of the last gradient, before clipping: the one reduction that this takes.
    """

    def __init__(self, limit: int) -> None:
        require(limit >= 1, "max_non_finite", limit, "at least 1")
        self.limit, self.norm = limit, 0.0
        self.in_a_row = self.dumps = 0

    def __call__(self, policy: Any, weights: list[Tensor], slices: list[Experience], losses: list[float]) -> None:
        """The minibatch's slices and their losses, when its gradients stand at the policy's weights."""
        self.norm = grad_norm(weights)
        if not policy.sum_over_ranks(float(not math.isfinite(self.norm + sum(losses)))):
            self.in_a_row = 0
            return
        for weight in weights:
            weight.grad = None
        if policy.trainer.is_global_zero:  # it is so on all ranks, and counts once
            policy.count("skipped/non_finite")
        self.in_a_row += 1
        trainer, step = policy.trainer, policy.trainer.global_step
        where = ""
        if self.in_a_row == 1 and self.dumps < DUMPS and not trainer.fast_dev_run:
            self.dumps += 1
            name = run.NON_FINITE.format(
                f"{step}-{policy.name}" if policy.name else step
            )  # a group's member has a name
            path = run.folder(trainer) / run.by_rank(name, trainer.global_rank)
            tolerate(path, lambda: dump(path, step, slices, losses))
            where = f" It was made of what is in {path}."
        rank_zero_warn(
            f"step {step}: the loss or gradient is not finite (loss {sum(losses):g}, gradient norm {self.norm:g}). The"
            f" weights stay as they are; counted as skipped/non_finite.{where}"
        )
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{self.in_a_row} losses or gradients in a row were not finite, the last at step {step}; the weights are those"
                f" before the first of them. See {run.NON_FINITE.format('*')} in the run's folder. Lower lr, set the Trainer's"
                " gradient_clip_val or a wider precision, or raise max_non_finite."
            )


def grad_norm(weights: list[Tensor]) -> float:
    """Of all gradients together, in float32 at least."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients:
        return 0.0
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype)))
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def dump(path: Path, step: int, slices: list[Experience], losses: list[float]) -> None:
    """Writes the slices whose own loss is not finite, or all when there is none, for `torch.load(..., weights_only=True)`."""
    guilty = [i for i, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
    content = [
        {"loss": losses[i], "texts": slices[i].texts, "tasks": [task.key() for task in slices[i].tasks]}
        | {**slices[i].extra, **slices[i].tensors()}
        for i in guilty
    ]
    buffer = io.BytesIO()  # torch reports a full disk in its own way
    torch.save({"step": step, "slices": content}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
