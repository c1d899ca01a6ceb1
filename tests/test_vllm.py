"""vLLM samples what we would, for as long as its weights are ours, and is no danger to the run when it fails.

The real vLLM on a CPU: `bash scripts/vllm.sh` installs it beside the environment of the other tests, and runs these.
"""

import copy
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest
import torch
import worker

from lit_rl import GRPO, VLLM, Actor, LoRA, RLCallback, Sampling, jsonl
from lit_rl.__main__ import main
from lit_rl.generation.vllm_engine import SyncError

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: bash scripts/vllm.sh")
SMALL = {"kv_cache_memory_bytes": 2**26, "enforce_eager": True}
PROMPTS = [[10, 20, 30, 40], [11, 21, 31], [50] * 20]


@pytest.fixture(autouse=True)
def one_engine_at_a_time(monkeypatch):
    running, start = [], VLLM._start
    monkeypatch.setattr(VLLM, "_start", lambda self: (running.append(self), start(self))[1])
    yield
    for engine in running:
        engine.stop()


def engine(**settings):
    return VLLM(max_model_len=256, options=SMALL, **settings)


def tiny(generator, name="tiny", tied=False, **settings):
    torch.manual_seed(0)
    actor = Actor(name, generator=generator, **settings)
    if tied:
        actor.model.config.tie_word_embeddings = True
        actor.model.lm_head.weight = actor.model.model.embed_tokens.weight
    return actor


def learn(model):
    """Other weights, as far away as in no single step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if parameter.any() else 0.05


def gap(actor, completions, sampling):
    """Largest difference between the engine's log-probabilities and those of a full forward."""
    worst = 0.0
    for prompt, row in zip(PROMPTS, completions, strict=True):
        for c in row:
            ids = torch.tensor([prompt + c.tokens.tolist()])
            with torch.no_grad():
                logits = actor.model(ids).logits[0, len(prompt) - 1 : -1] / (sampling.temperature or 1)
            own = logits.log_softmax(-1).gather(1, c.tokens[:, None])[:, 0]
            worst = max(worst, float((own - c.logps).abs().max()))
    return worst


def seeds():
    number = count(2**62)
    return [[next(number) for _ in range(4)] for _ in PROMPTS]


@needs_vllm
@pytest.mark.parametrize(
    "settings",
    [{}, {"tied": True}, {"name": "tiny-qwen3"}, {"lora": LoRA(rank=4)}, {"lora": LoRA(rank=4, quantize="nf4")}],
    ids=["llama", "tied", "qwen3", "lora", "qlora"],
)
def test_log_probabilities_are_ours_after_each_sync(settings):
    if settings.get("lora"):
        pytest.importorskip("peft")
        pytest.importorskip("bitsandbytes")
    generator = engine()
    actor = tiny(generator, **settings)
    before = []
    for _ in range(3):
        generator.sync(actor.model)
        for sampling in (Sampling(16), Sampling(16, temperature=0.7), Sampling(16, temperature=0)):
            completions = generator.generate(PROMPTS, seeds(), sampling)
            assert gap(actor, completions, sampling) < 1e-4, sampling
        assert generator.numbers["sampler/probe"] < 1e-5
        assert completions[0][0].tokens.tolist() not in before
        before.append(completions[0][0].tokens.tolist())
        learn(actor.model)
    assert gap(actor, completions, sampling) > 1e-2  # the check can fail


@needs_vllm
def test_completions_are_a_function_of_prompt_and_seed():
    generator = engine()
    actor = tiny(generator)
    generator.sync(actor.model)
    random = torch.get_rng_state()
    sampling, given = Sampling(24), seeds()
    together = generator.generate(PROMPTS, given, sampling)
    assert torch.equal(random, torch.get_rng_state())
    (alone,) = generator.generate(PROMPTS[1:2], [given[1][::-1]], sampling)
    assert [c.tokens.tolist() for c in alone[::-1]] == [c.tokens.tolist() for c in together[1]]
    assert len({tuple(c.tokens.tolist()) for c in together[0]}) == 4
    actor.model.lm_head.weight.data[actor.eos[0]] += 0.2  # now some end by themselves
    generator.sync(actor.model)
    found = [c for row in generator.generate(PROMPTS, given, Sampling(200)) for c in row]
    assert all((c.finish == "stop") == (int(c.tokens[-1]) in actor.eos) for c in found)
    assert {c.finish for c in found} == {"stop", "length"}


