"""Decoding by a CUDA graph: its buffers, masks and rows on any device, and the graph itself where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from test_native import CONFIGS, PROMPTS, SEEDS, build, generator, reference, sample, tokens

from lit_rl.generation import recorded
from lit_rl.generation.base import Sampling
from lit_rl.generation.rows import Rows


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All that a graph needs but the graph: steps read and write the same tensors. The rooms of the buffers in turn."""
    monkeypatch.setattr(recorded, "recordable", lambda model, steps: True)
    monkeypatch.setattr(recorded, "record", lambda function: lambda: function())
    monkeypatch.setattr(recorded, "ROOM", 8)
    monkeypatch.setattr(recorded, "UNIT", 4)
    rooms, lay_out = [], recorded.Recorded._lay_out

    def spy(rows: recorded.Recorded, layers: Any) -> None:
        lay_out(rows, layers)
        rooms.append(rows.room)

    monkeypatch.setattr(recorded.Recorded, "_lay_out", spy)
    return rooms


@pytest.mark.parametrize("name", ["llama", "qwen2 tied", "qwen3", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(name: str, laid_out: list[int]) -> None:
    model = build(CONFIGS[name])
    expected = [reference(model, prompt, 30) for prompt in PROMPTS]
    for options in ({}, {"max_rows": 2}):
        out = sample(model, PROMPTS, SEEDS, options=options, max_new_tokens=30, temperature=0)
        assert tokens(out) == [[row] * len(seeds) for row, seeds in zip(expected, SEEDS, strict=True)]
    assert len(set(laid_out)) > 1  # buffers did grow

    eos = (expected[1][4], expected[3][9])  # rows end at different steps
    out = sample(model, PROMPTS, SEEDS, eos, max_new_tokens=30, temperature=0)
    for row, completions in zip(expected, out, strict=True):
        end = next((t + 1 for t, token in enumerate(row) if token in eos), 30)
        assert all(completion.tokens.tolist() == row[:end] for completion in completions)


def test_samples_are_those_of_other_ways(laid_out: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end are left where they are until half have ended, then all move."""
    model, settings = build(CONFIGS["llama"], scale=2.0), {"max_new_tokens": 40, "top_p": 0.95}
    got = sample(model, PROMPTS, SEEDS, (3, 4), **settings)
    assert len({len(completion.tokens) for row in got for completion in row}) > 2
    monkeypatch.setattr(recorded, "recordable", lambda model, steps: False)
    want = sample(model, PROMPTS, SEEDS, (3, 4), **settings)
    assert tokens(got) == tokens(want)
    for a, b in zip(chain(*got), chain(*want), strict=True):
        torch.testing.assert_close(a.logps, b.logps, atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:decoding without a CUDA graph")
@pytest.mark.parametrize("failure", ["cannot be recorded", "does nothing", "gives other numbers"])
def test_a_graph_that_fails_is_not_used(failure: str, laid_out: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["llama"])
    rows: list[recorded.Recorded] = []

    def wrong() -> None:
        if failure == "gives other numbers":
            rows[-1]._advance()
            rows[-1].logits = rows[-1].logits.flip(-1)
        else:
            rows[-1].logits = torch.zeros_like(rows[-1].logits)

    def record(function: Any) -> Callable[[], object] | None:
        rows.append(function.__self__)
        return None if failure == "cannot be recorded" else wrong

    monkeypatch.setattr(recorded, "record", record)
    out = sample(model, PROMPTS[:2], [[1], [2]], max_new_tokens=30, temperature=0)
    assert tokens(out) == [[reference(model, prompt, 30)] for prompt in PROMPTS[:2]]
    assert rows


def test_a_window_or_a_sparse_attention_is_not_recorded(laid_out: list[int]) -> None:
    for name in ("mistral window", "mamba"):
        model = build(CONFIGS[name])
        out = sample(model, PROMPTS[:2], [[1], [2]], max_new_tokens=12, temperature=0)
        assert tokens(out) == [[reference(model, prompt, 12)] for prompt in PROMPTS[:2]]
    assert not laid_out


def test_a_cpu_does_not_record() -> None:
    assert not recorded.recordable(build(CONFIGS["llama"]), 100)


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_graph(name: str, dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are those of the same steps without a graph, after growth and with rows that end, and weights are those of the
    moment."""
    model = build(CONFIGS[name], scale=2.0).to(gpu, dtype)
    monkeypatch.setattr(recorded, "ROOM", 8)
    record, replays = recorded.record, []

    def spy(function: Callable[[], object]) -> Callable[[], object] | None:
        replays.append(record(function))
        return replays[-1]

    def both() -> tuple[Any, Any]:
        found = []
        for way in (spy, lambda function: None):
            monkeypatch.setattr(recorded, "record", way)
            found.append(sample(model, PROMPTS, SEEDS, (3, 4), max_new_tokens=60))
        return tuple(found)  # type: ignore[return-value]

    for _ in range(2):
        got, want = both()
        assert tokens(got) == tokens(want)
        for a, b in zip(chain(*got), chain(*want), strict=True):
            assert torch.equal(a.logps, b.logps)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))
    assert replays
    assert None not in replays


def test_what_cannot_be_recorded_runs_all_the_same(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS["llama"], scale=2.0).to(gpu)
    want = sample(model, PROMPTS, SEEDS, max_new_tokens=20)
    decode = Rows._decode

    def asks(rows: Rows, ids: Any, *args: Any) -> Any:
        logits = decode(rows, ids, *args)
        assert float(logits.sum()) != 0
        return logits

    monkeypatch.setattr(Rows, "_decode", asks)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        got = generator(model).generate(PROMPTS, SEEDS, Sampling(max_new_tokens=20))
    assert tokens(got) == tokens(want)
    assert torch.ones(2, device=gpu).sum() == 2  # the device is as it was
