"""The training forward: from rows of tokens to the log-probability and entropy of each response token.

Two layouts give the same numbers. "rows" runs each row by itself. "shared" packs a group into one sequence, its prompt
once and then each response, with position ids that restart after the prompt and a mask that keeps responses apart: the
prompt is computed once for all of them. Both compare with the model's own logits when first used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_rl import ops, sharding
from lit_rl.experience import Experience, build
from lit_rl.models import context_length

TOLERANCE = 2e-3
"""Largest difference of a log-probability that still counts as the same in the check at first use, in float32."""
HALF_TOLERANCE = 0.2
"""Mean difference that does in half precision."""
LONGEST_PACK = 8192
"""Tokens of a group in one sequence at most: its mask has the square of that."""


class Layout(NamedTuple):
    """What the model is fed, and where the numbers of the experience's tokens come out."""

    inputs: Tensor  # (B, L) int64
    positions: Tensor  # (B, L) int64
    mask: Tensor | None  # (B, 1, L, L) bool; None is plain causal attention
    source: Tensor  # (M,) int64 into B * L: the position that predicts the m-th response token


def rows_layout(x: Experience) -> Layout:
    inputs = x.tokens[:, :-1]  # nothing is predicted from a row's last token; padding at the end harms no one before it
    row, column = x.mask.nonzero(as_tuple=True)
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return Layout(inputs, positions, None, row * inputs.shape[1] + column - 1)


def shared_layout(x: Experience) -> Layout:
    inputs, positions, segments, sources = [], [], [], []
    groups, counts = x.group.unique_consecutive(return_counts=True)
    for first, count in zip((counts.cumsum(0) - counts).tolist(), counts.tolist(), strict=True):
        start = int(x.starts[first])
        rows = range(first, first + count)
        bodies = [x.tokens[r, start : int(x.lengths[r]) - 1] for r in rows]  # all but the last token of each response
        inputs.append(torch.cat([x.tokens[first, :start], *bodies]))
        spans = [torch.arange(start, start + len(b), device=x.tokens.device) for b in bodies]
        positions.append(torch.cat([torch.arange(start, device=x.tokens.device), *spans]))
        sizes = torch.tensor([start, *map(len, bodies)], device=x.tokens.device)
        segments.append(torch.repeat_interleave(torch.arange(count + 1, device=x.tokens.device), sizes))
        offset = start
        for r, body in zip(rows, bodies, strict=True):
            before = torch.arange(offset - 1, offset + len(body), device=x.tokens.device)
            before[0] = start - 1  # the first token of every response follows the prompt
            sources.append(before[x.mask[r, start : int(x.lengths[r])]])
            offset += len(body)
    width = max(map(len, inputs))
    rows_of = torch.repeat_interleave(torch.arange(len(groups), device=x.tokens.device), counts)
    source = torch.cat([s + int(g) * width for s, g in zip(sources, rows_of, strict=True)])
    segment = pad_sequence(segments, batch_first=True, padding_value=-1)
    causal = torch.ones(width, width, dtype=torch.bool, device=x.tokens.device).tril()
    mask = causal & ((segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None]))  # (B, L, L)
    return Layout(
        pad_sequence(inputs, batch_first=True), pad_sequence(positions, batch_first=True), mask[:, None], source
    )


