"""A GPU does what a CPU does: it learns the same, resumes bit for bit, samples what it trains on. Skipped without one.

`deterministic` is what exact bits need there, since PyTorch's attention adds up gradients in any order otherwise.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what `deterministic` sets; CUDA reads it once a process

import pytest
import test_resume
import torch
from checks import gpu
from test_cli import RECIPES, fit
from test_resume import CHUNKS, INNER, METHODS, Saves, policy, resumed, same

from lit_rl import GRPO, RLCCF, Sampling, jsonl
from lit_rl.experience import build
from lit_rl.generation.sampling import draw, uniforms

pytestmark = gpu
ON_GPU = dict(accelerator="gpu", deterministic=True)
PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "bf16-true"]
SPARSE = "{kernel_size: 4, kernel_stride: 2, block_size: 4, init_blocks: 0, window_size: 4, topk: 2, dense_len: -1}"
FURTHER = {
    "sparse attention": ("--trainer.callbacks+=SparseAttention", "--trainer.callbacks.settings", SPARSE),
    "dropped prompts": ("--model.microbatch_tokens", 300, "--model.minibatches", 2, "--model.kl_coef", 0.1),
    "truncation": ("--model.sampling.top_p", 0.9, "--model.sampling.top_k", 40, "--model.sampling.min_p", 0.01),
    "Qwen3": ("--model.model", "tiny-qwen3"),
    "Gemma 2": ("--model.model", "tiny-gemma2"),
    "checkpointed": ("--model.gradient_checkpointing", "true"),
}
RUNS = {"-".join(names): (names, ()) for names in RECIPES} | {name: (["grpo"], more) for name, more in FURTHER.items()}


@pytest.fixture(autouse=True)
def not_deterministic_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


def run(capsys, recipes, folder, accelerator, *more, steps=1):
    """The metrics of each step, by name."""
    words = [word for name in (*recipes, "tiny") for word in ("--config", name)]
    flags = ("--trainer.max_steps", steps, "--trainer.accelerator", accelerator, "--trainer.limit_val_batches", 1)
    fit(capsys, *words, *flags, *more, "--run", folder)
    rows = jsonl.read(Path(folder, "metrics.jsonl"))
    timed = ("seconds/", "tokens_per_second")
    return [{k: v for k, v in r.items() if not any(t in k for t in timed)} for r in rows if "loss" in r]


def on_a_gpu(file):
    """The weights of a checkpoint, which are where they were when it was saved."""
    state = torch.load(file, weights_only=True)["state_dict"]
    assert all(value.is_cuda for value in state.values())
    return state


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_as_on_a_cpu(name, capsys):
    """In float32 the first step samples the same responses, from which the same loss and gradient follow."""
    recipes, more = RUNS[name]
    want, got = (run(capsys, recipes, device, device, *more) for device in ("cpu", "gpu"))
    texts = [Path(device, "completions.jsonl") for device in ("cpu", "gpu")]
    if texts[0].exists():
        a, b = ([r["response"] for r in jsonl.read(text)] for text in texts)
        assert a == b
    assert got[0] == pytest.approx(want[0], rel=2e-3, abs=2e-4)
    if "fsdp2" not in recipes:  # which gathers its shards on the CPU
        assert on_a_gpu("gpu/checkpoints/last.ckpt")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns_and_resumes(precision, capsys):
    more = ("--trainer.precision", precision, "--trainer.deterministic", "true")
    more += ("--trainer.callbacks.every_n_train_steps", 1, "--model.minibatches", 2)
    straight = run(capsys, ["grpo"], "straight", "gpu", *more, steps=4)
    run(capsys, ["grpo"], "stopped", "gpu", *more, steps=2)
    stopped = run(capsys, ["grpo"], "stopped", "gpu", *more, "--ckpt_path", "last", steps=4)
    assert stopped == straight
    a, b = (on_a_gpu(f"{folder}/checkpoints/last.ckpt") for folder in ("straight", "stopped"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert Path("straight/completions.jsonl").read_text() == Path("stopped/completions.jsonl").read_text()
    assert all(0.9 < row["ratio/p50"] < 1.1 for row in straight if "ratio/p50" in row)
    assert all(row["grad_norm"] > 0 for row in straight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_exactly(name, precision):
    """With every callback, the inner loop and a batch that dynamic sampling fills."""
    on, saves = ON_GPU | dict(adaptive=False, precision=precision), Saves({"batch_end"})
    straight = test_resume.fit(policy(METHODS[name], **INNER[1]), "straight", callbacks=[saves], **on)
    file = saves.files[2, "batch_end"]
    assert on_a_gpu(file)
    assert same(resumed(METHODS[name], file, INNER[1], **on), straight)


@pytest.mark.parametrize("how", CHUNKS)
def test_unfinished_responses_are_in_the_checkpoint(how):
    settings = dict(chunk=1, sampling=Sampling(max_new_tokens=6, stop=list("aeiouAEIOU .,"))) | CHUNKS[how]
    saves = Saves({"batch_end"})
    straight = test_resume.fit(policy(GRPO, **settings), "straight", callbacks=[saves], **ON_GPU)
    assert same(resumed(GRPO, saves.files[2, "batch_end"], settings, **ON_GPU), straight)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sampling_ahead_on_a_named_device_is_sampling_on_a_thread(precision):
    on = ON_GPU | dict(precision=precision)
    a, b = (test_resume.fit(policy(GRPO, ahead=where), where, **on) for where in ("thread", "cuda:0"))
    assert same(a, b)


@pytest.mark.parametrize(("trains", "samples"), [("cpu", "cuda:0"), ("gpu", "cpu")])
def test_sampling_ahead_on_another_device(trains, samples):
    norms = []
    for ahead in (samples, "thread"):
        found = test_resume.fit(policy(GRPO, ahead=ahead), ahead, accelerator=trains)
        rows = map(json.loads, found["metrics"].split("\n"))
        norms.append([row["grad_norm"] for row in rows if "loss" in row])
    assert norms[0][:2] == pytest.approx(norms[1][:2], rel=2e-2)
    assert len(norms[0]) == test_resume.STEPS


def test_members_on_devices_of_their_own_sample_at_the_same_time():
    def group(devices):
        return RLCCF([policy(GRPO, 10 * i, dynamic_sampling=False) for i in range(2)], devices=devices)

    on = ON_GPU | dict(adaptive=False)
    assert same(
        test_resume.fit(group(["cuda:0", "cuda:0"]), "threads", **on), test_resume.fit(group(None), "turns", **on)
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_group_of_one(strategy, capsys):
    want, got = (
        run(capsys, ["grpo"], name, "gpu", "--trainer.strategy", name, "--trainer.devices", 1, steps=2)
        for name in ("auto", strategy)
    )
    assert got[0] == pytest.approx(want[0], rel=2e-3, abs=2e-4)
    assert len(got) == 2


PROMPTS = [[5, 9, 40], [12] * 7, [33, 20, 50, 61, 8], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50]]
NEAR = {"float32": (1e-4, 1e-5), "autocast": (0.3, 0.02), "bfloat16": (0.3, 0.02)}
"""Largest and mean difference of log-probabilities."""


@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize("model", ["tiny", "tiny-qwen3", "tiny-gemma2"])
def test_what_is_sampled_has_the_log_probabilities_of_the_training_forward(model, kind):
    torch.manual_seed(0)
    module = GRPO(model, sampling=Sampling(max_new_tokens=40, temperature=0.8, top_k=50), dtype="float32").to("cuda")
    if kind == "bfloat16":
        module.bfloat16()
    with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"), torch.no_grad():
        seeds = [[10 * i + j for j in range(5)] for i in range(len(PROMPTS))]
        groups = module.generate(module.sampling, PROMPTS, seeds)
        rows = [(prompt, c) for prompt, group in zip(PROMPTS, groups, strict=True) for c in group]
        index = [i for i in range(len(PROMPTS)) for _ in range(5)]
        x = build([prompt for prompt, _ in rows], [c.tokens.tolist() for _, c in rows], index, [])
        logps, _ = module.token_terms(x.to("cuda"), module.temperature)
    gap = (logps.cpu()[x.mask] - torch.cat([c.logps + c.log_kept for _, c in rows])).abs()
    assert float(gap.max()) < NEAR[kind][0]
    assert float(gap.mean()) < NEAR[kind][1]


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen3", "tiny-gemma2"])
def test_greedy_is_that_of_transformers(model):
    torch.manual_seed(0)
    module = GRPO(model, sampling=Sampling(max_new_tokens=30, temperature=0.0)).to("cuda")
    groups = module.generate(module.sampling, PROMPTS, [[0]] * len(PROMPTS))
    for prompt, (ours,) in zip(PROMPTS, groups, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            out = module.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
        assert ours.tokens.tolist() == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("cut", [dict(), dict(top_p=0.9), dict(top_k=50, top_p=0.95), dict(min_p=0.02)])
def test_draws_are_those_of_a_cpu(cut, deterministic):
    """For a vocabulary of fifty thousand; a uniform number at the border of two tokens may fall to either."""
    torch.manual_seed(0)
    logits, sampling = torch.randn(64, 50_000) * 4, Sampling(temperature=0.9, **cut)
    noise = uniforms(list(range(64)), 1)[0]
    want = draw(logits, noise, sampling)
    torch.use_deterministic_algorithms(deterministic)
    got = [x.cpu() for x in draw(logits.cuda(), noise.cuda(), sampling)]
    alike = got[0] == want[0]
    assert float(alike.float().mean()) > 0.95
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a[alike], b[alike], rtol=1e-4, atol=1e-4)
