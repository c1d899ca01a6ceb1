"""The native generator against transformers: the same greedy tokens, the same distributions, and no needless work."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_rl.generation import caches, sampling
from lit_rl.generation.base import Completion, Sampling, later_seed
from lit_rl.generation.native import NativeGenerator
from lit_rl.generation.rows import Cache, DynamicCache, Rows, _similar
from lit_rl.generation.sampling import draw, uniforms

V = 64
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "eos_token_id": None,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral window": MistralConfig(**SIZES, sliding_window=6),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(**GPT2),
    "mamba": MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None),
}
KINDS = {"gemma2": Cache, "mamba": DynamicCache}  # the others share prompts
PROMPTS = [[5, 6, 7], list(range(11, 20)), [21], list(range(31, 43)), [5, 6, 7], [51, 52, 53]]
SEEDS = [[1], [2, 3], [4], [5, 6, 7], [8, 9], []]


def build(config: Any, scale: float = 4.0) -> Any:
    """A random model whose next-token distribution is far from flat."""
    torch.manual_seed(0)
    model = Auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def letters(ids: list[int]) -> str:
    return "".join(chr(48 + i) for i in ids)


def generator(model: Any, eos: tuple[int, ...] = (), **options: Any) -> NativeGenerator:
    out = NativeGenerator(eos, 0, letters, **options)
    out.sync(model)
    return out


def sample(
    model: Any, prompts: Any, seeds: Any, eos: tuple[int, ...] = (), options: Any = None, **sampling: Any
) -> Any:
    return generator(model, eos, **(options or {})).generate(prompts, seeds, Sampling(**sampling))


def tokens(completions: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens.tolist() for completion in row] for row in completions]


def reference(model: Any, prompt: list[int], length: int) -> list[int]:
    """What transformers' greedy decoding says, one prompt at a time."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def processed(logits: Tensor, sampling: Sampling) -> Tensor:
    """(N, V) logits as transformers' own processors leave them; -inf is cut."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(CONFIGS["llama"], scale=2.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = build(CONFIGS[name]), []
    step = Rows.step

    def spy(rows: Rows, x: Tensor) -> None:
        found.append(type(rows.cache))
        step(rows, x)

    monkeypatch.setattr(Rows, "step", spy)
    expected = [reference(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == 5  # only the prompt that comes twice may repeat
    for options in ({}, {"max_rows": 2}, {"share": False}):
        found.clear()
        out = sample(model, PROMPTS, SEEDS, options=options, max_new_tokens=20, temperature=0)
        assert tokens(out) == [[row] * len(seeds) for row, seeds in zip(expected, SEEDS, strict=True)]
        kind = KINDS.get(name, caches.SharedCache if options.get("share", True) else Cache)
        assert set(found) == {kind}

    eos = (expected[1][4], expected[3][9])  # rows end at different steps
    out = sample(model, PROMPTS, SEEDS, eos, max_new_tokens=20, temperature=0)
    for row, completions in zip(expected, out, strict=True):
        end = next((t + 1 for t, token in enumerate(row) if token in eos), 20)
        for completion in completions:
            assert completion.tokens.tolist() == row[:end]
            assert completion.finish == ("stop" if row[end - 1] in eos else "length")


def test_window_between_prompt_and_completion() -> None:
    """Prompts shorter than, equal to and longer than the window, decoded to its other side."""
    model = build(CONFIGS["mistral window"])
    prompts = [list(range(3, 3 + n)) for n in (1, 5, 6, 7, 30)]
    out = sample(model, prompts, [[0]] * 5, max_new_tokens=40, temperature=0)
    assert tokens(out) == [[reference(model, prompt, 40)] for prompt in prompts]


@pytest.mark.parametrize("share", [True, False])
def test_samples_do_not_depend_on_the_batch(llama: Any, share: bool) -> None:
    settings = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 0.95}
    run = lambda p, s, **options: sample(llama, p, s, (3, 4), options={"share": share, **options}, **settings)  # noqa: E731
    whole = run(PROMPTS, SEEDS)
    lengths = {len(completion.tokens) for row in whole for completion in row}
    assert len(lengths) > 2  # so rows did leave the batch
    for rows in (1, 2, 3):
        assert tokens(run(PROMPTS, SEEDS, max_rows=rows)) == tokens(whole)
    assert tokens(run(PROMPTS[::-1], SEEDS[::-1])) == tokens(whole)[::-1]
    for prompt, seeds, row in zip(PROMPTS, SEEDS, whole, strict=True):
        for seed, completion in zip(seeds, row, strict=True):
            alone = run([prompt], [[seed]])[0][0]
            assert alone.tokens.tolist() == completion.tokens.tolist()
            torch.testing.assert_close(alone.logps, completion.logps, atol=2e-6, rtol=0)
    assert tokens(run(PROMPTS[:1], [[2, 1]])) != tokens(run(PROMPTS[:1], [[3, 1]]))
    assert tokens(run(PROMPTS[:1], [[2, 1]]))[0][1] == tokens(whole)[0][0]


TRUNCATIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("cut", TRUNCATIONS, ids=str)
def test_logps_are_those_of_a_full_forward(llama: Any, temperature: float, cut: dict[str, Any]) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, **cut)
    out = generator(llama).generate(PROMPTS, SEEDS, sampling)
    for prompt, row in zip(PROMPTS, out, strict=True):
        for x in row:
            with torch.no_grad():
                logits = llama(torch.tensor([prompt + x.tokens.tolist()])).logits[0, len(prompt) - 1 : -1].float()
            at = lambda logps, x=x: logps.gather(1, x.tokens[:, None])[:, 0]  # noqa: E731
            kept = processed(logits, sampling)
            torch.testing.assert_close(x.logps, at(kept.log_softmax(-1)), atol=1e-5, rtol=0)
            plain = (logits / temperature).log_softmax(-1)
            torch.testing.assert_close(x.logps + x.log_kept, at(plain), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                x.log_kept, plain.masked_fill(kept.isinf(), -math.inf).logsumexp(-1), atol=1e-5, rtol=0
            )
            if not cut:
                assert x.log_kept.eq(0).all()
            assert x.tokens.dtype == torch.int64
            assert x.logps.dtype == x.log_kept.dtype == torch.float32


def test_greedy_logps_are_of_the_plain_softmax(llama: Any) -> None:
    x = sample(llama, [[5, 6]], [[0]], max_new_tokens=8, temperature=0)[0][0]
    with torch.no_grad():
        logits = llama(torch.tensor([[5, 6, *x.tokens.tolist()]])).logits[0, 1:-1]
    torch.testing.assert_close(x.logps, logits.log_softmax(-1).max(-1).values, atol=1e-5, rtol=0)
    assert x.log_kept.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = build(CONFIGS["qwen2"]).to(dtype)
    out = sample(model, PROMPTS, SEEDS, (3,), max_new_tokens=12, top_p=0.9)
    for prompt, row in zip(PROMPTS, out, strict=True):
        for x in row:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + x.tokens.tolist()])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1).gather(1, x.tokens[:, None])[:, 0]
            torch.testing.assert_close(x.logps + x.log_kept, expected, atol=0.15, rtol=0.02)
            assert x.logps.dtype == torch.float32


@pytest.mark.parametrize("cut", TRUNCATIONS, ids=str)
def test_frequencies_follow_the_distribution(cut: dict[str, Any]) -> None:
    """Chi-square over 20,000 draws of one distribution with 24 tokens, and no token outside the kept set."""
    count, sampling = 20_000, Sampling(temperature=0.9, **cut)
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(3)) * 1.5
    probs = processed(logits, sampling).softmax(-1)[0]
    token, logp, _ = draw(logits.expand(count, -1), uniforms(range(count), 1)[0], sampling)
    seen = token.bincount(minlength=24)
    assert seen[probs == 0].sum() == 0
    torch.testing.assert_close(logp, probs[token].log(), atol=1e-5, rtol=0)
    kept = probs > 0
    chi2 = ((seen - count * probs)[kept] ** 2 / (count * probs[kept])).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom) + 4  # beyond the 0.999 quantile


def test_frequencies_of_completions(llama: Any) -> None:
    """The second token too: through cache, seeds and slots."""
    count = 2000
    out = sample(llama, [[5, 6, 7]], [range(count)], options={"max_rows": 500}, max_new_tokens=2, top_k=3)[0]
    with torch.no_grad():
        first = processed(llama(torch.tensor([[5, 6, 7]])).logits[:, -1], Sampling(top_k=3)).softmax(-1)[0]
        expected = torch.zeros(V, V)
        for i in first.nonzero()[:, 0].tolist():
            logits = llama(torch.tensor([[5, 6, 7, i]])).logits[:, -1]
            expected[i] = first[i] * processed(logits, Sampling(top_k=3)).softmax(-1)[0]
    seen = torch.zeros(V, V)
    for x in out:
        seen[x.tokens[0], x.tokens[1]] += 1
    kept = expected > 0
    assert seen[~kept].sum() == 0
    chi2 = ((seen - count * expected)[kept] ** 2 / (count * expected[kept])).sum().item()
    assert chi2 < 8 + 4 * math.sqrt(16) + 4


@pytest.fixture(params=["sums of floats", "sums of whole numbers"])
def counting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(sampling, "COUNTING", ("cpu",) if "whole" in request.param else ())


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("seed", range(2))
def test_kept_sets_are_those_of_transformers(seed: int) -> None:
    """A fine comb of uniforms reaches every kept token of some probability, and none else."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)) * 2
    comb = ((torch.arange(6_000) + 0.5) / 6_000).float()
    for t, k, p, m in itertools.product((0.5, 1.0, 1.5), (0, 1, 10, 100), (0.3, 0.9, 1.0), (0.0, 0.05, 0.9)):
        sampling = Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
        token, _, log_kept = draw(logits.expand(len(comb), -1), comb, sampling)
        probs = processed(logits, Sampling(temperature=t, top_k=min(k, 40), top_p=p, min_p=m)).softmax(-1)[0]
        assert set(token.tolist()) <= set(probs.nonzero()[:, 0].tolist())
        assert set(token.tolist()) >= set((probs > 5e-4).nonzero()[:, 0].tolist())
        full = (logits / t).softmax(-1)[0]
        torch.testing.assert_close(log_kept[0].exp(), full[probs > 0].sum(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.05}], ids=str)