@needs_vllm
def test_stop_strings_end_with_the_token_that_completes_them():
    generator = engine()
    actor = tiny(generator)
    generator.sync(actor.model)
    free = [row[0].tokens.tolist() for row in generator.generate(PROMPTS, seeds(), Sampling(32))]

    def until(tokens, string, start=1):
        return next(tokens[:n] for n in range(start, 33) if string in actor.decode(tokens[:n]))

    string = actor.decode(free[0][4:6])
    (first, *_), *_ = generator.generate(PROMPTS, seeds(), Sampling(32, stop=[string]))
    assert first.tokens.tolist() == until(free[0], string)
    assert first.text.endswith(string)
    assert first.finish == "stop"

    begun = [[tokens[:6], [], [], []] for tokens in free]
    rest = generator.generate(PROMPTS, seeds(), Sampling(26), begun=begun)[0][0].tokens.tolist()
    string = actor.decode([free[0][5], rest[0]])  # half of it is there
    (across, *_), *_ = generator.generate(PROMPTS, seeds(), Sampling(26, stop=[string]), begun=begun)
    assert across.tokens.tolist() == until(free[0][:6] + rest, string, 7)[6:]
    assert across.finish == "stop"


@needs_vllm
def test_what_it_cannot_do_is_refused():
    generator = engine()
    actor = tiny(generator)
    with pytest.raises(RuntimeError, match="sync"):
        generator.generate(PROMPTS, seeds(), Sampling(8))
    generator.sync(actor.model)
    with pytest.raises(ValueError, match="max_model_len is 256: raise it"):
        generator.generate(PROMPTS, seeds(), Sampling(250))
    cut = generator.generate(PROMPTS, seeds(), Sampling(8, top_k=5))
    assert all(c.log_kept.isnan().all() for row in cut for c in row)
    with pytest.raises(ValueError, match=r"top_k.*leave the generator out"):
        GRPO("tiny", generator=engine(), sampling=Sampling(8, top_k=5))


@needs_vllm
def test_weights_that_do_not_arrive_are_an_error(monkeypatch):
    generator = engine()
    actor = tiny(generator)
    generator.sync(actor.model)
    started = generator._llm
    send = type(started).collective_rpc
    lost = lambda self, method, *args, **kwargs: method == "reload_weights" or send(self, method, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(type(started), "collective_rpc", lost)
    learn(actor.model)
    with pytest.raises(SyncError, match=r"is -\d.* there and -\d.* here, .* apart .* where 0.001 is tolerated"):
        generator.sync(actor.model)
    with pytest.raises(SyncError):  # and remains one
        generator.generate(PROMPTS, seeds(), Sampling(8))


@needs_vllm
def test_a_crash_costs_time_alone(monkeypatch):
    generator = engine()
    actor = tiny(generator)
    generator.sync(actor.model)
    learn(actor.model)
    generator.sync(actor.model)
    want = generator.generate(PROMPTS, seeds(), Sampling(24))

    from vllm.v1.executor.uniproc_executor import UniProcExecutor as Executor

    steps, step = count(), Executor.execute_model

    def failing(self, *args, **kwargs):
        if next(steps) == 5:
            raise RuntimeError("CUDA error: an illegal memory access")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Executor, "execute_model", failing)
    with pytest.warns(UserWarning, match="illegal memory.*started again.*1 of at most 2 times"):
        got = generator.generate(PROMPTS, seeds(), Sampling(24))
    assert [[c.tokens.tolist() for c in row] for row in got] == [[c.tokens.tolist() for c in row] for row in want]
    assert generator.numbers["sampler/restarts"] == 1

    monkeypatch.setattr(Executor, "execute_model", lambda *args, **kwargs: 1 / 0)
    generator.retries = 1
    with pytest.raises(RuntimeError, match=r"failed 2 times in a row.*division by zero"):
        generator.generate(PROMPTS, seeds(), Sampling(24))


