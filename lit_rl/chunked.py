"""Chunked: responses are sampled a chunk of tokens at a time, and unfinished ones continue in later steps (MiniCPM4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rl import ranks, rounds
from lit_rl.ahead import Ahead
from lit_rl.checks import require
from lit_rl.experience import Experience, build
from lit_rl.generation.base import Completion
from lit_rl.task import Task, Verdict


def _none() -> Tensor:
    return torch.zeros(0)


@dataclass
class Response(Completion):
    """A completion so far; `text` is empty until it is finished."""

    seed: int = 0
    versions: Tensor = field(default_factory=lambda: _none().long())
    """(L,) int64: the step whose weights each token was sampled by."""
    old: Tensor = field(default_factory=_none)
    """(L,) float32: the trainer's log-probabilities under those weights; NaN where they were not asked for yet."""

    @staticmethod
    def of(seed: int) -> Response:
        return Response(_none().long(), _none(), _none(), "", "length", seed)

    def extend(self, more: Completion, version: int) -> None:
        n = len(more.tokens)
        self.tokens, self.logps = torch.cat([self.tokens, more.tokens]), torch.cat([self.logps, more.logps])
        self.log_kept, self.finish = torch.cat([self.log_kept, more.log_kept]), more.finish
        self.versions = torch.cat([self.versions, torch.full((n,), version)])
        self.old = torch.cat([self.old, torch.full((n,), torch.nan)])


@dataclass
class Begun:
    """A prompt some of whose responses are unfinished."""

    task: Task
    prompt: list[int]
    responses: list[Response]


