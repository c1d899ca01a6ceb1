"""Several ranks do what one process does, and none is left waiting. The cases are in worker.py."""

import os
import socket
import subprocess
import sys
from functools import cache

import pytest
import torch
import worker

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]
FIRST, LATER, MOVED = 5e-6, 2e-4, 1e-3
"""Largest relative differences, in float32: of the first gradient, of later ones, and of how far the weights have moved.
Sums in another order are all that may differ; Adam's first steps amplify it."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of both ranks: two(case, strategy) -> [rank 0's, rank 1's]."""
    folder = tmp_path_factory.mktemp("ranks")
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__],
            cwd=folder,
            env=env | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr.{rank}").open("w"),
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=600) == 0, (folder / f"stderr.{rank}").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()

    def results(case, strategy):
        both = [torch.load(folder / f"{case} {strategy} {rank}.pt") for rank in range(2)]
        assert not any(isinstance(result, str) for result in both), "\n".join(map(str, both))
        return both

    return results


@cache
def one(case):
    return worker.CASES[case](1, "")


def distance(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
@pytest.mark.parametrize("case", worker.EQUAL)
def test_two_ranks_learn_what_one_process_does(case, strategy, two):
    want, (got, other) = one(case), two(case, strategy)
    assert torch.equal(got["weights"], other["weights"])
    assert len(got["gradients"]) == len(want["gradients"]) > 0
    assert distance(got["gradients"][0], want["gradients"][0]) < FIRST
    assert all(distance(a, b) < LATER for a, b in zip(got["gradients"], want["gradients"], strict=True))
    assert distance(got["moved"], want["moved"]) < MOVED
    assert sorted(got["own"]["tasks"] + other["own"]["tasks"]) == sorted(want["own"]["tasks"])
    assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-3, abs=1e-5)


def test_the_uneven_cases_are_uneven(two):
    slices = {case: [result["own"]["slices"] for result in two(case, "fsdp2")] for case in worker.EQUAL}
    assert slices["rank 1 has no rows"] == [[[1], [1]], [[0], [1]]]
    assert slices["rank 1 has no signal"] == [[[1], [1]], [[0], [1]]]
    assert slices["nobody has a signal"] == [[[0], [1]], [[0], [1]]]
    many, few = slices["other numbers of slices"]
    assert many[0][0] > few[0][0] > 0
    assert one("further rounds")["metrics"]["dynamic_sampling/rounds"] > 1


@pytest.mark.parametrize("case", worker.EQUAL)
def test_a_batch_gathers_each_sharded_model_once(case, two):
    """However many tokens are sampled, rounds and slices are taken: five all-gathers, one of each layer and of the rest."""
    for result in two(case, "fsdp2"):
        assert set(result["own"]["gathers"]) == {5 * result["models"]}
    assert not any(two(case, "ddp")[0]["own"]["gathers"])
