"""Experience: rows of tokens grouped by prompt, with all that a loss reads. And Terms: what a loss makes of one slice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_rl.task import Task, Verdict


@dataclass
class Experience:
    """N rows of up to T tokens: prompt, then response, then padding. A token's numbers stand at its own position:
    `logps[:, t]` is of `tokens[:, t]`. Rows of a group (one prompt) are adjacent.

    Every tensor has N rows, so that `rows`, `cat` and `add` need not know the fields; optional ones are None until the
    pipeline fills them.
    """

    tokens: Tensor
    """(N, T) int64."""
    mask: Tensor
    """(N, T) bool: the response's tokens, those that a loss may count."""
    starts: Tensor
    """(N,) int64: the prompt's length."""
    lengths: Tensor
    """(N,) int64: prompt and response together."""
    group: Tensor
    """(N,) int64, ascending: which of `tasks`."""
    rewards: Tensor
    """(N,) float32."""
    valid: Tensor
    """(N,) bool: False where the verifier failed; such rows count nowhere."""
    truncated: Tensor
    """(N,) bool: the response ended at the length limit."""
    off_policy: Tensor
    """(N,) bool: the policy did not sample this row (a demonstration), so it says nothing of the policy's success. Its
    `sampler_logps` are 0."""
    logps: Tensor | None = None
    """(N, T) float32: log-probabilities under the policy that the ratio is taken against."""
    sampler_logps: Tensor | None = None
    """(N, T) float32: as the engine reported them."""
    log_kept: Tensor | None = None
    """(N, T) float32: log of the mass kept by top-p, top-k and min-p, subtracted to get the truncated distribution."""
    ref_logps: Tensor | None = None
    """(N, T) float32: under the reference policy."""
    advantages: Tensor | None = None
    """(N, T) float32."""
    weights: Tensor | None = None
    """(N, T) float32: what each token counts in the loss of its minibatch. They settle every normalisation."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further columns with N rows, for methods and callbacks."""
    texts: list[str] = field(default_factory=list)
    """One a row: the response as text."""
    verdicts: list[Verdict] = field(default_factory=list)
    """One a row."""
    tasks: list[Task] = field(default_factory=list)
    """One a group; `group` indexes it."""

    def __len__(self) -> int:
        return len(self.tokens)

    def tensors(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Tensor)}

    def rows(self, index: Tensor | Sequence[int]) -> Experience:
        """The rows at these indices (a bool mask works too), trimmed to the longest."""
        index = torch.as_tensor(index, device=self.tokens.device)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        longest = int(self.lengths[index].max()) if len(index) else 0
        cut = {k: v[index] if v.dim() == 1 else v[index, :longest] for k, v in self.tensors().items()}
        extra = {k: v[index] if v.dim() == 1 else v[index, :longest] for k, v in self.extra.items()}
        lists: dict[str, Any] = {
            k: [getattr(self, k)[i] for i in index.tolist()] for k in ("texts", "verdicts") if getattr(self, k)
        }
        return dataclasses.replace(self, **cut, extra=extra, **lists)

    def groups(self, index: Sequence[int]) -> Experience:
        """The groups at these indices, in this order, renumbered from zero, with their tasks."""
        rows = [(self.group == g).nonzero().flatten() for g in index]
        part = self.rows(torch.cat(rows) if rows else [])
        part.group = torch.arange(len(rows)).repeat_interleave(torch.tensor([*map(len, rows)], dtype=torch.long))
        part.tasks = [self.tasks[g] for g in index]
        return part

    def first(self, n: int, among: Tensor | None = None) -> Tensor:
        """(N,) bool: the first n rows of each group, of all or of those `among`."""
        taken = torch.zeros(len(self), dtype=torch.bool)
        for g in self.group.unique().tolist():
            members = self.group == g if among is None else (self.group == g) & among
            taken[members.nonzero().flatten()[:n]] = True
        return taken

    def keep(self, index: Tensor | Sequence[int]) -> None:
        """Lets go of all other rows, in place; `index` is as in `rows`. Groups and tasks stay."""
        vars(self).update(vars(self.rows(index)))

    def add(self, other: Experience) -> None:
        """Takes in rows of the same groups, in place; each group's new rows follow its old ones.

        Columns that only one side has are filled with zeros (False) on the other, texts with "", verdicts with invalid ones.
        Raises ValueError for an unknown group.
        """
        if len(other) and not 0 <= int(other.group.min()) <= int(other.group.max()) < len(self.tasks):
            raise ValueError(
                f"rows of groups {other.group.unique().tolist()} added to an experience of {len(self.tasks)} groups"
            )
        order = torch.cat([self.group, other.group]).argsort(stable=True)
        width = max(self.tokens.shape[1], other.tokens.shape[1])

        def join(mine: Tensor | None, theirs: Tensor | None) -> Tensor:
            some = mine if mine is not None else theirs
            assert some is not None
            shape = (lambda n: (n, width)) if some.dim() == 2 else (lambda n: (n,))
            parts = [
                some.new_zeros(shape(n)) if v is None else pad(v, (0, width - v.shape[1])) if v.dim() == 2 else v
                for v, n in ((mine, len(self)), (theirs, len(other)))
            ]
            return torch.cat(parts)[order]

        names = self.tensors().keys() | other.tensors().keys()
        joined = {k: join(getattr(self, k), getattr(other, k)) for k in names}
        extra = {k: join(self.extra.get(k), other.extra.get(k)) for k in self.extra.keys() | other.extra.keys()}

        def join_lists(mine: list[Any], theirs: list[Any], blank: Any) -> list[Any]:
            both = (mine or [blank] * len(self)) + (theirs or [blank] * len(other))
            return [both[i] for i in order.tolist()] if mine or theirs else []

        texts = join_lists(self.texts, other.texts, "")
        verdicts = join_lists(self.verdicts, other.verdicts, Verdict.invalid("not judged"))
        for name, value in joined.items():
            setattr(self, name, value)
        self.extra, self.texts, self.verdicts = extra, texts, verdicts

    def to(self, device: torch.device | str) -> Experience:
        moved = {k: v.to(device) for k, v in self.tensors().items()}
        return dataclasses.replace(self, **moved, extra={k: v.to(device) for k, v in self.extra.items()})

    def set_rewards(self, rewards: Tensor) -> None:
        """For `on_rollout`: other rewards, (N,), for the same rows."""
        if rewards.shape != self.rewards.shape:
            raise ValueError(f"{tuple(rewards.shape)} rewards for {tuple(self.rewards.shape)} rows")
        self.rewards = rewards.to(self.rewards)

    @property
    def response_lengths(self) -> Tensor:
        """(N,) int64."""
        return self.lengths - self.starts


