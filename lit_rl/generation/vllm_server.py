"""vLLM servers on other machines as the engine: tokens over HTTP, weights over the network or through a shared folder."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lit_rl import ranks
from lit_rl.checks import require
from lit_rl.generation import vllm_transfer
from lit_rl.generation.vllm_engine import Engine, Sample, SyncError, checkpoint_state, stamp


class VLLMServer(Engine):
    """vLLM on other machines, with all that `Engine` says of weights and failures. A server is started by

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --enable-scale-out \\
            --weight-transfer-config '{"backend": "nccl"}'

    MODEL is of the policy's architecture; its weights do not matter. Dev mode lets anybody who reaches the port control the
    server: keep it inside your own network. Completions are shared out over several servers in turn. A server says which
    weights it has: one that was started again gets them again, and what it sampled without them counts for nothing.

    Weights go to a server by its verbs for that: over NCCL from a trainer on a GPU, where vLLM must be installed too; or over
    TCP from any, with the backend lit_rl and lit-rl installed on the server. Where neither can be, they go through `folder`.

    Args:
        url: Of the server, such as http://10.0.0.2:8000, or of several.
        folder: A path that leads the servers and all ranks to the same place. It belongs to this run alone.
        dtype: As in VLLM: that of the weights that are sent; the server computes in its own (`--dtype`).
        max_model_len: As in VLLM; the server's own is `--max-model-len`.
        max_num_seqs: Requests at a time to each server.
        tolerance: As in VLLM.
        retries: How often in a row one that is gone is waited for, or one that fails is asked again.
        timeout: Seconds that a server may take to come up, to take weights, or to give one completion.
    """

    def __init__(
        self,
        url: str | list[str],
        folder: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tolerance: float | None = None,
        retries: int = 2,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(dtype, max_model_len, tolerance, retries)
        require(max_num_seqs >= 1, "max_num_seqs", max_num_seqs, "at least 1")
        self.urls = [one.rstrip("/") for one in ([url] if isinstance(url, str) else url)]
        require(bool(self.urls), "url", url, "that of at least one server")
        require(timeout > 0, "timeout", timeout, "above 0")
        self.folder = None if folder is None else Path(folder).absolute()
        self.timeout, self.workers = timeout, max_num_seqs * len(self.urls)
        self._version = ""

    def _load(self) -> None:
        self._version = blake2b(stamp(self.model).numpy().tobytes(), digest_size=8).hexdigest()
        with ranks.one_at_a_time("vllm_server"):  # the first that comes does it for all
            for url in self.urls:
                config = self._wait(url)
                if self._get(url, "weight_info")["weight_version"] != self._version:
                    self._post(url, "update_weight_version", new_version="incomplete")
                    self._send(url, (config["weight_transfer_config"] or {}).get("backend"))
                    self._post(url, "reset_prefix_cache")
                    self._post(url, "update_weight_version", new_version=self._version)

    def _send(self, url: str, backend: str | None) -> None:
        if (why := self._unusable(url, backend)) is None:
            post, workers = partial(self._post, url), self._get(url, "get_world_size")["world_size"]
            state = checkpoint_state(self.model)
            try:
                vllm_transfer.send(post, backend, url, workers, state, self._dtype(), self.timeout)  # type: ignore[arg-type]
            except Exception as error:
                if backend == "nccl":  # the GPU may wait in it for ever: no use trying again
                    raise SyncError(f"weights could not be sent to {url} over NCCL: {error}") from error
                raise
        elif self.folder is not None:
            warnings.warn(f"{why}: weights go through the folder {self.folder}")  # on whatever rank
            weights = {"weights_path": self._write(self.folder)}
            self._post(url, "collective_rpc", method="reload_weights", kwargs=weights)
        else:
            raise ValueError(
                f'{why}: start it with --weight-transfer-config \'{{"backend": "lit_rl"}}\' (see docs/distributed.md), or set the'
                " generator's `folder` to a path that leads it and all ranks to the same place"
            )

    def _unusable(self, url: str, backend: str | None) -> str | None:
        """Why weights cannot be sent to this server."""
        if backend not in get_args(vllm_transfer.Backend):
            return f"{url} takes weights by {backend or 'no --weight-transfer-config'}, neither by nccl nor by lit_rl"
        if backend == "nccl" and next(self.model.parameters()).device.type != "cuda":
            return f"{url} takes weights by nccl, from GPU to GPU, and the model is not on one"
        if backend == "nccl" and find_spec("vllm") is None:
            return (
                f"{url} takes weights by nccl, for which vLLM must be installed here too (pip install 'lit-rl[vllm]')"
            )
        return None

    def _write(self, folder: Path) -> str:
        """The place in the folder of the weights, which are the only ones there."""
        from safetensors.torch import save_file

        place, part = folder / self._version, folder / f".{self._version}"
        if not place.exists():
            part.mkdir(parents=True, exist_ok=True)
            dtype = self._dtype()
            state = {  # copies, since what is tied may not share its memory
                name: torch.empty_like(t, device="cpu", dtype=dtype if t.is_floating_point() else None).copy_(t)
                for name, t in checkpoint_state(self.model).items()
            }
            save_file({name: t.contiguous() for name, t in state.items()}, part / "model.safetensors")
            part.rename(place)
            for old in folder.iterdir():
                if old.is_dir() and old != place:
                    shutil.rmtree(old, ignore_errors=True)
        return str(place)

    def _wait(self, url: str) -> Any:
        """The configuration of a server that is one we can use, once it is up."""
        end = time.monotonic() + self.timeout
        while True:
            try:
                config = self._get(url, "server_info?config_format=json")["vllm_config"]
                break
            except (ConnectionError, urllib.error.URLError) as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"no vLLM server at {url} for {self.timeout:g} s: {error}") from error
                time.sleep(1)
        mode = config["model_config"]["logprobs_mode"]
        require(
            mode == "processed_logprobs", f"--logprobs-mode of {url}", mode, "processed_logprobs: start it with that"
        )
        return config

    def _sample(self, asked: list[tuple[list[int], dict[str, Any]]]) -> list[Sample]:
        def one(i: int) -> Sample:
            tokens, params = asked[i]
            url = self.urls[i % len(self.urls)]
            choice = self._generate(url, tokens, params)["choices"][0]
            if any(span["version"] != self._version for span in choice["weight_versions"] or ()):
                raise RuntimeError(
                    f"the vLLM server at {url} has other weights by now: it was started again, or serves others"
                )
            logps = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
            return Sample(choice["token_ids"], logps, choice["finish_reason"])

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(one, range(len(asked))))

    def _probe(self, ids: list[int]) -> list[float]:
        """Those of the server that is furthest from the median of all."""
        params = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False}
        answers = [self._generate(url, ids, params)["prompt_logprobs"][1:] for url in self.urls]
        rows = torch.tensor([[found[str(t)]["logprob"] for t, found in zip(ids[1:], a, strict=True)] for a in answers])
        return list(rows[(rows - rows.median(0).values).abs().sum(1).argmax()].tolist())

    def _generate(self, url: str, tokens: list[int], params: dict[str, Any]) -> Any:
        return self._post(url, "inference/v1/generate", token_ids=tokens, sampling_params=params)

    def _get(self, url: str, verb: str) -> Any:
        return self._call(url, verb, None)

    def _post(self, url: str, verb: str, **body: Any) -> Any:
        return self._call(url, verb, json.dumps(body).encode())

    def _call(self, url: str, verb: str, data: bytes | None) -> Any:
        """What the server answers. ValueError when it refuses, RuntimeError when it fails."""
        request = urllib.request.Request(f"{url}/{verb}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            hint = ": start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            kind = RuntimeError if error.code >= 500 else ValueError
            raise kind(f"the vLLM server at {url} answered {verb} with {error.code}{hint}. {said}") from None