class Chunks:
    """What one rank's rollouts carry from step to step: `pending` prompts, and `ready` groups that no batch had room for.

    A checkpoint holds not the tasks, whose `score` may be any function, but their places in the training data, which makes
    them again: by `again(index, id)` if it has that (for data that change in the course of a run), else as item `index`.

    Args:
        size: Tokens of a response in a round.
        longest: Tokens at which a response ends in any case.
        decode: Token ids to text.
        ahead: Samples each step's first round while the step before trains; None: when it is asked for.
    """

    def __init__(self, size: int, longest: int, decode: Callable[[list[int]], str], ahead: Ahead | None = None) -> None:
        self.size, self.longest, self.decode, self.ahead = size, longest, decode, ahead
        self.arrived = 0
        """Tokens that were sampled ahead, and no step has counted yet."""
        self._has_round = False
        """Whether this step's first round is sampled already, on all ranks or on none."""
        self.pending: list[Begun] = []
        self.ready = build([], [], [], [])
        self.filtered = 0
        """Tokens of this step that were finished, and are not trained on."""
        self._versions: dict[str, float] = {}
        self._before: tuple[int, dict[str, Any]] = (-1, {})
        """The latest step, and the state before it."""
        self._saved: dict[str, Any] = {}
        """A checkpoint's state, until there is a data set to make its tasks from."""

    # ---------------------------------------------------------------- a step

    def begin_step(self, policy: Any) -> Experience:
        """The groups that are ready."""
        if self._saved:
            self._restore(rounds.data_set(policy))
        self._arrive()
        self._before, self.filtered = (policy.trainer.global_step, self._state()), 0
        policy.sampled_tokens += self.arrived
        self._has_round = self.ahead is not None and policy.sum_over_ranks(self.arrived) > 0
        self.arrived = 0
        x, self.ready = self.ready, build([], [], [], [])
        return x

    def enter(self, policy: Any, tasks: list[Task]) -> None:
        """Begins responses to these tasks, without a token yet."""
        tasks, prompts = policy.encode(tasks, self.longest)
        seeds = policy.seeds(tasks, policy.group, "train")
        for task, prompt, row in zip(tasks, prompts, seeds, strict=True):
            if task.index is None:
                raise TypeError(
                    "chunk needs tasks that know their place in the training data, by which a resumed run finds them again: use"
                    " the loader of lit_rl.datamodules.TaskData, or set Task.index"
                )
            self.pending.append(Begun(task, prompt, [Response.of(seed) for seed in row]))

    def draw(self, policy: Any, tasks: list[Task]) -> tuple[list[Task], list[list[int]], list[list[Completion]]]:
        """Begins responses to these tasks, and samples a chunk of all that are unfinished. Returns the tasks that then have
        none, in the form of `Actor.respond`."""
        self.enter(policy, tasks)
        if not self._has_round:
            self._extend(policy.generate(*self._request(policy)), policy.trainer.global_step)
        self._has_round = False
        done = [one for one in self.pending if all(map(self._finished, one.responses))]
        self.pending = [one for one in self.pending if not all(map(self._finished, one.responses))]
        for one in done:
            for r in one.responses:
                r.text = self.decode(r.tokens.tolist())
        completions: list[list[Completion]] = [[*one.responses] for one in done]
        self.filtered += sum(len(r.tokens) for row in completions for r in row)  # until they pass
        return [one.task for one in done], [one.prompt for one in done], completions

    def _open(self) -> list[list[Response]]:
        return [[r for r in one.responses if not self._finished(r)] for one in self.pending]

    def _request(self, policy: Any) -> tuple[Any, ...]:
        """What `Actor.generate` takes, for the next chunk of all that is pending."""
        rows = self._open()
        prompts, seeds = [one.prompt for one in self.pending], [[r.seed for r in row] for row in rows]
        sampling = replace(policy.sampling, max_new_tokens=self.size)
        return sampling, prompts, seeds, [[r.tokens.tolist() for r in row] for row in rows]

    def _extend(self, sampled: Sequence[Sequence[Completion]], version: int) -> None:
        for row, more in zip(self._open(), sampled, strict=True):
            for r, completion in zip(row, more, strict=True):
                r.extend(completion, version)

    def _arrive(self) -> None:
        """Takes what was sampled ahead; its log-probabilities are known by the weights that are still there."""
        if self.ahead is not None and (sampled := self.ahead.join()) is not None:
            self._extend(sampled, self.ahead.version)
            self.arrived += sum(len(c.tokens) for row in sampled for c in row)
            if not self.ahead.policy.takes_sampler_logps:
                self._record(partial(self.ahead.policy.logps_of, self.ahead.forward))

    def _finished(self, r: Response) -> bool:
        return len(r.tokens) > 0 and (r.finish == "stop" or len(r.tokens) >= self.longest)

    def annotate(self, x: Experience, completions: Sequence[Any]) -> None:
        """What else is known of finished responses, row by row."""
        x.extra["version"] = spread(x, [r.versions for r in completions])
        x.logps = spread(x, [r.old for r in completions])

    def passed(self, x: Experience) -> None:
        """These groups, of what `draw` has returned, are for training."""
        self.filtered -= _own_tokens(x)

    def end_step(self, policy: Any, x: Experience, tasks: int) -> None:
        """x is the batch, and the weights are still those that have sampled the latest chunks (Algorithm 1, lines 15-17).
        `tasks`: as many are to be sampled ahead, over all ranks, at least."""
        if not policy.takes_sampler_logps:
            self._record(partial(policy.logps_of, policy.token_terms))
        counted = x.mask & x.valid[:, None] & ~x.off_policy[:, None]
        self.filtered += _own_tokens(x) - int(counted.sum())
        pending = sum(len(r.tokens) for one in self.pending for r in one.responses)
        tokens = {"generated": policy.sampled_tokens, "trained": int(counted.sum()), "filtered": self.filtered}
        for name, value in (tokens | {"pending": pending, "ready": _own_tokens(self.ready)}).items():
            policy.count(f"chunked/{name}_tokens", value)
        lags = lag(x, policy.trainer.global_step)
        own = (~x.off_policy).nonzero().flatten().tolist()
        versions = [len(lags[row][x.mask[row]].unique()) for row in own if x.mask[row].any()]
        self._versions = {
            "rows": len(versions),
            "versions": sum(versions),
            "versions_max": max(versions, default=0),
            "tokens": int(counted.sum()),
            "lag": int(lags.sum()),
            "lag_max": int(lags.max()) if len(x) else 0,
        }
        if self.ahead is not None:
            if not policy.sum_over_ranks(len(self.pending)):  # as in the first step, which had to wait for its own
                self.enter(policy, rounds.further_tasks(policy, tasks, policy.max_rounds))
            self.ahead.start(policy, *self._request(policy))

    def measures(self) -> dict[str, float]:
        """Over all ranks: how many versions of the policy a trained response is of, and its tokens' age in steps; the mean
        and the most. All ranks must call it."""
        every = ranks.gather(self._versions)
        total = {name: sum(one[name] for one in every) for name in every[0]}
        most = {name: max(one[name] for one in every) for name in ("versions_max", "lag_max")}
        means = {"versions": total["versions"] / max(1, total["rows"]), "lag": total["lag"] / max(1, total["tokens"])}
        return means | most

    def _record(self, logps_of: Callable[[Experience], Tensor]) -> None:
        """Fills in what is not known of `old`, which the present weights have sampled. `logps_of` gives (N, T) for the rows
        and mask of an experience."""
        if len(self.ready):
            assert self.ready.logps is not None
            self.ready.logps = _filled(self.ready, self.ready.logps, logps_of)
        every = [(g, one, r) for g, one in enumerate(self.pending) for r in one.responses]
        if not every:
            return
        responses = [r for *_, r in every]
        x = build(
            [one.prompt for _, one, _ in every], [r.tokens.tolist() for r in responses], [g for g, *_ in every], []
        )
        x.log_kept = spread(x, [r.log_kept for r in responses])
        old = _filled(x, spread(x, [r.old for r in responses]), logps_of)
        for row, r in enumerate(responses):
            r.old = old[row, x.mask[row]]

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self, step: int) -> dict[str, Any]:
        """Plain data. Of a step that is interrupted, the state before it: a resumed run takes it again."""
        self._arrive()
        return self._saved or (self._before[1] if self._before[0] == step else self._state())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a checkpoint; an empty state is that of the start of a run."""
        if self.ahead is not None:
            self.ahead.drop()
        self.arrived, self._has_round = 0, False
        self.pending, self.ready, self._before = [], build([], [], [], []), (-1, {})
        self._saved = state

    def _state(self) -> dict[str, Any]:
        def task(one: Task) -> dict[str, Any]:
            return {"index": one.index, "id": one.id, "key": one.key(), "turn": list(one.turn)}

        pending = [
            task(one.task) | {"prompt": one.prompt, "responses": [dict(vars(r)) for r in one.responses]}
            for one in self.pending
        ]
        x = self.ready
        ready = {
            "tensors": x.tensors(),
            "extra": dict(x.extra),
            "texts": x.texts,
            "verdicts": [vars(v) for v in x.verdicts],
        }
        rest = {"arrived": self.arrived}
        return rest | {
            "pending": pending,
            "ready": ready,
            "tasks": [task(one) for one in x.tasks],
        }

    def _restore(self, dataset: Any) -> None:
        state, self._saved = self._saved, {}
        self.arrived = state["arrived"]

        def task(saved: dict[str, Any]) -> Task:
            again = getattr(dataset, "again", lambda index, _: dataset[index])
            made: Task = copy(again(saved["index"], saved["id"]))
            made.index, made.turn = saved["index"], tuple(saved["turn"])
            if made.key() != saved["key"]:
                raise ValueError(
                    f"item {saved['index']} of the training data is {made.key()[:80]!r}, and was {saved['key'][:80]!r} when its"
                    " responses were begun: resume with the same data"
                )
            return made

        for n in (len(r["tokens"]) for one in state["pending"] for r in one["responses"] if r["finish"] != "stop"):
            limit = f"that of the checkpoint, whose unfinished responses have {n} tokens, of {self.longest} at most"
            require((self.longest - n) % self.size == 0, "chunk", self.size, limit)
        self.pending = [
            Begun(task(one), one["prompt"], [Response(**r) for r in one["responses"]]) for one in state["pending"]
        ]
        ready, tasks = state["ready"], [task(one) for one in state["tasks"]]
        verdicts = [Verdict(**v) for v in ready["verdicts"]]
        self.ready = Experience(
            **ready["tensors"], extra=ready["extra"], texts=ready["texts"], verdicts=verdicts, tasks=tasks
        )


def spread(x: Experience, columns: Sequence[Tensor]) -> Tensor:
    """(N, T): each row's column, (L,), at its response; zero elsewhere."""
    values = torch.cat(list(columns))
    return values.new_zeros(x.tokens.shape).masked_scatter(x.mask, values)


def lag(x: Experience, step: int) -> Tensor:
    """(N, T) int64: steps since each of the policy's own tokens was sampled; 0 elsewhere, and where nothing is known."""
    if "version" not in x.extra:
        return torch.zeros_like(x.mask, dtype=torch.long)
    return torch.where(x.mask & ~x.off_policy[:, None], step - x.extra["version"], 0)


def _own_tokens(x: Experience) -> int:
    return int(x.response_lengths[~x.off_policy].sum())


def _filled(x: Experience, old: Tensor, logps_of: Callable[[Experience], Tensor]) -> Tensor:
    missing = x.mask & old.isnan()
    index = missing.any(1).nonzero().flatten()
    if not len(index):
        return old
    part = x.rows(index)
    width = part.tokens.shape[1]
    part.mask = missing[index, :width]
    result = old.clone()
    result[index, :width] = torch.where(part.mask, logps_of(part), old[index, :width])
    return result
