"""Rounds: how a step's batch is filled, when one round of rollouts may not be enough."""

from __future__ import annotations

from copy import copy
from hashlib import blake2b
from random import Random
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_rl.experience import Experience, build, concat
from lit_rl.task import Task


def fill(policy: Any, tasks: list[Task]) -> Experience:
    """One round, or as many as are needed to fill the batch: with groups that differ in reward (dynamic sampling), or whose
    responses are all finished (chunks).

    The batch is that of all ranks, and holds the first such groups, on whatever rank they are: as one process would.
    Fewer than a full batch after `max_rounds` is counted, and trained on. When dynamic sampling has found none at all
    in a batch's number of responses, training stops if every response was right, which is to say rewarded with 1 (there
    is nothing left to learn), and RuntimeError is raised otherwise.
    """
    chunks = policy.chunks
    if not policy.dynamic_sampling and chunks is None:
        return policy.round(tasks)  # type: ignore[no-any-return]
    x, rounds, tried, judged, right = build([], [], [], []), 0, 0, 0, 0
    if chunks is not None:
        x = chunks.begin_step(policy)
    wanted, found = (int(policy.sum_over_ranks(n)) for n in (len(tasks), len(x.tasks)))
    while found < wanted and rounds < policy.max_rounds:
        missing = wanted if chunks is None else wanted - found
        drawn = policy.round(further_tasks(policy, missing, rounds) if rounds else tasks)
        new = informative(drawn) if policy.dynamic_sampling else drawn
        if chunks is not None:
            chunks.passed(new)
        x = concat(x, new)
        rounds, found = rounds + 1, int(policy.sum_over_ranks(len(x.tasks)))
        tried += len(drawn)
        judged += int(drawn.valid.sum())
        right += int((drawn.valid & (drawn.rewards >= 1)).sum())
    if chunks is not None and not rounds:  # there is a batch without them, and they wait
        chunks.enter(policy, tasks)
    name = "dynamic_sampling" if policy.dynamic_sampling else "chunked"
    if policy.trainer.is_global_zero:
        policy.count(f"{name}/rounds", rounds)
        policy.count(f"{name}/missing", max(0, wanted - found))
    if policy.dynamic_sampling and not found:
        tried, judged, right = (int(policy.sum_over_ranks(n)) for n in (tried, judged, right))
        if rounds and (chunks is None or tried >= wanted * policy.group):  # else there is too little to judge by
            _give_up(policy, judged, right, f"{rounds} rounds of {len(tasks)} prompts")
        return x
    if chunks is not None:  # a batch takes the oldest
        x = x.groups(sorted(range(len(x.tasks)), key=lambda g: x.tasks[g].turn))
    mine = policy.owners(x)[:wanted].count(policy.global_rank)
    if chunks is not None:
        chunks.ready = x.groups(range(mine, len(x.tasks)))
    return x.groups(range(mine))


def _give_up(policy: Any, judged: int, right: int, rounds: str) -> None:
    """No group of a whole batch had different rewards."""
    if judged and right == judged:
        rank_zero_warn(f"all of {judged} responses were right: there is nothing left to learn, and training stops")
        policy.trainer.should_stop = True
        return
    lost = "".join(f", {name} {n:g}" for name, n in policy.counts.items() if n and "skipped/" in name)
    raise RuntimeError(
        f"dynamic sampling found no group with different rewards among {judged} responses, {right} of them right"
        f" ({rounds}{lost}): the tasks are too hard or too easy for the policy. Change"
        " their level, warm-start the policy, raise `group` or `max_rounds`, or set dynamic_sampling to false."
    )


def informative(x: Experience) -> Experience:
    """The groups whose rewards differ."""
    if not len(x):
        return x
    return x.groups([g for g in range(len(x.tasks)) if len(x.rewards[(x.group == g) & x.valid].unique()) > 1])


def data_set(policy: Any) -> Any:
    """That of the training loader."""
    data: Any = getattr(policy.trainer.train_dataloader, "dataset", None)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(
            "dynamic sampling and chunks draw further prompts from the training loader's dataset: they need one with a"
            f" length and indices, not {type(data).__name__}"
        )
    return data


def further_tasks(policy: Any, n: int, round_: int) -> list[Task]:
    """This rank's part of n further training tasks, a function of (seed, step, round, rank): nothing to remember for a
    resume. Those of different ranks differ as long as there are enough."""
    data, step = data_set(policy), policy.trainer.global_step
    key = f"{policy.seed_value}\0{step}\0{round_}"
    rng = Random(int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big"))
    drawn = rng.sample(range(len(data)), min(n, len(data)))
    mine = drawn[policy.global_rank :: policy.trainer.world_size]
    tasks = []
    for index, task in zip(mine, policy.spare("task", data.__getitem__, mine), strict=True):
        if task is not None:
            tasks.append(copy(task))
            tasks[-1].index, tasks[-1].turn = index, (step, round_, len(tasks) - 1)
    policy.count("skipped/task_failed", len(mine) - len(tasks))
    return tasks
