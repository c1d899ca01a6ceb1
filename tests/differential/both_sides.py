"""What both sides train on, and how: a tiny model, its responses and their rewards, and the optimizer.

trl_side.py and lit_side.py hold the same training, each as its users would write it. Both take real optimizer steps, of a
fixed length, so that later ratios are away from one by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rl import encoding

GROUP, MAX_TOKENS, TEMPERATURE = 4, 9, 0.7
REWARDS: dict[str, Sequence[float | None]] = {  # a group of all right, one of mixed, one of graded responses
    "a": (1.0, 1.0, 1.0, 1.0),
    "what is it": (1.0, 0.0, 0.0, 0.0),
    "which one": (0.25, -1.0, 0.5, 2.0),
}


@dataclass
class Row:
    prompt: str
    prompt_ids: list[int]
    text: str
    ids: list[int]
    reward: float | None
    finished: bool
    sampler_logps: Tensor


@dataclass
class Step:
    loss: float
    gradient: Tensor
    """Of all parameters, flat."""
    size: float = 0.0
    """The sum of the loss's terms without their signs, which is what its rounding is relative to."""


def make(folder: Path) -> list[Row]:
    """Writes a tiny random Llama into `folder` and returns the rows to train it on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = encoding.tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rng, rows = random.Random(0), []
    for prompt, rewards in REWARDS.items():
        for i, reward in enumerate(rewards):
            text = "".join(rng.choices("abcdefghij", k=rng.randint(1, MAX_TOKENS - 1)))
            finished = i != 2  # one of each group is cut off at the limit
            text = text if finished else text.ljust(MAX_TOKENS, "z")
            prompt_ids = encoding.encode_prompt(tokenizer, prompt)
            ids = encoding.encode_response(tokenizer, text, [tokenizer.eos_token_id] if finished else [])
            rows.append(Row(prompt, prompt_ids, text, ids, reward, finished, torch.zeros(len(ids))))
            logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1] / TEMPERATURE
            logps = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).detach()
            rows[-1].sampler_logps = logps + 0.4 * torch.randn(len(ids))  # an engine that disagrees with the trainer
    assert len({row.text for row in rows}) == len(rows)
    return rows


class Walk(torch.optim.Optimizer):
    """A step of fixed length against the gradient, whatever its scale."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for g in self.param_groups for p in g["params"]]
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        for p in parameters:
            p -= self.param_groups[0]["lr"] * p.grad / norm
        return loss


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