def test_large_vocabularies_are_drawn_from_in_parts(cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniform = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)), torch.linspace(0.05, 0.95, 7)
    together = draw(logits, uniform, Sampling(**cut))
    monkeypatch.setattr(sampling, "PART", 100)  # two rows
    for whole, parts in zip(together, draw(logits, uniform, Sampling(**cut)), strict=True):
        assert torch.equal(parts, whole)


def test_uniforms_are_a_function_of_the_seed() -> None:
    wide, narrow = uniforms([7, 2**64 - 1, 0], 600), uniforms([2**64 - 1], 9)
    assert torch.equal(wide[:9, 1], narrow[:, 0])
    assert wide.dtype == torch.float32
    assert (wide.double() * 2**24 % 2 == 1).all()  # so neither 0 nor 1
    assert wide.min() < 0.01
    assert 0.99 < wide.max() < 1
    assert len(wide.unique()) > 1750


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("uniform", [2.0**-24, 1 - 2.0**-24])
def test_no_draw_falls_outside_the_support(uniform: float) -> None:
    """At both ends of (0, 1), whatever the rounding of the mass, the token has a probability above 0."""
    logits = torch.randn(500, 333, generator=torch.Generator().manual_seed(0)) * 5
    logits[:, [0, 1, 331, 332]] = -math.inf
    for cut in TRUNCATIONS:
        token, logp, _ = draw(logits, torch.full((500,), uniform), Sampling(**cut))
        assert logits.gather(1, token[:, None]).isfinite().all()
        assert logp.isfinite().all()
    token, _, _ = draw(torch.tensor([[0.0, -200.0, -200.0]]), torch.tensor([uniform]), Sampling())
    assert token.item() == 0


