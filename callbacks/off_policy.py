"""OffPolicyMixing: demonstrations among the policy's own responses (LUFFY)."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as L
import torch

from lit_rl import jsonl, objectives, ranks
from lit_rl.advantage import ADVANTAGES, group_mean
from lit_rl.checks import ConfigurationError, require
from lit_rl.experience import Experience, Terms
from lit_rl.hooks import RLCallback
from lit_rl.rollout import Rollout
from lit_rl.task import Task


class OffPolicyMixing(RLCallback):
    """LUFFY (Yan et al. 2025, arXiv 2504.14945): demonstrations join the group of their prompt. They are scored by the same
    verifier, count in the group's advantages, and their tokens' loss is -A f(p), f(p) = p / (p + gamma), with the
    probability p that the policy gives the token (the demonstrator's is taken to be one).

    The paper's other settings are the policy's, as in the recipe `luffy`: Dr. GRPO's advantages, seven responses a prompt
    beside the demonstration, no clip on them (clip_low 1, clip_high inf), an entropy bonus. Its code divides the loss by
    the longest response alone, ours (aggregate: constant) by the rows as well. It also trains on demonstrations that the
    verifier rejects, of which its data has none; `keep_wrong` does so.

    Demonstrations that the verifier fails on, that it rejects (counted as skipped/wrong_trace), or of more than
    `sampling.max_new_tokens` (skipped/response_too_long) are left out; prompts that have none in the first place are
    counted as skipped/no_trace. Such groups learn from their own responses.

    Logs off_policy/share (of rows), /reward, /length and /prob (mean p) of demonstrations, and on_policy/prob.

    Args:
        traces: A file of demonstrations, JSON lines or (if pyarrow is installed) Parquet. Each has a `response` and the
            `task`'s id or its `prompt`, as `lit-rl predict` writes them; the authors' data, with `target` for `response`,
            will do. None: the tasks' own worked solutions.
        per_group: Demonstrations in a group at most, the first ones of the task.
        mixed: The baseline of a group's advantages is that of all its rows. False: of the policy's own responses alone,
            and demonstrations have their reward less the mean of those.
        gamma: Of the shaping; None: f(p) = p.
        keep_wrong: Train on demonstrations that the verifier rejects, with the reward that it gives.
    """

    refuses: ClassVar[dict[str, str]] = {"SFT": "it trains on demonstrations by itself"}

    def __init__(
        self,
        traces: str | None = None,
        per_group: int = 1,
        mixed: bool = True,
        gamma: float | None = 0.1,
        keep_wrong: bool = False,
    ) -> None:
        require(per_group >= 1, "per_group", per_group, "at least 1")
        require(gamma is None or gamma > 0, "gamma", gamma, "above 0, or null for no shaping")
        require(traces is None or Path(traces).is_file(), "traces", traces, "a file")
        self.traces, self.per_group, self.keep_wrong = traces, per_group, keep_wrong
        self.mixed, self.gamma = mixed, gamma
        self._known: dict[str, list[str]] = {}
        self._step: Counter[str] = Counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Rollout):
            raise ConfigurationError(
                f"OffPolicyMixing needs a policy that samples responses, not {type(pl_module).__name__}"
            )
        if self.traces is not None:
            self._known = read_traces(Path(self.traces))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step.clear()

    def on_rollout(self, trainer: L.Trainer, policy: Any, experience: Experience) -> None:
        x = experience
        tasks = [replace(task, responses=self._responses(task), rewards=[]) for task in x.tasks]
        unknown = sum(not task.responses for task in tasks)
        policy.count("skipped/no_trace", unknown)
        if tasks and unknown == len(tasks):
            why = "its tasks have no `responses`, and no file of `traces` is given"
            if self.traces is not None:
                why = f"{self.traces} knows none of its tasks' ids and prompts, but such as {next(iter(self._known))!r}"
            policy.warn("skipped/no_trace", f"a step without any demonstration: {why}.")
        more = policy.demonstrations(tasks, policy.sampling.max_new_tokens)
        more.verdicts = policy.score([x.tasks[g] for g in more.group.tolist()], more.texts)
        more.rewards = torch.tensor([v.score for v in more.verdicts], dtype=torch.float32)
        more.valid = torch.tensor([v.valid for v in more.verdicts], dtype=torch.bool)
        right = torch.tensor([v.correct for v in more.verdicts], dtype=torch.bool)
        policy.count("skipped/wrong_trace", 0 if self.keep_wrong else int((more.valid & ~right).sum()))
        more.keep(more.first(self.per_group, more.valid & (right | self.keep_wrong)))
        x.add(more)
        self._step.update(rows=len(x), off=len(more))
        self._step.update({"reward": float(more.rewards.sum()), "length": int(more.response_lengths.sum())})

    def _responses(self, task: Task) -> list[str]:
        if self.traces is None:
            return task.responses
        return self._known.get(task.id) or self._known.get(task.text()) or []

    def on_advantage(self, trainer: L.Trainer, policy: Any, experience: Experience) -> None:
        x = experience
        if self.mixed:
            return
        own = x.valid & ~x.off_policy
        baseline = group_mean(x.rewards, x.group, own.to(x.rewards.dtype))
        alone = ADVANTAGES[policy.advantage](x.rewards, x.group, x.mask, own)
        x.advantages = torch.where(x.off_policy[:, None], (x.rewards - baseline)[:, None] * x.mask, alone)

    def on_loss(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience, terms: Terms) -> None:
        x = experience
        assert x.advantages is not None
        given = x.off_policy[:, None].expand_as(x.mask)
        terms.replace(given, objectives.luffy(terms.logps, x.advantages, x.mask, self.gamma).loss)
        counted, probs = terms.weights != 0, terms.logps.detach().exp()
        for name, where in ("off", counted & given), ("on", counted & ~given):
            self._step.update({f"{name}_prob": float(probs[where].sum()), f"{name}_tokens": int(where.sum())})

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total: Counter[str] = Counter()
        for step in ranks.gather(self._step):
            total.update(step)
        shares = {"off_policy/share": ("off", "rows"), "off_policy/reward": ("reward", "off")}
        shares |= {"off_policy/length": ("length", "off"), "off_policy/prob": ("off_prob", "off_tokens")}
        shares |= {"on_policy/prob": ("on_prob", "on_tokens")}
        for name, (part, whole) in shares.items():
            if total[whole]:
                pl_module.log(name, total[part] / total[whole], rank_zero_only=False)


def read_traces(path: Path) -> dict[str, list[str]]:
    """Demonstrations by the task's id and by its prompt; ConfigurationError names the record that is not one."""
    traces: dict[str, list[str]] = defaultdict(list)
    for number, record in enumerate(jsonl.records(path), 1):
        try:
            response = record["response"] if "response" in record else record["target"]
            text = response if isinstance(response, str) else response[-1]["content"]
            names = record.get("task"), Task(record["prompt"]).text() if record.get("prompt") else None
            keys = [name for name in dict.fromkeys(names) if name]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ConfigurationError(
                f"record {number} of {path} is no demonstration ({type(error).__name__}: {error}): it needs a `response`, text"
                " or messages, and a `task` (its id) or a `prompt`"
            ) from error
        if not keys:
            raise ConfigurationError(
                f"record {number} of {path} has neither a `task` nor a `prompt`: whose response is it?"
            )
        for key in keys:
            traces[key].append(text)
    require(bool(traces), "traces", path, "a file with demonstrations: this one is empty")
    return dict(traces)
