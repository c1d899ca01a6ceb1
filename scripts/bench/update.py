"""What share of a GPU's matrix rate a policy's update reaches: GRPO's forward and backward, slice by slice.

Operations count what must be computed, each once: six for each parameter and token that meet, with each prompt once, and
attention to the tokens that are seen. Layouts are those of lit_rl/forward.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import CUDA, DEVICE, attempt, ceilings, megabytes, milliseconds, sections
from grpo import SHAPES
from shapes import Shape

from lit_rl import GRPO, forward
from lit_rl.encoding import tiny_tokenizer
from lit_rl.experience import Experience, build
from lit_rl.objectives import token_weights

MODELS = {name: replace(SHAPES[name], prompt_tokens=(128, 128)) for name in ("135M", "1.5B")}
if not CUDA:
    MODELS = {"small": Shape(prompts=2, prompt_tokens=(8, 8), samples=2, new_tokens=8, hidden=64, layers=2)}
LAYOUTS = {"rows": forward.rows_layout, "masked": forward.masked_layout}
Row = dict[str, Any]


def operations(shape: Shape, body: int) -> float:
    """`body`: parameters that each token meets."""
    prompt, new, rows = shape.prompt_tokens[0], shape.new_tokens, shape.prompts * shape.samples
    tokens = shape.prompts * prompt + rows * (new - 1)
    pairs = shape.prompts * prompt**2 / 2 + rows * ((new - 1) * prompt + (new - 1) ** 2 / 2)
    head = shape.hidden * shape.vocabulary * rows * new
    return 6 * (body * tokens + head) + 12 * shape.layers * shape.hidden * pairs


def experience(shape: Shape) -> Experience:
    torch.manual_seed(0)
    rows = shape.prompts * shape.samples
    prompts = torch.randint(2, shape.vocabulary, (shape.prompts, shape.prompt_tokens[0])).tolist()
    responses = torch.randint(2, shape.vocabulary, (rows, shape.new_tokens)).tolist()
    groups = [i // shape.samples for i in range(rows)]
    x = build([prompts[g] for g in groups], responses, groups, [])
    x.advantages = torch.randn(rows, 1).expand(x.tokens.shape).contiguous()
    x.weights = token_weights(x.mask, "token", shape.new_tokens).float()
    return x


class Update:
    """Of a random model, on random tokens."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name, self.shape = name, shape
        self.model = shape.random_model(DEVICE)
        self.policy = GRPO(self.model, tokenizer=tiny_tokenizer(), kl_coef=0.0, aggregate="token", group=shape.samples)
        x = experience(shape)
        self.slices = [part.to(torch.device(DEVICE)) for part in self.policy.slices(x, torch.arange(len(x)))]
        self.body = sum(p.numel() for key, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in key)
        self.body -= 0 if self.model.config.tie_word_embeddings else self.model.lm_head.weight.numel()

    def forward(self) -> None:
        with torch.no_grad():
            for part in self.slices:
                self.policy.terms(part)

    def both(self) -> None:
        for part in self.slices:
            self.policy.terms(part).total().backward()

    def measure(self, layout: str, rates: dict[str, float]) -> Row:
        terms: Any = self.policy.token_terms
        terms.check(torch.device(DEVICE))
        if layout in LAYOUTS:
            terms._layout, terms._worth_masking = LAYOUTS[layout], lambda x: True
        memory = megabytes(self.both)
        took, first = milliseconds(self.both, 20), milliseconds(self.forward, 20)
        rate = operations(self.shape, self.body) / took / 1e9
        chosen = layout if layout in LAYOUTS else f"its own: {terms._layout.__name__}"
        row: Row = {"model": self.name, "layout": chosen, "slices": len(self.slices), "forward, ms": first}
        row |= {"update, ms": took, "TFLOP/s": rate, "share of peak": rate / rates["bfloat16"], "MB": memory}
        print(json.dumps(row), flush=True)
        return row

    def profile(self) -> None:
        """Prints where a GPU's time goes."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            self.both()
            torch.cuda.synchronize()
        kernels = sorted(found.key_averages(), key=lambda kernel: -kernel.device_time_total)[:16]
        lines = [f"{k.device_time_total / 1e3:9.1f} ms {k.count:6d} x {k.key[:110]}" for k in kernels]
        print("\n".join([f"\nThe update of {self.name}:", *lines]), flush=True)


def updates(rates: dict[str, float]) -> list[Row]:
    rows = []
    for name, shape in MODELS.items():
        update = Update(name, shape)
        for layout in ("its own", *LAYOUTS):
            rows.append(attempt(f"{name}, {layout}", partial(update.measure, layout, rates)))
            if CUDA and layout != "masked":
                attempt("profile", update.profile)
        del update
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rates = ceilings()
    sections({"update": partial(updates, rates)}, rates, args.json)


if __name__ == "__main__":
    main()
