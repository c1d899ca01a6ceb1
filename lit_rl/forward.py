"""The training forward: from rows of tokens to the log-probability and entropy of each response token.

Three layouts give the same numbers. "rows" runs each row by itself. The others compute a group's prompt once for all its
responses, with position ids that restart after the prompt: "packed" has all groups in one sequence, without padding, and an
attention of its own; "masked" has a group in each row, and a mask that keeps responses apart. What a model takes is found out
when it is first used, by comparing with its own logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lit_rl import ops, sharding, sparse_attention
from lit_rl.experience import Experience, build
from lit_rl.models import ATTENTION, attends_to_all, context_length, replaceable

TOLERANCE = 2e-3
"""Largest difference of a log-probability that still counts as the same in the check at first use, in float32."""
HALF_TOLERANCE = 0.2
"""Mean difference that does in half precision; and that of log-probabilities relative to how far they spread, which is little in
a new model."""
CAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"
"""What configs call a cap on the logits: those of Gemma and most others, RecurrentGemma, xLSTM."""
LEAK = 1e-5
"""Largest difference of a number that another response's tokens may make, in any precision: they are not seen at all."""
LONGEST_PACK = 8192
"""Tokens of a group in one row at most: its mask has the square of that."""


class Layout(NamedTuple):
    """What the model is fed, and where the numbers of the experience's tokens come out."""

    inputs: Tensor  # (B, L) int64
    positions: Tensor  # (B, L) int64
    mask: (
        Tensor | None
    )  # (B, 1, L, L) bool, or (1, 1, S, 3) int64 blocks of packed groups; None is plain causal attention
    source: Tensor  # (M,) int64 into B * L: the position that predicts the m-th response token


def rows_layout(x: Experience) -> Layout:
    inputs = x.tokens[:, :-1]  # nothing is predicted from a row's last token; padding at the end harms no one before it
    row, column = x.mask.nonzero(as_tuple=True)
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return Layout(inputs, positions, None, row * inputs.shape[1] + column - 1)


def _packed(x: Experience) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """The groups one after the other, each with its prompt and then its responses without their last tokens, which predict
    nothing. Tokens, positions and segments (below zero for prompts), (L,) each; the source, as in Layout; the groups' sizes."""
    position, number = (torch.arange(n, device=x.tokens.device) for n in (x.tokens.shape[1], len(x)))
    _, counts = x.group.unique_consecutive(return_counts=True)
    first = (counts.cumsum(0) - counts).repeat_interleave(
        counts
    )  # (N,): the group's first row, which brings its prompt
    prompt = position < x.starts[:, None]
    kept = torch.where(prompt, (first == number)[:, None], position < x.lengths[:, None] - 1)  # (N, T)
    place = kept.flatten().cumsum(0).view_as(kept) - 1
    row, column = x.mask.nonzero(as_tuple=True)
    start = x.starts[row]
    source = torch.where(column == start, place[first[row], start - 1], place[row, column - 1])
    segment = torch.where(prompt, ~first[:, None], number[:, None])
    sizes = [int(part.sum()) for part in kept.split(counts.tolist())]
    return x.tokens[kept], position.expand_as(kept)[kept], segment[kept], source, sizes


def packed_layout(x: Experience) -> Layout:
    tokens, positions, segment, source, _ = _packed(x)
    blocks: list[list[int]] = []
    for number, length in zip(*(part.tolist() for part in segment.unique_consecutive(return_counts=True)), strict=True):
        if number >= 0 and blocks[-1][::2] == [0, length]:  # as long as the response before it
            blocks[-1][1] += 1
        else:
            blocks.append([number < 0, 1, length])
    return Layout(tokens[None], positions[None], torch.tensor([[blocks]], dtype=torch.long), source)


def masked_layout(x: Experience) -> Layout:
    *columns, source, sizes = _packed(x)
    inputs, positions = (pad_sequence(part.split(sizes), batch_first=True) for part in columns[:2])
    segment = pad_sequence(columns[2].split(sizes), batch_first=True, padding_value=len(x))
    width = inputs.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=inputs.device).tril()
    mask = causal & ((segment[:, None, :] < 0) | (segment[:, None, :] == segment[:, :, None]))  # (B, L, L)
    size = torch.tensor(sizes, device=inputs.device)
    ends = size.cumsum(0)
    group = torch.searchsorted(ends, source, right=True)
    return Layout(inputs, positions, mask[:, None], source + group * width - (ends - size)[group])


