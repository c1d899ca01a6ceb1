"""What an evaluation says of a policy: functional first, a torchmetrics class second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_rl.task import Verdict
from lit_rl.voting import vote

NAME_BYTES = 64


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k responses is right, of `samples` drawn of which `correct` were (Chen et al. 2021, eq. 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs k between 1 and the {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(verdicts: Sequence[Verdict]) -> bool:
    """Whether the most frequent answer is right, by `voting.vote`."""
    wins = vote([v.answer for v in verdicts], [0] * len(verdicts), [float(v.valid) for v in verdicts]).wins
    return any(v.correct for v, won in zip(verdicts, wins, strict=True) if won)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval by the normal approximation over items; the interval of one item is infinite."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = sum(values) / n
    variance = sum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.inf
    return mean, 1.96 * math.sqrt(variance / n)


@dataclass
class Row:
    """One line of the table: a family, or "mean" (over families)."""

    family: str
    items: int
    samples: int
    """Responses an item."""
    pass_at: dict[int, float]
    interval: float
    """Half of the 95 % interval of pass@1."""
    majority: float
    length: float
    """Mean response length in tokens."""
    score: float
    """Mean score."""


@dataclass
class Table:
    rows: list[Row]

    def scalars(self) -> dict[str, float]:
        """For a logger: those of all families together under plain names, and pass@1 of each family."""
        if not self.rows:
            return {}
        *families, mean = self.rows
        result = {f"pass@{k}": v for k, v in mean.pass_at.items()}
        result |= {"score": mean.score, "length": mean.length}
        if mean.samples > 1:
            result[f"maj@{mean.samples}"] = mean.majority
        return result | {f"pass@1/{row.family}": row.pass_at[1] for row in families}

    def __str__(self) -> str:
        if not self.rows:
            return "no items were evaluated"
        ks = sorted({k for row in self.rows for k in row.pass_at})
        head = ["family", "items", "pass@1", "±95%", *(f"pass@{k}" for k in ks if k > 1)]
        head += [f"maj@{self.rows[-1].samples}"] * (self.rows[-1].samples > 1) + ["length"]
        lines = [head]
        for row in self.rows:
            cells = [row.family, str(row.items), f"{row.pass_at[1]:.3f}", f"{row.interval:.3f}"]
            cells += [f"{row.pass_at.get(k, math.nan):.3f}" for k in ks if k > 1]
            cells += [f"{row.majority:.3f}"] * (self.rows[-1].samples > 1) + [f"{row.length:.1f}"]
            lines.append(cells)
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        rule = "-" * len(text[0])
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])

    def as_dict(self) -> dict[str, float]:
        """pass@1 by family, and "mean"."""
        return {row.family: row.pass_at[1] for row in self.rows}


def tabulate(records: Sequence[tuple[str, int, int, bool, float, float]]) -> Table:
    """A table from one (family, samples, correct, majority right, mean length, mean score) an item.

    The last row is the mean over families, each counting the same; its interval combines theirs.
    """
    rows = []
    for family in sorted({r[0] for r in records}):
        mine = [r for r in records if r[0] == family]
        samples = min(r[1] for r in mine)
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if k <= samples]
        pass_at = {k: sum(pass_at_k(r[1], r[2], k) for r in mine) / len(mine) for k in ks}
        _, interval = mean_interval([r[2] / r[1] for r in mine])
        means = [sum(float(r[i]) for r in mine) / len(mine) for i in (3, 4, 5)]
        rows.append(Row(family, len(mine), samples, pass_at, interval, *means))
    if rows:
        ks = [k for k in rows[0].pass_at if all(k in row.pass_at for row in rows)]

        def average(values: list[float]) -> float:
            return sum(values) / len(values)

        rows.append(
            Row(
                "mean",
                sum(row.items for row in rows),
                min(row.samples for row in rows),
                {k: average([row.pass_at[k] for row in rows]) for k in ks},
                math.sqrt(sum(row.interval**2 for row in rows)) / len(rows),
                average([row.majority for row in rows]),
                average([row.length for row in rows]),
                average([row.score for row in rows]),
            )
        )
    return Table(rows)


class Evaluation(Metric):
    """pass@1, pass@k, maj@k, length and score by family, over all ranks. Responses the verifier failed on do not count."""

    full_state_update = False
    names: list[Tensor]
    numbers: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "names", [], dist_reduce_fx="cat"
        )  # (items, NAME_BYTES) uint8: a family's name, so that ranks can differ
        self.add_state("numbers", [], dist_reduce_fx="cat")  # (items, 5) float32

    def update(self, family: str, verdicts: Sequence[Verdict], lengths: Sequence[int]) -> None:
        """One item: the verdicts on its responses and their lengths in tokens."""
        valid = [v for v in verdicts if v.valid]
        encoded = family.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
        self.names.append(torch.tensor([list(encoded)], dtype=torch.uint8, device=self.device))
        score = sum(v.score for v in valid) / max(1, len(valid))
        numbers = [
            len(valid),
            sum(v.correct for v in valid),
            majority(valid),
            sum(lengths) / max(1, len(lengths)),
            score,
        ]
        self.numbers.append(torch.tensor([numbers], dtype=torch.float32, device=self.device))

    def compute(self) -> Table:
        if not len(self.names):
            return Table([])
        names, numbers = (torch.cat(v) if isinstance(v, list) else v for v in (self.names, self.numbers))
        records = [
            (bytes(name).rstrip(b"\0").decode(errors="ignore"), int(n[0]), int(n[1]), n[2] > 0, n[3], n[4])
            for name, n in zip(names.tolist(), numbers.tolist(), strict=True)
            if n[0]
        ]
        return tabulate(records)
