"""Laws of scale: learning rate and batch from size and data, and a task's score from a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lit_rl import jsonl
from lit_rl.checks import require
from lit_rl.entropy_law import student

Points = Iterable[tuple[float, float]]


def step_law(parameters: float, tokens: float) -> tuple[float, float]:
    """The best learning rate, and batch in tokens, to train that many parameters (without embeddings) on that many tokens
    (Step Law, arXiv 2503.04715): 1.79 N^-0.713 D^0.307 and 0.58 D^0.571."""
    require(parameters > 0, "parameters", parameters, "above 0")
    require(tokens > 0, "tokens", tokens, "above 0")
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def minicpm_batch(loss: float) -> float:
    """The batch in tokens that is best at this loss, in nats a token (MiniCPM, arXiv 2404.06395, fig. 3): 1.21e9 / L^6.24."""
    require(loss > 0, "loss", loss, "above 0")
    return 1.21e9 / loss**6.24


LOSS = "val/scaling_loss"
"""What the ScalingBench callback logs."""
FEWEST = 6
"""Points that a fit of a sigmoid needs: its three numbers, and three degrees of freedom for its interval."""
STEPS = np.linspace(-1, 1, 9)
"""Of the grid that is searched, each way."""


@dataclass(frozen=True)
class Sigmoid:
    """score = floor + c / (1 + e^(slope (loss - middle))), ScalingBench's law (MiniCPM4, arXiv 2506.07900), where c makes it
    `top` at a loss of 0. Called with a loss, it is the predicted score."""

    top: float
    """The score at a loss of 0. (c may be larger than 1: with a middle far below 0 the curve is all but e^(-slope loss).)"""
    slope: float
    middle: float
    floor: float
    freedom: int
    """Points, less the numbers that were fitted."""
    deviation: float
    """Standard deviation of the points about the curve."""
    covariance: tuple[tuple[float, ...], ...]
    """Of top, slope and middle, in units of `deviation` squared; zero for a top that is held at its bound of 1."""

    def __call__(self, loss: float) -> float:
        return self.floor + (self.top - self.floor) * _share(self.slope, self.middle, loss)

    def interval(self, loss: float, new: bool = False) -> float:
        """Half of the 95 % interval of the curve at this loss, or of a `new` point there, by the curve's derivatives. It
        assumes independent, normal deviations of the points, and ignores what bounds say."""
        g = _derivatives(self.top - self.floor, self.slope, self.middle, np.array([loss]))[0]
        variance = float(new) + float(g @ np.array(self.covariance) @ g)
        return student(self.freedom) * self.deviation * math.sqrt(variance)


def sigmoid_fit(points: Points, floor: float = 0.0) -> Sigmoid:
    """Least squares on pairs of loss and score, a share. The curve falls from a top of at most 1, at a loss of 0, to `floor`, the
    score of chance. Pairs with a number that is not finite do not count. Losses compare only between models of one vocabulary.

    Raises ValueError where there are fewer than 6 pairs, or where losses or scores are all the same.
    """
    require(0 <= floor < 1, "floor", floor, "at least 0 and below 1")
    pairs = [(x, y) for x, y in points if math.isfinite(x + y)]
    if len(pairs) < FEWEST:
        raise ValueError(f"a sigmoid needs {FEWEST} points with a loss and a score, and has {len(pairs)}")
    x, y = (np.array(values, dtype=float) for values in zip(*pairs, strict=True))
    if np.ptp(x) <= 1e-6 * abs(x).max() or np.ptp(y) <= 1e-9:
        raise ValueError(f"a sigmoid cannot be fitted: all {len(x)} points have the same loss, or the same score")
    slope, middle = _search(x, y - floor, 1 - floor)
    height = float(_height(_share(slope, middle, x), y - floor, 1 - floor))
    free = np.array([height < 1 - floor, True, True])  # a top at its bound is not estimated
    columns = _derivatives(height, slope, middle, x)[:, free]
    covariance = np.zeros((3, 3))
    covariance[np.ix_(free, free)] = np.linalg.pinv(columns.T @ columns)
    freedom = len(x) - int(free.sum())
    squares = float(((y - floor - height * _share(slope, middle, x)) ** 2).sum())
    return Sigmoid(
        floor + height,
        slope,
        middle,
        floor,
        freedom,
        math.sqrt(squares / freedom),
        tuple(map(tuple, covariance.tolist())),
    )


def scaling_points(runs: Iterable[str | Path], score: str = "val/pass@1") -> list[tuple[float, float]]:
    """(loss, score) of each validation of these runs' folders. FileNotFoundError where a run has none with both."""
    points = []
    for run in runs:
        found = [(r[LOSS], r[score]) for r in jsonl.read(Path(run) / "metrics.jsonl") if LOSS in r and score in r]
        if not found:
            raise FileNotFoundError(f"{run} holds no validation with {LOSS} (the ScalingBench callback's) and {score}")
        points += found
    return points


def _share(slope, middle, x):  # type: ignore[no-untyped-def]  # of floats and arrays alike
    """Of what the curve is at a loss of 0."""
    return np.exp(np.logaddexp(0.0, -slope * middle) - np.logaddexp(0.0, slope * (x - middle)))


def _height(share: np.ndarray, y: np.ndarray, most: float) -> np.ndarray:
    """(...,): the best one for these shares, (..., points), of at most `most`."""
    return np.clip((share @ y) / np.maximum((share * share).sum(-1), 1e-300), 0.0, most)


def _derivatives(height: float, slope: float, middle: float, x: np.ndarray) -> np.ndarray:
    """(points, 3): by height, slope and middle."""
    s = _share(slope, middle, x)
    here, zero = (np.exp(-np.logaddexp(0.0, -slope * (at - middle))) for at in (x, 0.0))
    return np.stack(
        [s, -height * s * ((x - middle) * here + middle * zero), height * s * slope * (here - zero)], axis=1
    )


def _search(x: np.ndarray, y: np.ndarray, most: float) -> tuple[float, float]:
    """Slope and middle of the least squares, the height being what is best for them: a grid, ever finer about its best."""
    log_slope, middle = math.log(4 / np.ptp(x)), x.mean()
    reach = np.array([3.5, 2.0 * np.ptp(x)])
    for _ in range(100):
        log_slopes, middles = log_slope + reach[0] * STEPS, middle + reach[1] * STEPS
        shares = _share(np.exp(log_slopes)[:, None, None], middles[None, :, None], x)  # (slopes, middles, points)
        errors = ((y - _height(shares, y, most)[..., None] * shares) ** 2).sum(-1)
        i, j = np.unravel_index(errors.argmin(), errors.shape)
        log_slope, middle, reach = log_slopes[i], middles[j], reach * 0.85
    return float(np.exp(log_slope)), float(middle)
