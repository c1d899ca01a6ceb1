"""RolloutStats: the numbers that tell why a run learns or does not."""

from __future__ import annotations

import time
from collections import defaultdict
from statistics import mean
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lit_rl import ranks
from lit_rl.experience import Experience, Terms
from lit_rl.hooks import RLCallback
from lit_rl.objectives import kl

QUANTILES = (0.01, 0.5, 0.99)
SAMPLE = 2**20
"""Tokens of a step that quantiles are taken over, at most."""


class RolloutStats(RLCallback):
    """Logs, each step, of the responses that the policy sampled:

    - reward/FAMILY, and reward_std, with whatever shaping the rewards have; score/PART of verdicts with named parts;
    - groups/no_signal (no advantage, hence no gradient), groups/all_right, groups/all_wrong, invalid (verifier failures);
    - length/mean, length/max, length/truncated (share that met the limit);
    - ratio/p1, /p50, /p99 of policy to old policy, clip_fraction, ess (effective sample size of the ratios, 1 is on-policy);
    - kl: of the policy from the reference, where there is one (k3, mean over tokens);
    - mismatch/mean and /max of |trainer - sampler| log-probabilities before the policy moves, /kl of the sampler from the
      trainer (k3) and /max_ratio of the trainer's to the sampler's probability, when the engine's are not exact;
    - seconds/generate, /score, /train (all of the step but these two), and tokens_per_second (response tokens over all of it).
    """

    def __init__(self) -> None:
        self._ratios: list[Tensor] = []
        self._clipped = self._tokens = 0
        self._divergences: list[Tensor] = []
        self._gaps: list[Tensor] = []
        self._numbers: dict[str, float] = {}
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._ratios, self._divergences, self._gaps, self._clipped, self._tokens, self._numbers = [], [], [], 0, 0, {}
        self._start = time.perf_counter()

    def on_advantage(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        x = experience.rows(~experience.off_policy)
        if not len(x):
            return
        assert x.advantages is not None
        rows = [((x.group == g) & x.valid).nonzero().flatten().tolist() for g in range(len(x.tasks))]
        rows = [group for group in rows if group]
        n = max(1, len(rows))
        right = [[x.verdicts[i].correct for i in group] for group in rows]
        lengths = x.response_lengths.float()
        self._numbers |= {
            "groups/no_signal": sum(not x.advantages[group].any() for group in rows) / n,
            "groups/all_right": sum(map(all, right)) / n,
            "groups/all_wrong": sum(not any(group) for group in right) / n,
            "invalid": float((~x.valid).float().mean()),
            "reward_std": float(x.rewards[x.valid].std()) if int(x.valid.sum()) > 1 else 0.0,
            "length/mean": float(lengths.mean()),
            "length/max": float(lengths.max()),
            "length/truncated": float(x.truncated.float().mean()),
        }
        named: dict[str, list[float]] = defaultdict(list)
        for i, (g, reward) in enumerate(zip(x.group.tolist(), x.rewards.tolist(), strict=True)):
            if x.valid[i]:
                named[f"reward/{x.tasks[g].family or 'all'}"].append(reward)
                for name, part in x.verdicts[i].parts.items():
                    named[f"score/{name}"].append(part)
        self._numbers |= {name: mean(values) for name, values in named.items()}

    def on_loss(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience, terms: Terms) -> None:
        counted = (terms.weights != 0) & ~experience.off_policy[:, None]
        self._tokens += int(counted.sum())
        if terms.clipped is not None:
            self._clipped += int((terms.clipped & counted).sum())
        if terms.log_ratio is not None:
            self._ratios.append(terms.log_ratio.detach()[counted].float().exp().cpu())
        exact = getattr(policy, "exact_sampler", False) or getattr(policy, "old_logps", "") == "sampler"
        if experience.sampler_logps is not None and not exact:
            old = terms.logps.detach() if experience.logps is None else experience.logps
            self._gaps.append((old - experience.sampler_logps)[counted].float().cpu())
        if experience.ref_logps is not None:
            self._divergences.append(kl(terms.logps.detach(), experience.ref_logps, experience.mask)[counted].cpu())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._ratios and (ratios := torch.cat(self._ratios)).numel():
            self._numbers["ess"] = float(ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()))
            few = ratios[:: 1 + len(ratios) // SAMPLE]
            for q, value in zip(QUANTILES, few.quantile(torch.tensor(QUANTILES)).tolist(), strict=True):
                self._numbers[f"ratio/p{round(100 * q)}"] = value
            self._numbers["clip_fraction"] = self._clipped / max(1, self._tokens)
        if self._divergences and (divergences := torch.cat(self._divergences)).numel():
            self._numbers["kl"] = float(divergences.mean())
        if self._gaps and (gaps := torch.cat(self._gaps)).numel():
            self._numbers |= {"mismatch/mean": float(gaps.abs().mean()), "mismatch/max": float(gaps.abs().max())}
            self._numbers |= {"mismatch/kl": float((gaps.exp() - 1 - gaps).mean())}
            self._numbers |= {"mismatch/max_ratio": float(gaps.max().exp())}
        seconds = time.perf_counter() - self._start
        clock = dict(getattr(pl_module, "seconds", {}))
        clock["train"] = max(0.0, seconds - sum(clock.values()))
        self._numbers |= {f"seconds/{name}": value for name, value in clock.items()}
        self._numbers["tokens_per_second"] = getattr(pl_module, "sampled_tokens", 0) / max(seconds, 1e-9)
        everyone = ranks.gather(self._numbers) if trainer.world_size > 1 else [self._numbers]  # names may differ
        for name in sorted({name for numbers in everyone for name in numbers}):
            values = [numbers[name] for numbers in everyone if name in numbers]
            pl_module.log(name, over_ranks(name, values), rank_zero_only=False)


def over_ranks(name: str, values: list[float]) -> float:
    """One number of those of the ranks: the most of what is a most, the sum of tokens a second, else the mean."""
    if name in ("length/max", "mismatch/max", "mismatch/max_ratio"):
        return max(values)
    return sum(values) if name == "tokens_per_second" else mean(values)