class Forward:
    """Token log-probabilities and entropies of a Hugging Face causal language model, without its logits in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.notes: list[str] = []
        """What had to be done the slower way, and why; filled at first use."""
        self._attention: str | None = None
        self._fused: bool | None = None
        self._layout: Callable[[Experience], Layout] = rows_layout

    def __call__(self, x: Experience, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """(N, T) log-probabilities, float32 or wider, of the response tokens under softmax(logits / temperature), less what
        truncation kept, and the entropies of those softmaxes. Zero off the mask."""
        self.check(x.tokens.device)
        layout = rows_layout if self._masks(x.tokens.device) and not self._worth_masking(x) else self._layout
        logps, entropy = self._run(layout(x), x.tokens[x.mask], temperature, bool(self._fused))
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

    def _masks(self, device: torch.device) -> bool:
        """Whether the square of a group's tokens is in memory. Of packed groups it is on a GPU in float32."""
        half = torch.is_autocast_enabled(device.type) or next(self.model.parameters()).dtype != torch.float32
        return self._layout is masked_layout or (self._layout is packed_layout and device.type == "cuda" and not half)

    def pads(self, device: torch.device) -> bool:
        """Whether shorter rows or groups of a slice are filled up to its longest."""
        return self._layout is not packed_layout or self._masks(device)

    def _worth_masking(self, x: Experience) -> bool:
        """Fewer operations as one row a group? Linear layers count tokens, attention counts pairs of them."""
        width = getattr(self.model.config, "hidden_size", 1024)
        _, counts = x.group.unique_consecutive(return_counts=True)
        ends, responses = counts.cumsum(0) - 1, x.response_lengths.cumsum(0)
        packed = x.starts[ends] + responses[ends].diff(prepend=responses.new_zeros(1))
        longest_row, longest_pack = int(x.lengths.max()), int(packed.max())

        def cost(batch: int, length: int, causal: float) -> float:
            return batch * length * (12 * width + 2 * causal * length)

        if longest_row > sparse_attention.covered(self.model):
            return False  # it takes no mask
        return longest_pack <= LONGEST_PACK and cost(len(counts), longest_pack, 1.0) < cost(len(x), longest_row, 0.5)

    def check(self, device: torch.device) -> None:
        """What is done at first use, and when the model's attention has been replaced. When ranks may differ in it, call this
        on all of them, where the model is whole."""
        if self._fused is None or self.model.config._attn_implementation != self._attention:
            products = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")  # TF32's rounding is more than what is compared
            try:
                with torch.autocast(device.type, enabled=False):
                    self._check(device)
            finally:
                torch.set_float32_matmul_precision(products)
            for note in self.notes:
                rank_zero_warn(f"{type(self.model).__name__} trains correctly, but slower than it could: {note}")
            self._attention = self.model.config._attn_implementation

    @torch.no_grad()
    def _check(self, device: torch.device) -> None:
        """Finds out, on a few random tokens, whether logits are hidden states times the head's weight, and which layout
        this model takes."""
        self._fused, self._layout = False, rows_layout
        self.notes.clear()
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        numbers = torch.Generator().manual_seed(0)
        one, two, first, *rest, other = (
            torch.randint(vocabulary, (n,), generator=numbers).tolist() for n in (5, 3, 3, 6, 4, 3)
        )
        x, changed = (build([one, one, two], [each, *rest], [0, 0, 1], []).to(device) for each in (first, other))
        targets, rows = x.tokens[x.mask], rows_layout(x)
        want = self._run(rows, targets, 1.0, fused=False)
        head = self.model.get_output_embeddings()
        plain = head is not None and [name for name, _ in head.named_parameters()] == ["weight"]  # no bias, no adapter
        config = self.model.config.get_text_config()
        capped = any(getattr(config, name, None) for name in CAPS)  # seen in large logits alone
        if not plain or capped or self.model.base_model is self.model:
            self.notes.append("its head is not hidden states times a weight: logits are computed in full")
        else:
            self._fused = self._same(self._run(rows, targets, 1.0, fused=True), want)
            if not self._fused:
                self.notes.append("its logits are not hidden states times the head's weight: they are computed in full")
        if not attends_to_all(self.model):  # few tokens do not always show it
            window = getattr(config, "sliding_window", None)
            what = f"it has a sliding window of {window}" if window else "not all its layers attend to all tokens"
            self.notes.append(f"{what}: a group's prompt is computed once for each row")
            return
        if (whole := sparse_attention.covered(self.model)) < context_length(self.model):
            self.notes.append(
                f"beyond {whole} tokens its attention is block-sparse: a group's prompt is computed once for each row"
            )
        for layout in (packed_layout, masked_layout):
            if self._takes(layout, x, want, changed):
                self._layout = layout
                return
        self.notes.append(
            "it does not take position ids with a 4-D mask: a group's prompt is computed once for each row"
        )

    def _takes(
        self, layout: Callable[[Experience], Layout], x: Experience, want: tuple[Tensor, Tensor], changed: Experience
    ) -> bool:
        """Whether the numbers are the same, and stay when the first response has changed. Leaves the model with the attention
        that this layout needs."""
        before = self.model.config._attn_implementation
        try:
            if layout is packed_layout:
                if x.tokens.device.type not in ("cpu", "cuda") or not replaceable(self.model):
                    return False
                _install(self.model)
            got, after = (self._run(layout(y), y.tokens[y.mask], 1.0, bool(self._fused)) for y in (x, changed))
            others = int(x.response_lengths[0])
            leak = max(float((a - b)[others:].abs().max()) for a, b in zip(got, after, strict=True))
            if self._same(got, want) and leak < LEAK:
                return True
        except (ValueError, RuntimeError, TypeError):
            pass
        if self.model.config._attn_implementation != before:
            self.model.set_attn_implementation(before)
        return False

    def _same(self, got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
        gaps = [(a - b).abs() for a, b in zip(got, want, strict=True)]
        if next(self.model.parameters()).dtype in (torch.float32, torch.float64):
            return all(float(gap.max()) < TOLERANCE for gap in gaps)
        # single tokens differ by tenths in half precision
        limits = HALF_TOLERANCE * min(1.0, float(want[0].std())), HALF_TOLERANCE
        return all(float(gap.mean()) < limit for gap, limit in zip(gaps, limits, strict=True))


def _install(model: Any) -> None:
    """Lets the model attend with `_attend` from now on: when a checkpointed layer runs again in the backward, too."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, but where the mask lists the blocks of packed groups."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "s_aux")):
        raise ValueError(f"{type(module).__name__} has an attention that groups cannot be packed for")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.packed_attention(query, key, value, attention_mask, scale).transpose(1, 2), None