def test_stop_strings_span_tokens(llama: Any) -> None:
    prompts, seeds = PROMPTS[:2], [[1, 2], [3]]
    free = sample(llama, prompts, seeds, max_new_tokens=24)
    stop = [letters(free[0][0].tokens[5:8].tolist()), letters(free[1][0].tokens[11:12].tolist())]
    out = sample(llama, prompts, seeds, max_new_tokens=24, stop=stop)
    for x, full in zip(itertools.chain(*out), itertools.chain(*free), strict=True):
        ends = [full.text.find(string) + len(string) for string in stop if string in full.text]
        length = min(ends, default=24)
        assert x.tokens.tolist() == full.tokens[:length].tolist()
        assert x.text == letters(x.tokens.tolist())
        assert x.finish == ("stop" if ends else "length")
        torch.testing.assert_close(x.logps, full.logps[:length], atol=2e-6, rtol=0)
    assert [x.finish for x in (out[0][0], out[1][0])] == ["stop", "stop"]


def test_stop_strings_of_cut_characters_decode_only_tails(llama: Any) -> None:
    """Tokens are halves of characters here, and decoding does not grow with the completion."""
    sizes: list[int] = []

    def decode(ids: list[int]) -> str:
        sizes.append(len(ids))
        return bytes(0xC3 if i % 2 else 0xA9 for i in ids).decode(errors="replace")

    def run(stop: list[str]) -> Completion:
        out = NativeGenerator([], 0, decode)
        out.sync(llama)
        return out.generate([[5, 6]], [[1]], Sampling(max_new_tokens=60, stop=stop))[0][0]

    free = run(["none such"])
    assert (free.finish, len(free.tokens)) == ("length", 60)
    assert max(sizes[:-1]) == len("none such") + 4  # the last call makes the text of the completion
    ids = free.tokens.tolist()
    expected = next(n for n in range(60) if "éé" in decode(ids[:n]))
    cut = run(["éé"])
    assert (cut.finish, cut.tokens.tolist()) == ("stop", ids[:expected])


