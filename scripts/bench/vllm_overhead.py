"""What lit-rl's layer costs over vLLM's own `LLM.generate`: CPU time of the same requests to the same engine, in turns.

`bash scripts/vllm.sh` installs vLLM for a CPU in .venv-vllm; then: .venv-vllm/bin/python scripts/bench/vllm_overhead.py"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from vllm import SamplingParams

from lit_rl import VLLM, Actor, Sampling

PROMPTS, SAMPLES, TOKENS = 8, 8, 64


def seconds(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    engine = VLLM(max_model_len=256, options={"kv_cache_memory_bytes": 2**27, "enforce_eager": True})
    actor = Actor(args.model, generator=engine, sampling=Sampling(max_new_tokens=TOKENS))
    engine.connect(actor.tokenizer, [])  # nothing ends a completion early
    engine.sync(actor.model)
    prompts = [[10 + i, 20, 30, 40] * 4 for i in range(PROMPTS)]
    seeds = [[SAMPLES * i + j for j in range(SAMPLES)] for i in range(PROMPTS)]

    def ours() -> int:
        return sum(len(c.tokens) for row in engine.generate(prompts, seeds, actor.sampling) for c in row)

    def raw() -> int:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(SAMPLES)]
        params = [
            SamplingParams(
                max_tokens=TOKENS, seed=seed, logprobs=0, flat_logprobs=True, ignore_eos=True, detokenize=False
            )
            for row in seeds
            for seed in row
        ]
        outputs = engine._llm.generate(inputs, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in outputs)

    assert ours() == raw() == PROMPTS * SAMPLES * TOKENS  # and both are warm
    taken = [(seconds(ours), seconds(raw)) for _ in range(args.repeats)]
    of_ours, of_raw = (median(side) for side in zip(*taken, strict=True))
    ratios = sorted(a / b for a, b in taken)
    print(f"{PROMPTS} prompts x {SAMPLES} samples x {TOKENS} tokens of {args.model}, medians of {args.repeats} turns")
    print(f"lit-rl {of_ours:.3f} s, LLM.generate {of_raw:.3f} s of CPU time")
    print(f"ratio {median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})")
    engine.stop()


if __name__ == "__main__":
    main()
