"""Several ranks do what one process does, none is left waiting, and none outlives another. Cases are in worker.py."""

import os
import socket
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import worker
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lit_rl import GRPO, jsonl, sharding
from lit_rl.export import export_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]
FIRST, LATER, MOVED = 5e-6, 2e-4, 1e-3
"""Largest relative differences, in float32: of the first gradient, of later ones, and of how far the weights have moved.
Sums in another order are all that may differ; Adam's first steps amplify it."""
PAIRS = [(case, strategy) for case in worker.EQUAL for strategy in worker.tried(case)]
LIMIT = 300
"""Seconds that a job may take; ranks that wait for each other would take the strategy's half hour."""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_by_two(script, folder):
    """The cases of a script, run by two ranks: -> results(case, strategy) -> [rank 0's, rank 1's], which are read there."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, script],
            cwd=folder,
            env=env | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"stderr.{rank}").open("w"),
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=10 * LIMIT) == 0, (folder / f"stderr.{rank}").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()

    def results(case, strategy):
        both = [torch.load(folder / f"{case} {strategy} {rank}.pt") for rank in range(2)]
        assert not any(isinstance(result, str) for result in both), "\n".join(map(str, both))
        return both

    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    results = run_by_two(worker.__file__, folder)
    results.folder = folder
    return results


@cache
def one(case):
    return worker.CASES[case](1, "")


def distance(got, want):
    return float((got - want).norm() / want.norm())


def assert_equal(want, got, other):
    """What one process learned, and what each of two ranks did."""
    assert torch.equal(got["weights"], other["weights"])
    assert len(got["gradients"]) == len(want["gradients"]) > 0
    assert distance(got["gradients"][0], want["gradients"][0]) < FIRST
    assert all(distance(a, b) < LATER for a, b in zip(got["gradients"], want["gradients"], strict=True))
    assert distance(got["moved"], want["moved"]) < MOVED
    assert sorted(got["own"]["tasks"] + other["own"]["tasks"]) == sorted(want["own"]["tasks"])
    assert got["metrics"] == pytest.approx(want["metrics"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("case", "strategy"), PAIRS)
def test_two_ranks_learn_what_one_process_does(case, strategy, two):
    assert_equal(one(case), *two(case, strategy))


def test_the_uneven_cases_are_uneven(two):
    slices = {case: [result["own"]["slices"] for result in two(case, "ddp")] for case in worker.EQUAL}
    assert slices["rank 1 has no rows"] == [[[1], [1]], [[0], [1]]]
    assert slices["rank 1 has no signal"] == [[[1], [1]], [[0], [1]]]
    assert slices["nobody has a signal"] == [[[0], [1]], [[0], [1]]]
    many, few = slices["other numbers of slices"]
    assert many[0][0] > few[0][0] > 0
    assert len(one("a loss that is not finite")["gradients"]) == 1
    assert one("further rounds")["metrics"]["dynamic_sampling/rounds"] > 1
    assert one("levels")["metrics"]["level/sort-numbers"] == 2
    assert one("sparse attention")["own"]["metrics"]["sparse_attention/recall"] < 0.9
    for strategy in worker.STRATEGIES:
        for straight, _ in two("resume sparse attention", strategy)[0].values():
            assert straight["metrics"]["sparse_attention/recall"] < 0.9
        for case in ("resume before ternary", "resume ternary"):
            for straight, _ in two(case, strategy)[0].values():
                assert straight["metrics"]["ternary/flips"] > 0


@pytest.mark.parametrize("case", [case for case, strategy in PAIRS if strategy == "fsdp2"])
def test_a_batch_gathers_each_sharded_model_once(case, two):
    """However many rounds and tokens are sampled: an all-gather for each of the four layers, and one for the rest."""
    for result in two(case, "fsdp2"):
        assert set(result["own"]["gathers"]) == {5 * result["models"]}
    assert not any(two(case, "ddp")[0]["own"]["gathers"])


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
@pytest.mark.parametrize("case", [case for case in worker.OTHERS if case.startswith("resume")])
def test_resume_is_exact_on_each_rank(case, strategy, two):
    for rank, result in enumerate(two(case, strategy)):
        for name, (straight, resumed) in result.items():
            assert torch.equal(straight["weights"], resumed["weights"]), name
            assert straight["own"]["tasks"] == resumed["own"]["tasks"], "the callback's state and the place in the data"
            assert straight["own"]["tokens"] == resumed["own"]["tokens"], "the engine's state"
            assert resumed["metrics"].items() <= straight["metrics"].items(), name
            if case != "resume chunks":  # whose further prompts are any rank's
                assert {int(task) % 2 for task in resumed["own"]["tasks"]} == {rank}


@pytest.mark.parametrize(("case", "strategy"), [("resume", "ddp"), ("resume", "fsdp2"), ("resume adapters", "fsdp2")])
def test_checkpoints_of_all_kinds_export_alone(case, strategy, two):
    results = two(case, strategy)[0]
    results.pop("from ddp", None)  # the same again
    for name, (straight, _) in results.items():
        export_checkpoint(two.folder / name / "step=4.ckpt", name)
        alone, exported = (worker.flat(GRPO(str(f)).model.parameters()) for f in (name, two.folder / name / "exported"))
        assert torch.equal(alone, exported)
        assert case != "resume" or torch.equal(alone, straight["weights"])


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_one_process_goes_on_where_two_ranks_stopped(strategy, two):
    straight, _ = two("resume", strategy)[0][f"resume {strategy} False"]
    fit = {"ckpt_path": two.folder / f"resume {strategy} False" / "step=2.ckpt"}
    with pytest.warns(UserWarning, match="the checkpoint is of 2 ranks, and this run has 1"):
        got = worker.learn(1, "", fit=fit, max_steps=4)
    assert distance(got["weights"] - (straight["weights"] - straight["moved"]), straight["moved"]) < MOVED


@pytest.mark.parametrize("strategy", worker.STRATEGIES)
def test_evaluation_counts_each_task_once(strategy, two):
    want, both = one("evaluate"), two("evaluate", strategy)
    for got in both:
        for a, b in zip(got["tables"], want["tables"], strict=True):
            assert a[-1].pop("pass_at") == pytest.approx(b[-1]["pass_at"])
            assert a[-1] == pytest.approx({name: value for name, value in b[-1].items() if name != "pass_at"})
            assert a[-1]["items"] == 5
    assert [len(got["predictions"]) for got in both] == [6, 4]
    key = lambda record: (record["task"], record["response"])  # noqa: E731
    assert sorted(map(key, both[0]["predictions"] + both[1]["predictions"])) == sorted(map(key, want["predictions"]))


def test_a_block_runs_on_one_rank_at_a_time(two):
    spans = sorted(span for rank in two("one at a time", "ddp") for span in rank)
    assert len(spans) == 20
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_other_strategies_are_refused(strategy):
    with pytest.raises(ValueError, match=f"{strategy.__name__} is not supported: set the Trainer's strategy to fsdp2"):
        sharding.refuse_unsupported(object.__new__(strategy), torch.nn.Linear(1, 1), adapters=False)


# ---------------------------------------------------------------- through the command line

BREAKS = '''
import os, signal, time
from lightning.pytorch import Callback
class Breaks(Callback):
    """In the second step one rank raises or is killed, and the other hangs."""
    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step < 1:
            return
        if trainer.global_rank != self.rank:
            time.sleep(3600)
        if self.how == "raise":
            raise RuntimeError(f"rank {self.rank} is broken")
        os.kill(os.getpid(), signal.SIGKILL)
'''
FIT = ["lit_rl", "fit", "--config", "sft", "--config", "tiny", "--trainer.max_steps", "3", "--run", "r"]
FIT += ["--trainer.val_check_interval", "null", "--trainer.enable_progress_bar", "false"]


def torchrun(*options):
    """The beginning of a command; without -- torchrun takes our --run for an option of its own."""
    return ["-m", "torch.distributed.run", *options, "-m", "--"]


def start(*argv):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path]), "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, *map(str, argv)]
    return subprocess.Popen(argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(*jobs):
    """What the jobs print, which ends when the last of their processes does."""
    try:
        return [job.communicate(timeout=LIMIT)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()


@pytest.mark.parametrize(
    ("launcher", "rank", "how", "message"),
    [
        ("lightning", 1, "raise", "RuntimeError: rank 1 is broken"),
        ("lightning", 0, "kill", ""),
        ("torchrun", 0, "kill", "SIGKILL"),
    ],
)
def test_a_rank_that_fails_ends_the_job(launcher, rank, how, message):
    Path("breaks.py").write_text(BREAKS)
    launch = torchrun("--nproc_per_node", 2, "--master_port", free_port()) if launcher == "torchrun" else ["-m"]
    which = ["--trainer.callbacks+=breaks.Breaks", "--trainer.callbacks.rank", rank, "--trainer.callbacks.how", how]
    job = start(*launch, *FIT, "--config", "ddp", "--trainer.devices", 2, *which)
    (text,) = end(job)
    assert job.returncode != 0, text
    assert message in text


def test_two_machines():
    """Two torchruns with an address each, as on two machines; the checkpoint exports and goes on in one process."""
    main = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", free_port())
    each = [torchrun(*main, "--node_rank", i, "--local_addr", f"127.0.0.{i + 1}") for i in range(2)]
    size = ["--config", "fsdp2", "--trainer.devices", 1, "--trainer.num_nodes", 2]
    jobs = [start(*launch, *FIT, *size, "--trainer.callbacks.every_n_train_steps", 1) for launch in each]
    texts = end(*jobs)
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(texts)
    assert [r["step"] for r in jsonl.read(Path("r/metrics.jsonl"))] == [0, 1, 2]
    export_checkpoint("r/checkpoints/last.ckpt", "exported")