def continued(model: Any, chunk: int, total: int, **sampling: Any) -> list[list[Completion]]:
    """PROMPTS and SEEDS, sampled by calls of at most `chunk` new tokens."""
    engine = generator(model, (3, 4))
    parts: dict[tuple[int, int], list[Completion]] = {
        (i, j): [] for i, row in enumerate(SEEDS) for j in range(len(row))
    }
    open_ = list(parts)
    for _ in range(0, total, chunk):
        rows = [[j for k, j in open_ if k == i] for i in range(len(PROMPTS))]
        begun = [[[t for c in parts[i, j] for t in c.tokens.tolist()] for j in row] for i, row in enumerate(rows)]
        seeds = [[SEEDS[i][j] for j in row] for i, row in enumerate(rows)]
        out = engine.generate(PROMPTS, seeds, Sampling(max_new_tokens=chunk, **sampling), begun)
        for i, row in enumerate(rows):
            for j, completion in zip(row, out[i], strict=True):
                parts[i, j].append(completion)
        open_ = [place for place in open_ if parts[place][-1].finish == "length"]
    columns = ("tokens", "logps", "log_kept")
    join = lambda own: [torch.cat([getattr(c, name) for c in own]) for name in columns]  # noqa: E731
    return [
        [Completion(*join(parts[i, j]), "", parts[i, j][-1].finish) for j in range(len(row))]
        for i, row in enumerate(SEEDS)
    ]


