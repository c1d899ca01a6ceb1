"""Maximal update parametrisation: the best learning rate of a narrow model is that of a wide one (arXiv 2203.03466).

MiniCPM (arXiv 2404.06395, table 7) multiplies the embedding by scale_emb, each residual branch by scale_depth / sqrt(layers)
and the logits by base_width / width. To AdamW a weight w that is multiplied by m is the same as a weight m w with m times the
learning rate and an m-th of the weight decay and eps. So the multipliers are in the weights here: the model is an ordinary one,
which every engine runs and every format holds; only its initialisation and each parameter's rate differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_rl.checks import require

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose branches end in OUTPUTS, and nothing but a norm comes before them."""
OUTPUTS = ("o_proj", "down_proj")
EPS = 1e-8
"""Of AdamW."""


@dataclass(frozen=True)
class MuP:
    """MiniCPM's constants. They scale a model of any width as that of `base_width`, where nothing but its own multipliers
    differs from the ordinary parametrisation."""

    base_width: int = 256
    """Hidden size at which the learning rate is used as given."""
    scale_emb: float = 12.0
    """Multiplies the embedding."""
    scale_depth: float = 1.4
    """Over the root of the number of layers, multiplies each residual branch."""
    init_std: float = 0.1
    """Standard deviation of matrices at first, at `base_width`."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(value > 0, f"mup.{name}", value, "above 0")


class Scale(NamedTuple):
    """Of one parameter, in terms of the multiplied form."""

    multiplier: float = 1.0
    """What its product was multiplied by, which is now in the weight."""
    lr: float = 1.0
    """Its learning rate, in terms of the run's."""
    std: float | None = None
    """Its standard deviation at first; None leaves it as the architecture has it, as norms and biases."""


def scales(model: Any, mup: MuP) -> dict[str, Scale]:
    """Of each of a model's parameters by name. Embedding, norms and biases learn at the run's rate, as does the head, whose
    product is scaled; matrices between them at base_width / width of it.

    Raises ValueError for an architecture or a model that it does not know how to scale.
    """
    config = model.config
    require(config.model_type in ARCHITECTURES, "mup's model type", config.model_type, f"one of {ARCHITECTURES}")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    require(embedding is not head, "tie_word_embeddings", True, "False with mup, which scales embedding and head apart")
    width = mup.base_width / config.hidden_size
    branch = mup.scale_depth / math.sqrt(config.num_hidden_layers)

    def scale(name: str, weight: Tensor) -> Scale:
        if weight is embedding:
            return Scale(mup.scale_emb, 1.0, mup.init_std)
        if weight is head:
            return Scale(width, 1.0, mup.init_std)
        if weight.dim() < 2:
            return Scale()
        output = name.removesuffix(".weight").endswith(OUTPUTS)
        return Scale(branch if output else 1.0, width, mup.init_std * math.sqrt(width))

    return {name: scale(name, weight) for name, weight in model.named_parameters()}


@torch.no_grad()
def initialise(model: nn.Module, mup: MuP) -> None:
    """New weights from torch's global seed, in place."""
    known = scales(model, mup)
    for name, weight in model.named_parameters():
        if (std := known[name].std) is not None:
            nn.init.normal_(weight, std=std * known[name].multiplier)


def groups(model: nn.Module, mup: MuP, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: of those that are trained, the ones with the same scale together, the run's own rate first."""
    members: dict[Scale, list[nn.Parameter]] = {}
    known = scales(model, mup)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            members.setdefault(known[name]._replace(std=None), []).append(weight)
    return [
        {"params": weights, "lr": lr * s.lr * s.multiplier, "weight_decay": weight_decay / s.multiplier}
        | {"eps": EPS / s.multiplier}
        for s, weights in sorted(members.items(), key=lambda item: item[0] != Scale())
    ]


def slope(widths: Sequence[float], values: Sequence[float]) -> float:
    """Of log values against log widths: 0 when a number does not depend on the width, 1 when it grows as fast.

    Raises ValueError where there are no two widths, or a number that has no logarithm."""
    require(len(set(widths)) > 1, "widths", list(widths), "two or more that differ")
    require(all(0 < v < math.inf for v in (*widths, *values)), "values", list(values), "above 0 and finite")
    xs, ys = [math.log(w) for w in widths], [math.log(v) for v in values]
    x, y = fmean(xs), fmean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