class Forward:
    """Token log-probabilities and entropies of a Hugging Face causal language model, without its logits in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.notes: list[str] = []
        """What had to be done the slower way, and why; filled at first use."""
        self._fused: bool | None = None
        self._shared: bool | None = None

    def __call__(self, x: Experience, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(N, T) log-probabilities, float32 or wider, of the response tokens under softmax(logits / temperature), less what
        truncation kept, and the entropies of those softmaxes. Zero off the mask."""
        self.check(x.tokens.device)
        layout = shared_layout(x) if self._shared and self._worth_sharing(x) else rows_layout(x)
        logps, entropy = self._run(layout, x.tokens[x.mask], temperature, bool(self._fused))
        spread = logps.new_zeros(x.tokens.shape)
        logps, entropy = spread.masked_scatter(x.mask, logps), spread.masked_scatter(x.mask, entropy)
        return (logps if x.log_kept is None else logps - x.log_kept), entropy

    def _run(self, layout: Layout, targets: Tensor, temperature: float, fused: bool) -> tuple[Tensor, Tensor]:
        call = {"input_ids": layout.inputs, "position_ids": layout.positions, "use_cache": False}
        if layout.mask is not None:
            call["attention_mask"] = layout.mask
        if not fused:
            logits = self.model(**call).logits.flatten(0, 1)[layout.source]
            return ops.logits_logprob(logits, targets, temperature)

        def from_hidden() -> tuple[Tensor, Tensor]:
            hidden = self.model.base_model(**call).last_hidden_state.flatten(0, 1)[layout.source]  # (M, D)
            return ops.linear_logprob(hidden, self.model.get_output_embeddings().weight, targets, temperature)

        return sharding.run_as_forward(self.model, from_hidden)

    def _worth_sharing(self, x: Experience) -> bool:
        """Fewer operations as one sequence a group? Linear layers count tokens, attention counts pairs of them."""
        width = getattr(self.model.config, "hidden_size", 1024)
        groups = x.group.unique_consecutive()
        prompts = torch.stack([x.starts[x.group == g][0] for g in groups])
        packed = prompts + torch.stack([x.response_lengths[x.group == g].sum() for g in groups])
        longest_row, longest_pack = int(x.lengths.max()), int(packed.max())

        def cost(batch: int, length: int, causal: float) -> float:
            return batch * length * (12 * width + 2 * causal * length)

        return longest_pack <= LONGEST_PACK and cost(len(groups), longest_pack, 1.0) < cost(len(x), longest_row, 0.5)

    def check(self, device: torch.device) -> None:
        """What is done at first use. When ranks may differ in it, call this on all of them, where the model is whole."""
        if self._fused is None:
            with torch.autocast(device.type, enabled=False):
                self._check(device)
            for note in self.notes:
                rank_zero_warn(f"{type(self.model).__name__} trains correctly, but slower than it could: {note}")

    @torch.no_grad()
    def _check(self, device: torch.device) -> None:
        """Finds out, on a few random tokens, whether logits are hidden states times the head's weight, and whether this
        model honours position ids and a 4-D mask."""
        self._fused = self._shared = False
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        numbers = torch.Generator().manual_seed(0)
        prompt, *responses = (torch.randint(vocabulary, (n,), generator=numbers).tolist() for n in (5, 3, 6, 4))
        x = build([prompt] * 3, responses, [0] * 3, []).to(device)
        targets, rows = x.tokens[x.mask], rows_layout(x)
        want = self._run(rows, targets, 1.0, fused=False)
        head = self.model.get_output_embeddings()
        plain = head is not None and [name for name, _ in head.named_parameters()] == ["weight"]  # no bias, no adapter
        if not plain or self.model.base_model is self.model:
            self.notes.append("its head is not hidden states times a weight: logits are computed in full")
        else:
            self._fused = self._same(self._run(rows, targets, 1.0, fused=True), want)
            if not self._fused:
                self.notes.append("its logits are not hidden states times the head's weight: they are computed in full")
        window = getattr(self.model.config, "sliding_window", None)
        if window and window < context_length(self.model) and getattr(self.model.config, "use_sliding_window", True):
            self.notes.append(f"it has a sliding window of {window}: a group's prompt is computed once for each row")
            return
        try:
            self._shared = self._same(self._run(shared_layout(x), targets, 1.0, fused=self._fused), want)
        except (ValueError, RuntimeError, TypeError):
            self._shared = False
        if not self._shared:
            self.notes.append(
                "it does not take position ids with a 4-D mask: a group's prompt is computed once for each row"
            )

    def _same(self, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
        gaps = [(a - b).abs() for a, b in zip(got, want, strict=True)]
        if next(self.model.parameters()).dtype == torch.float32:
            return all(float(gap.max()) < TOLERANCE for gap in gaps)
        return all(
            float(gap.mean()) < HALF_TOLERANCE for gap in gaps
        )  # single tokens differ by tenths in half precision
