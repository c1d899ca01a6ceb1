"""RLCCF: several policies that learn together from what all of them agree on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any, TypeVar

import torch

from lit_rl import ranks
from lit_rl.checks import require
from lit_rl.experience import Experience
from lit_rl.group import Group
from lit_rl.methods.grpo import GRPO
from lit_rl.metrics import Evaluation
from lit_rl.rollout import Rollout
from lit_rl.task import Task, Verdict
from lit_rl.voting import Vote, collective_vote

T = TypeVar("T")
TINY = ("tiny", "tiny-qwen2", "tiny-qwen3", "tiny-gemma")
"""What the members are that the name "tiny" makes."""


class RLCCF(Group):
    """RLCCF, reinforcement learning from collective consistency feedback (arXiv 2508.12338): members with models and
    tokenizers of their own answer the same prompts, and the answer that they elect, each vote weighted by its member's
    self-consistency, takes the place of the label. Each member then learns from its own responses by its own GRPO, with a
    learning rate and a clipped gradient of its own. One member alone is TTRL (`MajorityVote`) that trains on all votes.

    Labels of the tasks play no part but in what is logged. Answers are compared in the canonical form that the task's parser
    gives; responses without one have no vote and earn nothing, those whose verifier failed count nowhere. Callbacks, of which
    each member has a copy (`Group`), find the rewards that the vote gives.

    Logs under each member's name what it would log alone, and NAME/reward_accuracy; the means over members of loss and reward;
    and, of prompts, vote/share (the label's share of the votes' weight, a measure of collective consistency), vote/no_label
    and vote/label_accuracy. Evaluation is of the group's vote (val/pass@1), of each member (val/NAME/pass@1), and of
    agreement: the share of prompts on which two members' own majorities are the same (val/agreement/pass@1, the mean over
    pairs).

    Args:
        model: The members' models: names as in Actor, or policies with settings of their own. A single name stands for
            `members` members, and "tiny" for tiny models of several architectures. All further arguments are as in GRPO,
            for every member, but for `chunk` and `ahead`: all answer at the same time.
        members: How many members a single name makes.
        lr: Learning rate, of all members or of each.
        self_consistency: Whether a member's votes weigh as much as it agrees with itself; else all votes are equal.
        devices: One for each member, such as ["cuda:0", "cuda:1"], which then sample at the same time; None: all where the
            Trainer puts them, one after another.
    """

    refused = Rollout.refused

    def __init__(
        self,
        model: str | list[str] | list[Rollout] = "tiny",
        *,
        members: int = 4,
        lr: float | list[float] = 1e-6,
        self_consistency: bool = True,
        devices: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        require(members >= 1, "members", members, "at least 1")
        names: list[Any] = list(TINY) if model == "tiny" else [model]
        given = model if isinstance(model, list) else (names * members)[:members]
        alone = "null: each needs one of its own, which policies given as `model` may have"
        require(len(given) == 1 or kwargs.get("generator") is None, "generator", "one for several members", alone)
        limit = "null: all members answer at the same time"
        for name in kwargs.keys() & {"chunk", "ahead"}:
            require((value := kwargs.pop(name)) is None, name, value, limit)
        rates = lr if isinstance(lr, list) else [lr] * len(given)
        require(len(rates) == len(given), "lr", lr, f"a number, or one for each of {len(given)} members")
        made = [
            GRPO(x, lr=rate, chunk=None, ahead=None, **kwargs) if isinstance(x, str) else x
            for x, rate in zip(given, rates, strict=True)
        ]
        for member in made:
            same = "false: all members answer the same prompts"
            require(not member.dynamic_sampling, "dynamic_sampling", True, same)
            require(member.chunks is None, "chunk or ahead", "set", limit)
        super().__init__(made, devices)
        self.self_consistency, self.agreement = self_consistency, Evaluation()
        if all(isinstance(x, str) for x in given):
            own = {"model": model, "members": members, "lr": lr, "self_consistency": self_consistency}
            shared = {name: value for name, value in made[0].hparams.items() if name not in ("chunk", "ahead")}
            self.save_hyperparameters(shared | own | {"devices": devices})
        self._sums: Counter[str] = Counter()
        """Over the prompts and responses of this step."""

    def setup(self, stage: str) -> None:
        adaptive = stage == "fit" and getattr(getattr(self.trainer, "datamodule", None), "adaptive", False)
        require(not adaptive, "adaptive", True, "False, since it raises levels by labels, which a vote replaces")
        super().setup(stage)

    def prepare(self, batch: list[Task]) -> None:
        drawn = self.each(lambda member: member.draw(batch))
        experiences = [member.scored(*responses) for member, responses in zip(self.members, drawn, strict=True)]
        self._vote(experiences)
        for member, x in zip(self.members, experiences, strict=True):
            member.planned = member.plan(member.finish(member.rewarded(x)))

    def _vote(self, experiences: list[Experience]) -> None:
        """Rewards the responses that give their prompt's label with 1, and the others with 0."""
        self._sums = Counter()
        rows: list[dict[int, list[int]]] = [{id(task): [] for task in x.tasks} for x in experiences]
        for x, by_task in zip(experiences, rows, strict=True):
            x.set_rewards(torch.where(x.valid, 0.0, x.rewards))
            for i in x.valid.nonzero().flatten().tolist():
                by_task[id(x.tasks[x.group[i]])].append(i)
        for voters in aligned(rows):
            verdicts = [[x.verdicts[i] for i in part or []] for x, part in zip(experiences, voters, strict=True)]
            result = self._elect(verdicts)
            places = [(m, i) for m, part in enumerate(voters) for i in part or []]
            for (m, i), verdict, won in zip(places, chain(*verdicts), result.wins, strict=True):
                experiences[m].rewards[i] = float(won)
                name = self.members[m].name
                self._sums.update({f"{name}/rows": 1, f"{name}/right": won == verdict.correct})
            votes = result.votes.get(0, {}).values()
            self._sums.update(
                {
                    "prompts": bool(places),
                    "no_label": bool(places) and not votes,
                    "share": max(votes) / sum(votes) if votes else 0,  # type: ignore[dict-item]
                    "label_accuracy": any(
                        v.correct for v, won in zip(chain(*verdicts), result.wins, strict=True) if won
                    ),
                }
            )

    def _elect(self, verdicts: Sequence[Sequence[Verdict]]) -> Vote:
        return collective_vote([[v.answer for v in given] for given in verdicts], self.self_consistency)

    def log_step(self) -> dict[str, float]:
        main = super().log_step()
        total: Counter[str] = Counter()
        for sums in ranks.gather(self._sums):
            total.update(sums)
        for name in ("share", "no_label", "label_accuracy") if total["prompts"] else ():
            self.log(f"vote/{name}", total[name] / total["prompts"])
        for member in self.members:
            if rows := total[f"{member.name}/rows"]:
                member.log("reward_accuracy", total[f"{member.name}/right"] / rows)
        return main

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        return super().evaluations | ({"agreement": self.agreement} if len(self.members) > 1 else {})

    def evaluate(self, tasks: list[Task]) -> None:
        for found in aligned([{id(item[0]): item for item in items} for items in self.judge(tasks)]):
            items = [item for item in found if item]
            verdicts = [[v for v in item[1] if v.valid] if item else [] for item in found]
            wins = self._elect(verdicts).wins
            label = next((v for v, won in zip(chain(*verdicts), wins, strict=True) if won), Verdict(False, 0.0))
            lengths = [n for item in items for n in item[2]]
            self.evaluation.update(items[0][0].family or "all", [label], lengths)
            own = [self._elect([given]).labels.get(0) for given in verdicts]
            for (a, mine), (b, other) in combinations(zip(self.members, own, strict=True), 2):
                same = mine is not None and mine == other
                self.agreement.update(f"{a.name}+{b.name}", [Verdict(same, float(same))], [])


def aligned(members: Sequence[dict[Any, T]]) -> list[list[T | None]]:
    """For each key that any member has, what each has for it."""
    return [[one.get(key) for one in members] for key in dict.fromkeys(key for one in members for key in one)]
