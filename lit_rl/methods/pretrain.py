"""Pretrain: the likelihood of text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_rl import models, ranks
from lit_rl.experience import Experience, build
from lit_rl.methods.sft import SFT
from lit_rl.task import Task


class Pretrain(SFT):
    """Predicts every token: of the windows that the `Text` DataModule cuts, or of tasks as texts, each prompt with a known
    response. Evaluation logs val/loss and test/loss, in nats a token; tasks that can be scored are also answered.

    Args:
        model, **kwargs: As in SFT.
    """

    reads_tokens = True
    """Takes tasks whose meta holds "tokens", to be learned as they are."""

    def __init__(self, model: str | nn.Module = "tiny", *, lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(model, lr=lr, **kwargs)
        self._held_out = [0.0, 0.0, 0.0]
        """Summed loss, tokens and answered tasks of this evaluation."""

    def collect(self, tasks: list[Task]) -> Experience:
        if not tasks or "tokens" not in tasks[0].meta:
            return self._all_tokens(super().collect(tasks))
        tokens, longest = [task.meta["tokens"] for task in tasks], models.context_length(self.model) + 1
        fit = [g for g, window in enumerate(tokens) if 2 <= len(window) <= longest]
        if len(fit) < len(tasks):
            self.count("skipped/text_too_long", len(tasks) - len(fit))
        rows = [tokens[g] for g in fit]
        x = build([row[:1] for row in rows], [row[1:] for row in rows], range(len(rows)), [tasks[g] for g in fit])
        x.off_policy = torch.ones(len(x), dtype=torch.bool)
        return x

    @staticmethod
    def _all_tokens(x: Experience) -> Experience:
        """Of demonstrations the prompts too, but for what nothing predicts: the first token."""
        x.starts = torch.ones_like(x.starts)
        position = torch.arange(x.tokens.shape[1])
        x.mask = (position >= 1) & (position < x.lengths[:, None])
        return x

    def evaluate(self, tasks: list[Task]) -> None:
        x = self.collect(tasks)
        scored = [task for task in tasks if task.score is not None]
        seen = -float(self.logps_of(self.token_terms, x, 1.0).double().sum()), float(x.mask.sum()), float(len(scored))
        self._held_out = [a + b for a, b in zip(self._held_out, seen, strict=True)]
        if scored:
            super().evaluate(scored)

    def _report(self, stage: str) -> None:
        (loss, tokens, answered), self._held_out = ranks.total(*self._held_out), [0.0, 0.0, 0.0]
        if tokens:
            self.log(f"{stage}/loss", loss / tokens, prog_bar=True, rank_zero_only=False)
        if answered:
            super()._report(stage)