@pytest.mark.parametrize("name", ["llama", "mistral window", "mamba"])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9, "temperature": 1.2}])
def test_a_completion_goes_on_as_if_it_had_not_been_interrupted(name: str, cut: dict[str, Any]) -> None:
    model = build(CONFIGS[name], scale=2.0)
    free = sample(model, PROMPTS, SEEDS, (3, 4), max_new_tokens=24, **cut)
    long = max((x for row in free for x in row), key=lambda x: len(x.tokens))
    stop = [letters(long.tokens[6:10].tolist())]  # across the border of chunks of 8
    assert len(stop[0]) == 4
    for settings in (cut, {**cut, "stop": stop}):
        whole = sample(model, PROMPTS, SEEDS, (3, 4), max_new_tokens=24, **settings)
        assert len({len(x.tokens) for row in whole for x in row}) > 2
        for chunk in (1, 8, 12, 24):
            for a, b in zip(
                itertools.chain(*continued(model, chunk, 24, **settings)), itertools.chain(*whole), strict=True
            ):
                assert (a.tokens.tolist(), a.finish) == (b.tokens.tolist(), b.finish)
                torch.testing.assert_close(a.logps, b.logps, atol=5e-6, rtol=0)
                torch.testing.assert_close(a.log_kept, b.log_kept, atol=5e-6, rtol=0)


def test_later_seeds_are_of_their_place() -> None:
    assert later_seed(7, 0) == 7
    seeds = {later_seed(seed, place) for seed in range(20) for place in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uneven_seeds_duplicates_and_nothing(llama: Any) -> None:
    assert sample(llama, [], [], max_new_tokens=3) == []
    assert sample(llama, [[1, 2], [3]], [[], []], max_new_tokens=3) == [[], []]
    out = sample(llama, [[1, 2], [3], [1, 2]], [[4, 5], [], [5]], max_new_tokens=6)
    assert [len(row) for row in out] == [2, 0, 1]
    assert out[0][1].tokens.tolist() == out[2][0].tokens.tolist()
    assert [len(x.tokens) for row in out for x in row] == [6, 6, 6]
    assert sample(llama, [[1]], [[4]], max_new_tokens=1)[0][0].tokens.shape == (1,)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_rows", [256, 4])
def test_positions_passed_through_the_model(llama: Any, share: bool, max_rows: int) -> None:
    """Distinct prompts once and every sampled token but the last of a row, which nothing follows. No slack in decoding;
    in the prompts only the filling up of those computed together."""
    passed: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kw: passed.append(kw["input_ids"].numel()), with_kwargs=True
    )
    try:
        options = {"share": share, "max_rows": max_rows}
        prompts, seeds = [[5, 6, 7], list(range(9)), [7, 6, 5], [5, 6, 7]], [[1, 2], [3, 4, 5], [6], [7, 8]]
        out = sample(llama, prompts, seeds, (3, 4, 5), options=options, max_new_tokens=30)
        lengths = [len(x.tokens) for row in out for x in row]
        assert len(set(lengths)) > 3
        assert sum(passed) == 3 + 9 + 3 + sum(length - 1 for length in lengths)
        if max_rows == 256:
            assert len(passed) == 2 + max(lengths) - 1

        passed.clear()
        prompts = [list(range(1, 1 + n)) for n in (9, 10, 11, 12, 20)]
        sample(llama, prompts, [[1, 2]] * 5, options=options, max_new_tokens=1)
        assert sum(passed) == {256: 4 * 12 + 20, 4: 2 * 10 + 2 * 12 + 20}[max_rows]
    finally:
        handle.remove()


def test_a_gpu_computes_few_tokens_at_once() -> None:
    prompts = [tuple(range(n)) for n in (2, 3, 10, 11, 40, 100)]
    sizes = [[len(prompt) for prompt in batch] for batch in _similar(prompts, 44)]
    assert sizes == [[2, 3, 10, 11], [40], [100]]
    assert [len(batch) for batch in _similar(prompts)] == [1, 1, 2, 1, 1]
    assert sum(map(list, _similar(prompts, 600)), []) == prompts  # noqa: RUF017


