"""The learning rate over a run: warm-up, stable, decay. Constant, linear and cosine schedules are special cases of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_rl.checks import ConfigurationError, require

Shape = Literal["exponential", "linear", "cosine", "1-sqrt"]
SHAPES: dict[str, Callable[[float, float], float]] = {  # of the decay: (share of it that is done, floor) -> factor
    "exponential": lambda done, floor: floor**done,
    "linear": lambda done, floor: 1 - (1 - floor) * done,
    "cosine": lambda done, floor: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)),
    "1-sqrt": lambda done, floor: 1 - (1 - floor) * math.sqrt(done),
}
Schedule = Literal["constant", "linear", "cosine", "wsd"]


class WSD(LRScheduler):
    """Warm-up, stable, decay (MiniCPM, arXiv 2404.06395, eq. 1): the rate rises linearly, stays, and falls at the end. A
    run that was stopped in its stable stage can go on for any length, and be finished by a short decay at any time.

    Args:
        optimizer: Whose groups' learning rates are the highest that each reaches.
        total: Steps of the run.
        warmup: Steps of the rise.
        decay: Share of `total` that the decay takes, at its end; 0 is none. The paper found a tenth to be enough.
        shape: Of the decay.
        floor: The rate that it ends at, in terms of the highest; MiniCPM4 went from 7.5e-3 to 3e-4.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: float,
        warmup: int = 0,
        decay: float = 0.1,
        shape: Shape = "exponential",
        floor: float = 0.04,
    ) -> None:
        require(shape in SHAPES, "shape", shape, f"one of {', '.join(SHAPES)}")
        require(warmup >= 0, "warmup", warmup, "at least 0")
        require(0 <= decay <= 1, "decay", decay, "a share between 0 and 1")
        require(0 <= floor <= 1, "floor", floor, "between 0 and 1")
        require(shape != "exponential" or floor > 0, "floor", floor, "above 0 for an exponential decay")
        require(total >= 1, "total", total, "at least 1")
        require(not decay or math.isfinite(total), "total", total, "finite when there is a decay")
        self.total, self.decay, self.shape, self.floor = total, decay, shape, floor
        self.warmup, self.start, self.low, self.peak = warmup, 0, 0.0, 1.0
        """The latest rise: how many steps it takes, where it starts, and from what to what, in terms of the highest rate."""
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """The learning rate at this step, in terms of the highest."""
        risen = self.start + self.warmup
        if step < risen:
            return self.low + (self.peak - self.low) * (step - self.start + 1) / (self.warmup + 1)
        if not self.decay:
            return self.peak
        begin = max(risen, self.total - round(self.decay * self.total))
        done = min(1.0, max(0.0, (step - begin) / max(1.0, self.total - begin)))
        return self.peak * SHAPES[self.shape](done, self.floor)

    def get_lr(self) -> list[Any]:
        return [lr * self.factor(self.last_epoch) for lr in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        with warnings.catch_warnings():  # a first step without anything to learn takes no optimizer step
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            super().step(epoch)

    def rewarm(self, warmup: int, peak: float = 1.0) -> None:
        """From the step that comes next the rate rises anew, in `warmup` steps, from what it is to `peak` times the highest
        it was given; then it is stable and decays as before, at the end of the run. With `warmup` 0 it is there at once."""
        require(warmup >= 0, "warmup", warmup, "at least 0")
        require(peak > 0, "peak", peak, "above 0")
        self.low = self.factor(self.last_epoch)
        self.warmup, self.start, self.peak = warmup, self.last_epoch, peak
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = self.get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Without the settings: a run may go on with another end."""
        settings = ("total", "decay", "shape", "floor")
        return {name: value for name, value in super().state_dict().items() if name not in settings}


def make(schedule: Schedule, optimizer: Optimizer, total: Callable[[], float], warmup: int, decay: float) -> WSD:
    """The schedule of that name; `total()` is asked for the steps of the run when it has an end. `decay` is of "wsd"."""
    share = {"constant": 0.0, "linear": 1.0, "cosine": 1.0, "wsd": decay}[schedule]
    steps = total() if share else math.inf
    if share and math.isinf(steps):
        raise ConfigurationError(f"schedule {schedule!r} needs an end: set the Trainer's max_steps or max_epochs")
    if schedule in ("linear", "cosine"):
        return WSD(optimizer, steps, warmup, share, "linear" if schedule == "linear" else "cosine", floor=0.0)
    return WSD(optimizer, steps, warmup, share)
