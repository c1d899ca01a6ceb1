"""The least that lit-rl's arithmetic costs: the bare matrix products and attentions of a step, in torch alone.

No norms, activations or positions, no sampling, no optimizer, no Lightning. Each prompt is computed once, as in lit-rl. The
decode reads keys and values of the lengths that they have; the training computes the head once forward and twice backward.
"""

from __future__ import annotations

import torch
from shapes import Meter, arguments
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from lit_rl import ops


def main() -> None:
    shape, folder, steps, _, device = arguments()
    meter = Meter(device)
    meter.start()
    config = AutoConfig.from_pretrained(folder)
    width, heads = config.hidden_size, config.num_attention_heads
    dim, inner = width // heads, config.intermediate_size
    key_width = config.num_key_value_heads * dim
    attention, feed_forward = [(width, width), *[(key_width, width)] * 2, (width, width)], [(inner, width)] * 2
    sizes = [*attention, *feed_forward, (width, inner)] * config.num_hidden_layers
    weights = [torch.randn(n, m) * 0.01 for n, m in sizes]
    head = torch.randn(config.vocab_size, width) * 0.01
    prompts = [len(text.split()) for text in shape.texts]
    rows, total, longest = shape.prompts * shape.samples, sum(prompts), max(prompts)

    def linear(x: Tensor, y: Tensor) -> None:
        """All layers' products for tokens (M, width), y (M, inner)."""
        for weight in weights:
            F.linear(x if weight.shape[1] == width else y, weight)

    def packed(lengths: list[tuple[int, int, int]]) -> Tensor:
        """Attention of all groups."""
        tokens = sum(n * length for _, n, length in lengths)
        q, k, v = (torch.randn(1, n, tokens, dim, requires_grad=True) for n in (heads, *[key_width // dim] * 2))
        out = q
        for _ in range(config.num_hidden_layers):
            out = ops.packed_attention(out, k, v, torch.tensor(lengths), dim**-0.5)
        return out

    @torch.no_grad()
    def generate() -> None:
        linear(torch.randn(total, width), torch.randn(total, inner))
        packed([(1, 1, n) for n in prompts])
        x, y = torch.randn(rows, width), torch.randn(rows, inner)
        far, near = (
            [torch.randn(n, key_width // dim, length, dim) for _ in range(2 * config.num_hidden_layers)]
            for n, length in ((shape.prompts, longest), (rows, shape.new_tokens))
        )
        for t in range(1, shape.new_tokens + 1):
            linear(x, y)
            F.linear(x, head)
            for past, count in ((far, shape.samples), (near, 1)):
                length = longest if past is far else t
                query = torch.randn(len(past[0]), key_width // dim, count * (width // key_width), dim)
                for keys, values in zip(past[::2], past[1::2], strict=True):
                    (query @ keys[:, :, :length].transpose(2, 3)) @ values[:, :, :length]

    def train() -> None:
        body = shape.new_tokens - 1
        tokens = total + rows * body
        x, y = torch.randn(tokens, width), torch.randn(tokens, inner)
        linear(x, y)
        for weight in weights:
            source, grad = (x if n == width else y if n == inner else x[:, :n] for n in weight.shape[::-1])
            grad @ weight
            grad.T @ source
        packed([group for n in prompts for group in ((1, 1, n), (0, shape.samples, body))]).sum().backward()
        last = torch.randn(rows * shape.new_tokens, width)
        for part in last.split(max(1, 2**22 // len(head))):
            logits = F.linear(part, head)
            logits @ head
            logits.T @ part

    generate_ = meter.generating(generate, lambda _: (total, rows * shape.new_tokens))
    for _ in range(steps + 1):
        generate_()
        train()
        meter.step_ended()
    meter.print()


if __name__ == "__main__":
    main()
