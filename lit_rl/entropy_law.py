"""The entropy law: performance follows from entropy alone. Standard library only, as the report needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

FIRST = 36
"""Steps whose points predict the rest: the paper's 15 % of a run."""
FEWEST = 5
"""Points that a fit needs."""


@dataclass(frozen=True)
class Law:
    """R = -a e^H + b (Cui et al. 2025, arXiv 2505.22617, eq. 6), with H in nats a token. Called with an entropy, it is the
    predicted R."""

    a: float
    b: float
    points: int
    deviation: float
    """Standard deviation of the points about the curve."""
    centre: float
    """Mean of e^H over the points."""
    spread: float
    """Sum over the points of (e^H - centre)^2."""

    def __call__(self, entropy: float) -> float:
        return self.b - self.a * math.exp(entropy)

    @property
    def ceiling(self) -> float:
        """R when all entropy is spent: -a + b."""
        return self(0.0)

    def interval(self, entropy: float, new: bool = False) -> float:
        """Half of the 95 % interval of the curve at this entropy, or of a `new` point there. The further from the points,
        the wider. It assumes that their deviations are independent and normal."""
        variance = new + 1 / self.points + (math.exp(entropy) - self.centre) ** 2 / self.spread
        return student(self.points - 2) * self.deviation * math.sqrt(variance)


def fit(points: Iterable[tuple[float, float]]) -> Law:
    """Least squares on pairs of entropy and reward, linear in e^H. Those with a number that is not finite do not count.

    Raises ValueError where there are fewer than 5 pairs, or where all entropies are the same.
    """
    pairs = [(h, r) for h, r in points if h < 700 and math.isfinite(h + r)]
    n = len(pairs)
    if n < FEWEST:
        raise ValueError(f"the entropy law needs {FEWEST} points with an entropy and a reward, and has {n}")
    xs, rs = [math.exp(h) for h, _ in pairs], [r for _, r in pairs]
    x, r = fmean(xs), fmean(rs)
    spread = math.fsum((v - x) ** 2 for v in xs)
    if spread <= n * (1e-6 * x) ** 2:  # the rounding of single precision
        raise ValueError(f"the entropy law cannot be fitted: all {n} points have the entropy {pairs[0][0]:.4g}")
    a = -math.fsum((v - x) * (w - r) for v, w in zip(xs, rs, strict=True)) / spread
    b = r + a * x
    squares = math.fsum((w - b + a * v) ** 2 for v, w in zip(xs, rs, strict=True))
    return Law(a, b, n, math.sqrt(squares / (n - 2)), x, spread)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 1 % from three degrees of freedom on (Abramowitz and Stegun 26.7.5)."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**k for k, term in enumerate(terms, 1))
