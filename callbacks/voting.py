"""MajorityVote: rewards without labels, from what most responses agree on (TTRL)."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_rl import ranks
from lit_rl.checks import ConfigurationError, require
from lit_rl.experience import Experience
from lit_rl.hooks import RLCallback
from lit_rl.rollout import Rollout
from lit_rl.voting import Vote, vote


class MajorityVote(RLCallback):
    """TTRL (Zuo et al. 2025, arXiv 2504.16084): the policy's own majority takes the place of the label. All `group`
    responses to a prompt vote (the paper's 64), those that give the winning answer are rewarded with 1, all others with 0,
    and the policy is trained on `samples` of them.

    It works on any tasks whose verdicts carry an `answer`, and never looks at `correct` and `score` but to log them.
    Answers are compared in the canonical form that the task's parser gives; the authors' code takes 0.5 and 1/2 for two.
    Responses without an answer neither win nor earn, which they do in that code when they are most. Ties go to the answer
    that appears first, as there. Responses whose verifier failed have no vote.

    Logs, over all votes of a step: vote/majority_ratio (the winner's share of all responses, with or without an answer),
    vote/blank (share of responses without one), vote/no_label (share of prompts where nobody voted); and where verdicts
    are of known labels vote/label_accuracy, vote/reward_accuracy (share of responses whose reward is what the label would
    give) and vote/true_reward. Warns when the policy agrees with itself more and more while it validates worse.

    Rewards of callbacks before this one are replaced; put those that shape rewards after it.

    Args:
        samples: Responses a prompt that are trained on, the first ones; all when the policy draws fewer.
        labelled: Whether the tasks' verdicts are of known labels, so that accuracies mean something.
        monitor: The validation metric that should not fall.
    """

    refuses: ClassVar[dict[str, str]] = {
        "SFT": "it samples no responses that could vote",
        "Group": "its members learn from a vote of their own, that of all of them: leave MajorityVote out",
    }

    def __init__(self, samples: int = 32, labelled: bool = True, monitor: str = "val/pass@1") -> None:
        require(samples >= 1, "samples", samples, "at least 1")
        self.samples, self.labelled, self.monitor = samples, labelled, monitor
        self._step: Counter[str] = Counter()
        """Sums over the prompts and responses of this step."""
        self._agreement = [0.0, 0.0]
        """Sum of majority ratios, and their number, since the last validation."""
        self._best: list[float] = []
        """The best validation so far, and the agreement that led to it."""
        self._worse = 0
        """Validations since then, in a row, that were worse in spite of more agreement."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Rollout):
            raise ConfigurationError(
                f"MajorityVote needs a policy that samples responses, not {type(pl_module).__name__}"
            )
        limit = "at least 2 with dynamic_sampling: one reward never differs"
        require(self.samples > 1 or not pl_module.dynamic_sampling, "samples", self.samples, limit)
        if getattr(getattr(trainer, "datamodule", None), "adaptive", False):
            raise ConfigurationError(
                "adaptive is True: it must be False, since it raises levels by labels, which a vote replaces"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step.clear()

    def on_rollout(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        x = experience
        own = x.valid & ~x.off_policy
        result = vote([v.answer for v in x.verdicts], x.group.tolist(), own.float().tolist())
        self._tally(x, own.tolist(), result)
        x.set_rewards(torch.where(own, torch.tensor(result.wins).float(), x.rewards))
        x.keep(x.first(self.samples, ~x.off_policy) | x.off_policy)

    def _tally(self, x: Experience, own: list[bool], result: Vote) -> None:
        every = zip(x.group.tolist(), x.verdicts, result.wins, own, strict=True)
        rows = [(g, verdict, won) for g, verdict, won, mine in every if mine]
        size = Counter(g for g, _, _ in rows)
        votes = {g: list(result.votes[g].values()) for g in size}
        self._step.update(
            {
                "prompts": len(size),
                "responses": len(rows),
                "majority_ratio": sum(max(votes[g], default=0) / n for g, n in size.items()),
                "no_label": sum(not votes[g] for g in size),
                "label_accuracy": len({g for g, verdict, won in rows if won and verdict.correct}),
                "blank": len(rows) - sum(map(sum, votes.values())),
                "reward_accuracy": sum(won == verdict.correct for _, verdict, won in rows),
                "true_reward": sum(verdict.score for _, verdict, _ in rows),
            }
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total: Counter[str] = Counter()
        for step in ranks.gather(self._step):
            total.update(step)
        if not total["responses"]:
            return
        if total["no_label"] == total["prompts"]:
            rank_zero_warn(
                f"none of {total['responses']} responses has an answer that could be voted for, so nothing is learned. If this"
                " goes on: the tasks' `score` must return a lit_rl.Verdict with `answer`, and the policy must know its form."
            )
        per = dict.fromkeys(("majority_ratio", "no_label", "label_accuracy"), "prompts")
        per |= dict.fromkeys(("blank", "reward_accuracy", "true_reward"), "responses")
        for name, of in per.items():
            if self.labelled or name in ("majority_ratio", "no_label", "blank"):
                pl_module.log(f"vote/{name}", total[name] / total[of], rank_zero_only=False)
        self._agreement[0] += total["majority_ratio"]
        self._agreement[1] += total["prompts"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value, (ratios, prompts) = trainer.callback_metrics.get(self.monitor), self._agreement
        if trainer.sanity_checking or value is None or not prompts:
            return
        now = [float(value), ratios / prompts]
        self._agreement = [0.0, 0.0]
        if not self._best or now[0] >= self._best[0]:
            self._best, self._worse = now, 0
            return
        self._worse = self._worse + 1 if now[1] > self._best[1] else 0
        if self._worse == 2:
            rank_zero_warn(
                f"the policy agrees with itself more and is right less: since its best validation {self.monitor} fell from"
                f" {self._best[0]:.3f} to {now[0]:.3f} while the majority ratio rose from {self._best[1]:.3f} to"
                f" {now[1]:.3f}. It is learning its own mistakes: go back to that checkpoint, or lower the learning rate."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"agreement": list(self._agreement), "best": list(self._best), "worse": self._worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._agreement, self._best = list(state["agreement"]), list(state["best"])
        self._worse = state["worse"]