class Losses(RLCallback):
    def __init__(self):
        self.seen = []

    def on_loss(self, trainer, module, x, terms):
        self.seen.append((x, terms.loss.detach()))


@needs_vllm
def test_tis_weighs_each_token_by_what_the_engine_got_wrong():
    """The engine computes in bfloat16 and training in float32: min(exp(ours - the engine's), cap)."""
    cap, said, losses = 1.001, {}, Losses()
    generator = engine(dtype="bfloat16")
    sample = generator.generate

    def recorded(prompts, *args):
        rows = sample(prompts, *args)
        said.update({(*p, *c.tokens.tolist()): c.logps for p, row in zip(prompts, rows, strict=True) for c in row})
        return rows

    generator.generate = recorded
    policy = GRPO("tiny", generator=generator, tis_cap=cap, kl_coef=0.0, group=4, sampling=Sampling(24))
    before = copy.deepcopy(policy.model)
    worker.trainer(1, "", callbacks=[losses], max_steps=1).fit(policy, worker.Letters(1))
    weights = []
    for x, loss in losses.seen:
        for n in range(len(x)):
            start, end = x.starts[n], x.lengths[n]
            ids = x.tokens[n, :end]
            with torch.no_grad():
                logits = before(ids[None]).logits[0, start - 1 : -1]
            ours = logits.log_softmax(-1).gather(1, ids[start:, None])[:, 0]
            weight = (ours - said[tuple(ids.tolist())]).exp().clamp(max=cap)
            torch.testing.assert_close(loss[n, start:end], -x.advantages[n, start:end] * weight, atol=1e-5, rtol=1e-5)
            weights.append(weight)
    weights = torch.cat(weights)
    assert 0.1 < (weights == cap).float().mean() < 0.9  # the check can fail, by the cap and by the weights
    assert weights.std() > 1e-3


RECIPES = ["--config", "grpo", "--config", "vllm", "--config", "tiny"]
SETTINGS = {
    "model.generator.max_model_len": 256,
    "model.generator.options.kv_cache_memory_bytes": 2**26,
    "trainer.enable_progress_bar": False,
    "trainer.callbacks.every_n_train_steps": 1,
}


def fit(**settings):
    main(["fit", *RECIPES, *(f"--{name}={value}" for name, value in (SETTINGS | settings).items())])


@needs_vllm
def test_a_run_of_the_command_line_learns_and_resumes():
    fit(run="straight", **{"trainer.max_steps": 20})
    steps = [line for line in jsonl.read(Path("straight/metrics.jsonl")) if "loss" in line]
    assert max(line["mismatch/max"] for line in steps) < 1e-4
    assert max(line["mismatch/kl"] for line in steps) < 1e-8
    assert max(line["sampler/probe"] for line in steps) < 1e-5
    rewards = [line["reward"] for line in steps]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1

    fit(run="stopped", **{"trainer.max_steps": 3})
    fit(run="stopped", ckpt_path="last", **{"trainer.max_steps": 5})
    again = [line for line in jsonl.read(Path("stopped/metrics.jsonl")) if "loss" in line]
    assert [line["reward"] for line in again] == [line["reward"] for line in steps[:5]]
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in steps[:5]], abs=1e-6)


def test_what_to_install_is_said(monkeypatch, capsys):
    monkeypatch.setattr("lit_rl.generation.vllm.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "grpo", "--config", "tiny", "--model.generator", "VLLM", "--run", "r"])
    assert "pip install 'lit-rl[vllm]'" in str(stop.value)
