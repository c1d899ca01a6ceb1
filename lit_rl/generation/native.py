"""The native engine: the trained model samples in this process, through its own forward.

Each prompt is computed once for all its samples, keys and values are written in place, finished rows leave the batch.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_rl.generation.base import Completion, Sampling
from lit_rl.generation.caches import Unshareable
from lit_rl.generation.rows import Prompt, Rows, growing
from lit_rl.generation.sampling import draw, uniforms

Place = tuple[int, int]  # of a completion in the answer: which prompt, which of its seeds
Chunk = list[tuple[Prompt, list[Place]]]


class NativeGenerator:
    """Samples from a Hugging Face causal language model, on the device where it is.

    eos: ids that end a completion; pad: the id that fills up shorter prompts; decode: ids to text, special ones left
    out; max_rows: completions sampled at a time (a prompt with more seeds than that is computed once for each part);
    share: let the rows of a prompt share its keys and values where the model allows, see `Rows`.
    """

    exact = keeps_mass = True

    def __init__(
        self,
        eos: Sequence[int],
        pad: int,
        decode: Callable[[list[int]], str],
        max_rows: int = 256,
        share: bool = True,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}: it must be at least 1")
        self.eos, self.pad, self.decode, self.max_rows, self.share = list(eos), pad, decode, max_rows, share
        self.model: Any = None

    def sync(self, model: nn.Module) -> None:
        """Sample from this model from now on. Nothing is copied, so later changes of its weights need no new call."""
        self.model = model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[list[Completion]]:
        """For each prompt (token ids) as many completions as it has seeds, or what follows those that have `begun`.

        A completion depends on the weights, its prompt and its seed, and on what it is batched with only as far as the
        rounding of the model's sums does. Raises RuntimeError before `sync`; ValueError for an empty prompt, for one
        that leaves too few positions and for a model without a key-value cache; FloatingPointError for logits that are
        not finite.
        """
        begun = begun or [[()] * len(row) for row in seeds]
        self._check(prompts, seeds, sampling, begun)
        places: dict[Prompt, list[Place]] = {}
        for i, prompt in enumerate(prompts):
            for j in range(len(seeds[i])):
                places.setdefault((*prompt, *begun[i][j]), []).append((i, j))
        done: dict[Place, Completion] = {}
        with torch.no_grad(), _evaluating(self.model):
            for chunk in self._chunks(places):
                try:
                    done.update(self._sample(chunk, seeds, sampling, begun))
                except Unshareable as error:  # which shows in the first step
                    warnings.warn(f"{error}: each of a prompt's rows keeps keys and values of its own", stacklevel=2)
                    self.share = False
                    done.update(self._sample(chunk, seeds, sampling, begun))
        return [[done[i, j] for j in range(len(row))] for i, row in enumerate(seeds)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]],
    ) -> None:
        if self.model is None:
            raise RuntimeError("the generator has no model: call sync(model) first")
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} lists of seeds: give each prompt its own list")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {i} has no tokens: give it at least one, such as a beginning-of-text token")
            length = len(prompt) + max(map(len, begun[i]), default=0)
            if limit is not None and length + sampling.max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {length} tokens and sampling.max_new_tokens is {sampling.max_new_tokens}, "
                    f"but the model has {limit} positions: shorten max_new_tokens or filter the prompt"
                )

    def _chunks(self, places: dict[Prompt, list[Place]]) -> Iterator[Chunk]:
        """Prompts, shortest first, at most `max_rows` completions together; of one length if the cache needs that."""
        alike = not growing(self.model)
        chunk: Chunk = []
        for prompt in sorted(places, key=len):
            for start in range(0, len(places[prompt]), self.max_rows):
                part = places[prompt][start : start + self.max_rows]
                full = sum(len(other) for _, other in chunk) + len(part) > self.max_rows
                if chunk and (full or (alike and len(chunk[0][0]) < len(prompt))):
                    yield chunk
                    chunk = []
                chunk.append((prompt, part))
        if chunk:
            yield chunk

    def _sample(
        self,
        chunk: Chunk,
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]],
    ) -> Iterator[tuple[Place, Completion]]:
        """The completions of a chunk, sampled together."""
        places = [place for _, part in chunk for place in part]
        prompts = [(prompt, len(part)) for prompt, part in chunk]
        rows = Rows(self.model, prompts, self.pad, self.share, sampling.max_new_tokens - 1)
        live = torch.arange(len(places), device=rows.logits.device)  # the row in each slot of the batch
        before = [begun[i][j] for i, j in places]
        noise = uniforms([seeds[i][j] for i, j in places], sampling.max_new_tokens, [*map(len, before)]).to(live.device)
        eos = torch.tensor(self.eos, dtype=torch.int64, device=live.device)
        tails = Tails(self.decode, sampling.stop, before)
        steps = []
        with rows.attention():
            for t in range(sampling.max_new_tokens):
                token, logp, log_kept = draw(rows.logits, noise[t, live], sampling)
                done = torch.isin(token, eos)
                if sampling.stop:
                    done |= tails.stopped(live.tolist(), token.tolist()).to(done.device)
                steps.append((live, token, logp, log_kept, done))
                remaining = len(done) - int(done.sum())
                if remaining == 0 or t + 1 == sampling.max_new_tokens:
                    break
                if remaining < len(done):
                    slots = _close_gaps(done, remaining)
                    live, token = live[slots], token[slots]
                    rows.keep(slots)
                rows.step(token)

        live, *columns = (torch.cat(column).cpu() for column in zip(*steps, strict=True))
        if not columns[1].isfinite().all():
            raise FloatingPointError("log-probabilities are not finite: the model has diverged or its logits overflow")
        order, lengths = live.argsort(stable=True), live.bincount().tolist()
        for place, *parts in zip(places, *(column[order].split(lengths) for column in columns), strict=True):
            tokens, logps, log_kept, done = (part.clone() for part in parts)  # or each would keep all rows in memory
            text = self.decode(tokens.tolist())
            yield place, Completion(tokens, logps, log_kept, text, "stop" if done[-1] else "length")


class Tails:
    """The last tokens of each row, to see when they complete a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: list[str], begun: Sequence[Sequence[int]]) -> None:
        self.decode, self.stop = decode, stop
        # A token that shows adds at least a byte; the last few are for a character that the tail's start cuts.
        length = max((len(string.encode()) for string in stop), default=0) + 4
        self.tails: list[deque[int]] = [deque(tokens, maxlen=length) for tokens in begun]

    def stopped(self, rows: list[int], tokens: list[int]) -> Tensor:
        """Append a token to each of these rows. (R,) bool: whether it completed a stop string."""
        for row, token in zip(rows, tokens, strict=True):
            self.tails[row].append(token)
        texts = (self.decode(list(self.tails[row])) for row in rows)
        return torch.tensor([any(string in text for string in self.stop) for text in texts])


def _close_gaps(done: Tensor, remaining: int) -> Tensor:
    """Slots (remaining,) of the rows that are not done, the last ones in the places of those that are."""
    slots = torch.arange(remaining, device=done.device)
    slots[done[:remaining]] = remaining + (~done[remaining:]).nonzero().squeeze(1)
    return slots


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each submodule's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