def build(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    group: Sequence[int],
    tasks: list[Task],
    pad_id: int = 0,
) -> Experience:
    """An experience of one row for each (prompt, response) pair of token ids; rewards are zero, nothing is truncated."""
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)], dtype=torch.long)
    starts = torch.tensor([len(p) for p in prompts], dtype=torch.long)
    width = int(lengths.max()) if len(lengths) else 0
    tokens = torch.full((len(lengths), width), pad_id, dtype=torch.long)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : lengths[row]] = torch.tensor([*prompt, *response], dtype=torch.long)
    position = torch.arange(width)
    return Experience(
        tokens,
        (position >= starts[:, None]) & (position < lengths[:, None]),
        starts,
        lengths,
        torch.tensor(group, dtype=torch.long),
        torch.zeros(len(lengths)),
        torch.ones(len(lengths), dtype=torch.bool),
        torch.zeros(len(lengths), dtype=torch.bool),
        torch.zeros(len(lengths), dtype=torch.bool),
        tasks=tasks,
    )


def concat(first: Experience, second: Experience) -> Experience:
    """All groups of both, the second's after the first's."""
    both = dataclasses.replace(first, tasks=first.tasks + second.tasks)
    if len(second):
        both.add(dataclasses.replace(second, group=second.group + len(first.tasks)))
    return both


@dataclass
class Terms:
    """What the loss of one slice is made of; `on_loss` may change `loss` and `weights`. All (N, T) float32."""

    logps: Tensor
    """Under the current policy, with gradient."""
    entropy: Tensor
    """Of the next-token distribution at each response token; with gradient when the loss uses it."""
    loss: Tensor
    """Per token; the slice's loss is `(loss * weights).sum()`."""
    weights: Tensor
    log_ratio: Tensor | None = None
    clipped: Tensor | None = None
    """bool: where the objective's clip cuts the gradient."""
    surrogate: Tensor | None = None
    """The policy-gradient part of `loss`, which also holds divergence and entropy."""

    def replace(self, where: Tensor, surrogate: Tensor) -> None:
        """For `on_loss`: another policy-gradient loss, without a clip, at the tokens `where`; the other parts stay."""
        assert self.surrogate is not None
        self.loss = self.loss + torch.where(where, surrogate - self.surrogate, 0.0)
        self.surrogate = torch.where(where, surrogate, self.surrogate)
        if self.clipped is not None:
            self.clipped = self.clipped & ~where

    def total(self) -> Tensor:
        # where, not times: a padding position's garbage must not reach the sum
        return torch.where(self.weights != 0, self.loss * self.weights, 0.0).sum()