def test_cache_is_written_in_place() -> None:
    """Buffers are kept while they have room, and survive growth and rows that leave."""
    layer = caches.GrowingLayer()
    x = torch.randn(5, 2, 70, 4)
    parts, buffers = [], set()
    for start, end in itertools.pairwise([0, 3, *range(4, 71)]):
        keys, values = layer.update(x[:, :, start:end], -x[:, :, start:end])
        torch.testing.assert_close(keys, x[:, :, :end])
        torch.testing.assert_close(values, -x[:, :, :end])
        buffers.add(keys.untyped_storage().data_ptr())
        parts.append(end)
    assert len(buffers) < 6
    layer.reorder_cache(torch.tensor([0, 4, 2]))
    keys, _ = layer.update(x[[0, 4, 2], :, :1], x[[0, 4, 2], :, :1])
    torch.testing.assert_close(keys, torch.cat([x[[0, 4, 2]], x[[0, 4, 2], :, :1]], 2))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_model_is_as_it_was_and_trains_on() -> None:
    model = build(CONFIGS["llama"])
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    modes = {name: module.training for name, module in model.named_modules()}
    names = set(vars(model))
    sample(model, PROMPTS, SEEDS, max_new_tokens=4)
    broken = NativeGenerator([], 0, lambda ids: str(1 / 0))
    broken.sync(model)
    with pytest.raises(ZeroDivisionError):  # from within sampling
        broken.generate(PROMPTS, SEEDS, Sampling(max_new_tokens=4, stop=["x"]))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert (model.config._attn_implementation, set(vars(model))) == ("sdpa", names)
    completion = sample(model, PROMPTS, SEEDS, max_new_tokens=4)[1][0]
    assert completion.tokens.untyped_storage().nbytes() == 4 * 8  # it does not hold on to those of other rows
    loss = model(torch.tensor([PROMPTS[1]]), labels=torch.tensor([PROMPTS[1]])).loss
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert not any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers()))


def test_weights_are_those_of_the_moment() -> None:
    model = build(CONFIGS["llama"])
    out = generator(model)
    greedy = Sampling(max_new_tokens=12, temperature=0)
    old = tokens(out.generate(PROMPTS, SEEDS, greedy))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    new = tokens(out.generate(PROMPTS, SEEDS, greedy))
    assert new != old
    assert new[1][0] == reference(model, PROMPTS[1], 12)


def test_errors() -> None:
    model = build(CONFIGS["llama"])
    with pytest.raises(RuntimeError, match="sync"):
        NativeGenerator([], 0, letters).generate([[1]], [[1]], Sampling())
    with pytest.raises(ValueError, match="max_rows is 0"):
        NativeGenerator([], 0, letters, max_rows=0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sample(model, [[1], []], [[1], [1]], max_new_tokens=2)
    with pytest.raises(ValueError, match="2 prompts but 1"):
        sample(model, [[1], [2]], [[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompt 0 has 3 tokens.*max_new_tokens is 94.*96 positions.*shorten.*filter"):
        sample(model, [[1, 2, 3]], [[1]], max_new_tokens=94)
    assert len(sample(model, [[1, 2, 3]], [[1]], max_new_tokens=93)[0][0].tokens) == 93
    with torch.no_grad():
        nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(model, [[1, 2, 3]], [[1]], max_new_tokens=3)
    with pytest.raises(ValueError, match="keeps no key-value cache"):
        sample(build(OpenAIGPTConfig(**GPT2)), [[1]], [[1]], max_new_tokens=3)


def test_rows_share_nothing_where_an_attention_changes_what_it_reads() -> None:
    """As JetMoe's does, which repeats the keys that it has cached."""
    torch.manual_seed(0)
    model = Auto.from_config(JetMoeConfig(**SIZES, num_local_experts=2, kv_channels=8)).eval()
    expected = [reference(model, prompt, 8) for prompt in PROMPTS]
    with pytest.warns(UserWarning, match="JetMoeAttention does not read its cache as it is: each of a prompt's rows"):
        out = sample(model, PROMPTS, SEEDS, options={"max_rows": 4}, max_new_tokens=8, temperature=0)
    assert tokens(out) == [[row] * len(seeds) for row, seeds in zip(expected, SEEDS, strict=True)]


def test_state_is_empty(llama: Any) -> None:
    out = generator(llama)
    assert out.state_dict() == {}
    out.load_state_dict({})
