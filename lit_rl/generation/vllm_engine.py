"""What vLLM is asked, whether it has the model's weights, and what is done when it fails: wherever it runs."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lit_rl import adapters, ternary
from lit_rl.checks import require
from lit_rl.generation.base import Completion, Generator, Sampling, later_seed

T = TypeVar("T")
PROBE = "What is 12 * 7? The answer is 84, since 10 * 7 = 70 and 2 * 7 = 14."
"""Its log-probabilities tell whether the engine has our weights."""
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""What they may differ by, on average over tokens: a thousand times what float32 rounds, a few times what halves do."""


class SyncError(RuntimeError):
    """The engine does not compute what the trained model does."""


class Sample(NamedTuple):
    """What an engine says of one completion."""

    tokens: Sequence[int]
    logps: Sequence[float]
    finish: str


class Engine(Generator):
    """vLLM, somewhere. Its kernels are not those of training, so that log-probabilities differ by rounding: old ones are the
    trainer's (`old_logps: auto`), and `tis_cap` corrects for what is left. At each sync the weights go there without adapters
    (merged), cached prefixes are dropped, and a probe's log-probabilities are compared with the model's own: SyncError if they
    differ. When vLLM fails, it is reached again, gets the weights again, and is asked again with the same seeds.
    """

    exact = keeps_mass = False
    fatal: ClassVar[tuple[type[BaseException], ...]] = (SyncError, ValueError, TypeError, ImportError)
    """Errors that trying again does not help."""

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int | None = None,
        tolerance: float | None = None,
        retries: int = 2,
    ) -> None:
        require(tolerance is None or tolerance > 0, "tolerance", tolerance, "above 0, or None")
        require(retries >= 0, "retries", retries, "at least 0")
        self.dtype, self.max_model_len, self.tolerance, self.retries = dtype, max_model_len, tolerance, retries
        self.model: Any = None
        self.tokenizer: Any = None
        self.eos: list[int] = []
        self.numbers: dict[str, float] = {"sampler/restarts": 0.0}
        """To be logged: how far the probe was off at the last sync, and how often the engine was tried again."""
        self._sent: Tensor | None = None
        """The `stamp` of the weights that the engine has; None when nobody knows."""

    @abstractmethod
    def _load(self) -> None:
        """Brings the model's weights there, and drops cached prefixes."""

    @abstractmethod
    def _sample(self, asked: list[tuple[list[int], dict[str, Any]]]) -> list[Sample]:
        """A completion of each (tokens, SamplingParams), in the order asked; this rank may have none to ask."""

    @abstractmethod
    def _probe(self, ids: list[int]) -> list[float]:
        """The log-probability of each token but the first."""

    def _reset(self) -> None:
        """After a failure: lets go of whatever is left of it."""

    def connect(self, tokenizer: Any, eos: Sequence[int]) -> None:
        """Whose text the tokens are, and which end a completion."""
        self.tokenizer, self.eos = tokenizer, list(eos)

    # ---------------------------------------------------------------- what a Generator does

    @torch.no_grad()
    def sync(self, model: nn.Module) -> None:
        """Gives the engine the model's weights, unless it has them. Raises SyncError when they did not arrive."""
        now = stamp(model)
        if self._sent is not None and model is self.model and torch.equal(now, self._sent):
            return
        self.model, self._sent = model, None
        self._persist(lambda: None)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        begun: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> list[list[Completion]]:
        """As in `Generator`. Where top-p, top-k or min-p cut, `log_kept` is NaN: vLLM does not tell."""
        if self.model is None:
            raise RuntimeError("the generator has no model: call sync(model) first")
        starts = begun or [[()] * len(row) for row in seeds]
        places = [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        asked = []
        for i, j in places:
            tokens = [*prompts[i], *starts[i][j]]
            self._check_length(i, len(tokens), sampling.max_new_tokens)
            asked.append((tokens, self._params(sampling, later_seed(seeds[i][j], len(starts[i][j])))))
        samples = iter(self._persist(lambda: self._sample(asked)))
        return [[self._completion(next(samples), start, sampling) for start in row] for row in starts]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _check_length(self, i: int, length: int, new: int) -> None:
        if length == 0:
            raise ValueError(f"prompt {i} has no tokens: give it at least one, such as a beginning-of-text token")
        if self.max_model_len is not None and length + new > self.max_model_len:
            raise ValueError(
                f"prompt {i} has {length} tokens and sampling.max_new_tokens is {new}, but the generator's max_model_len is"
                f" {self.max_model_len}: raise it, shorten max_new_tokens or filter the prompt"
            )

    def _params(self, sampling: Sampling, seed: int) -> dict[str, Any]:
        """vLLM's SamplingParams."""
        return {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": seed,
            "stop": sampling.stop,
            "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop),
            "stop_token_ids": self.eos,  # the policy's, whatever the engine takes for the model's
            "ignore_eos": True,
            "logprobs": 0,
        }

    def _completion(self, sample: Sample, begun: Sequence[int], sampling: Sampling) -> Completion:
        tokens, logps, finish = list(sample.tokens), torch.tensor(sample.logps, dtype=torch.float32), sample.finish
        if not tokens or len(tokens) != len(logps) or finish not in ("stop", "length"):
            raise RuntimeError(
                f"vLLM ended a completion by {finish!r} with {len(tokens)} tokens and {len(logps)} log-probabilities"
            )
        if not logps.isfinite().all():
            raise FloatingPointError("log-probabilities are not finite: the model has diverged or its logits overflow")
        if sampling.stop and begun:  # a string that begins in what the engine takes for the prompt, it does not see
            from lit_rl.generation.native import Tails

            tails = Tails(self._decode, sampling.stop, [begun])
            for n, token in enumerate(tokens, 1):
                if tails.stopped([0], [token]):
                    tokens, logps, finish = tokens[:n], logps[:n], "stop"
                    break
        kept = torch.full_like(logps, torch.nan if sampling.cuts else 0.0)
        return Completion(
            torch.tensor(tokens), logps, kept, self._decode(tokens), "stop" if finish == "stop" else "length"
        )

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    # ---------------------------------------------------------------- weights, and what can go wrong

    def _persist(self, ask: Callable[[], T]) -> T:
        """ask(), of an engine that has the model's weights; again, of a new one, when it fails."""
        for left in range(self.retries, -1, -1):
            try:
                if self._sent is None:
                    now = stamp(self.model)
                    self._load()
                    self._compare()
                    self._sent = now
                return ask()
            except BaseException as error:
                self._sent = None
                self._reset()
                if not isinstance(error, Exception) or isinstance(error, self.fatal):
                    raise
                if left == 0:
                    raise RuntimeError(
                        f"vLLM failed {self.retries + 1} times in a row, the last time by {type(error).__name__}: {error}."
                        " Its own messages stand above; VLLM_LOGGING_LEVEL=DEBUG shows more"
                    ) from error
                self.numbers["sampler/restarts"] += 1
                warnings.warn(  # on whatever rank
                    f"vLLM failed ({type(error).__name__}: {error}). It is started again, gets the weights again, and is asked"
                    f" again with the same seeds: {self.retries - left + 1} of at most {self.retries} times"
                )
        raise AssertionError

    def _compare(self) -> None:
        """Raises SyncError unless the engine's log-probabilities of the probe are the model's."""
        ids = self.tokenizer(PROBE, add_special_tokens=False)["input_ids"][
            : self.max_model_len and self.max_model_len - 1
        ]
        device = next(self.model.parameters()).device
        rows = self.model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1].float()
        ours = rows.log_softmax(-1).gather(1, torch.tensor(ids[1:], device=device)[:, None])[:, 0].cpu()
        theirs = torch.tensor(self._probe(ids), dtype=torch.float32)
        gap = float((ours - theirs).abs().mean())
        limit = self.tolerance or TOLERANCES[self._dtype()]
        self.numbers["sampler/probe"] = gap
        if not ours.isfinite().all():
            raise FloatingPointError("log-probabilities are not finite: the model has diverged or its logits overflow")
        if not gap <= limit:
            raise SyncError(
                f"vLLM does not have the model's weights: the mean log-probability of a probe is {float(theirs.mean()):.6g} there"
                f" and {float(ours.mean()):.6g} here, {gap:.2g} apart on average over tokens, where {limit:g} is tolerated"
                f" ({self._dtype()}). If only rounding separates them (quantised engines) raise the generator's tolerance;"
                " otherwise this vLLM cannot take over weights of this architecture: leave the generator out"
            )

    def _dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            dtype: torch.dtype = getattr(torch, self.dtype)
            return dtype
        device = next(self.model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def stamp(model: nn.Module) -> Tensor:
    """A few hundred numbers of each weight, and how many layers round theirs: equal as long as the weights are."""
    few = [p.detach().flatten()[:: max(1, p.numel() // 256)].float() for p in model.parameters()]
    return torch.cat([torch.cat(few).cpu(), torch.tensor([float(len(ternary.layers(model)))])])


def checkpoint_state(model: Any) -> dict[str, Tensor]:
    """The model's weights without adapters, by the names and in the layout that they have in a Hugging Face folder."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = revert_weight_conversion(model, adapters.plain_state(model))
    return state
