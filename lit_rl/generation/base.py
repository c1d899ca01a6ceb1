"""The Generator protocol: token ids in, token ids and their log-probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lit_rl.checks import require


@dataclass
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int = 256
    """Longest completion, in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    stop: list[str] = field(default_factory=list)
    """A completion ends with the token that completes any of these strings."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "sampling.max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.temperature >= 0, "sampling.temperature", self.temperature, "at least 0")
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "above 0 and at most 1")
        require(self.top_k >= 0, "sampling.top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        require(0 <= self.min_p < 1, "sampling.min_p", self.min_p, "at least 0 and below 1")
        texts = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        require(texts, "sampling.stop", repr(self.stop), "a list of texts, none of them empty")

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass
class Completion:
    """One sampled continuation of a prompt. All tensors are on the CPU and of the same length L >= 1."""

    tokens: Tensor
    """(L,) int64; ends with the end-of-sequence token when `finish` is "stop" and no stop string ended it."""
    logps: Tensor
    """(L,) float32: log-probability of each token under the distribution it was really sampled from
    (temperature and truncation included; under greedy decoding, of the plain softmax)."""
    log_kept: Tensor
    """(L,) float32: log of the probability mass that top-p, top-k and min-p kept (0 where nothing was cut), so that
    `logps + log_kept` is the log-softmax of logits / temperature."""
    text: str
    """The decoded tokens without special ones: a view, never tokenised again."""
    finish: Literal["stop", "length"]


def later_seed(seed: int, place: int) -> int:
    """A seed for the tokens of a completion from `place` on; at 0 the completion's own."""
    digest = blake2b(f"{seed}\0{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1 if place else seed


class Generator(Protocol):
    """An engine that samples. `generate` must depend on each prompt's own seeds only, not on how prompts are batched."""

    exact: bool
    """Whether its log-probabilities are those of the training forward in float32, up to rounding."""
    keeps_mass: bool = True
    """Whether it knows `log_kept` where top-p, top-k or min-p cut."""

    def sync(self, model: nn.Module) -> None:
        """Take over the current weights of the trained model."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[list[Completion]]:
        """For each prompt (token ids) as many completions as it has seeds (64-bit non-negative integers).

        begun: the tokens that each completion has so far, [prompt][seed][token], some or all of them empty. It goes on as
        if it had never been interrupted, stop strings included, for `sampling.max_new_tokens` further ones at most, and
        only these are returned. Random numbers depend on the seed and on a token's place in the whole completion; an engine
        that cannot enter a seed's stream in the middle takes `later_seed`.
        """

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
