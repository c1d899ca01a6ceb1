"""vLLM servers on other machines as the engine: tokens over HTTP, weights through a folder that both sides see."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch

from lit_rl.checks import require
from lit_rl.generation.vllm import VLLM, Sample, checkpoint_state, stamp


class VLLMServer(VLLM):
    """As `VLLM`, with servers that were started by

        VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs --enable-scale-out

    MODEL is of the policy's architecture; its weights do not matter. Dev mode lets anybody who reaches the port control the
    server: keep it inside your own network. vLLM need not be installed here.

    A sync writes the weights into `folder` once, whatever number of ranks there are, and lets each server read them. A server
    says which weights it has, so that one that was started again gets them again. Completions are shared out in turn.

    Args:
        url: Of the server, such as http://10.0.0.2:8000, or of several.
        folder: A path that leads the servers and all ranks to the same place. It belongs to this run alone.
        dtype: As in VLLM: that of the written weights; the server computes in its own (`--dtype`).
        max_model_len: As in VLLM; the server's own is `--max-model-len`.
        max_num_seqs: Requests at a time to each server.
        tolerance: As in VLLM.
        retries: How often in a row one that is gone is waited for, or one that fails is asked again.
        timeout: Seconds that a server may take to come up, to take weights, or to give one completion.
    """

    def __init__(
        self,
        url: str | list[str],
        folder: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        tolerance: float | None = None,
        retries: int = 2,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(
            dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, tolerance=tolerance, retries=retries
        )
        self.urls = [one.rstrip("/") for one in ([url] if isinstance(url, str) else url)]
        require(bool(self.urls), "url", url, "that of at least one server")
        require(timeout > 0, "timeout", timeout, "above 0")
        self.folder, self.timeout, self.workers = Path(folder).absolute(), timeout, max_num_seqs * len(self.urls)

    def _need_vllm(self) -> None:
        """Not on this machine."""

    def stop(self) -> None:
        """The servers are not ours: the next sync sees which weights they have."""
        self._sent = None

    def _load(self) -> None:
        version = blake2b(stamp(self.model).numpy().tobytes(), digest_size=8).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():  # the first rank that comes does it for all
            for url in self.urls:
                self._wait(url)
                if self._call(url, "weight_info")["weight_version"] == version:
                    continue
                self._call(
                    url, "collective_rpc", method="reload_weights", kwargs={"weights_path": self._write(version)}
                )
                self._call(url, "reset_prefix_cache", {})
                self._call(url, "update_weight_version", new_version=version)
            for old in self.folder.iterdir():
                if old.is_dir() and old.name != version:
                    shutil.rmtree(old, ignore_errors=True)

    def _write(self, version: str) -> str:
        """The folder of these weights, with them in it."""
        from safetensors.torch import save_file

        place, part = self.folder / version, self.folder / f".{version}"
        if not place.exists():
            part.mkdir(exist_ok=True)
            dtype = self._dtype()
            state = {
                name: torch.empty_like(t, device="cpu", dtype=dtype if t.is_floating_point() else None).copy_(t)
                for name, t in checkpoint_state(
                    self.model
                ).items()  # copies, since what is tied may not share its memory
            }
            save_file({name: t.contiguous() for name, t in state.items()}, part / "model.safetensors")
            part.rename(place)
        return str(place)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        import fcntl

        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _wait(self, url: str) -> None:
        """Until the server is up, and is one that we can use."""
        end = time.monotonic() + self.timeout
        while True:
            try:
                mode = self._call(url, "server_info?config_format=json")["vllm_config"]["model_config"]["logprobs_mode"]
                break
            except (ConnectionError, urllib.error.URLError) as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"no vLLM server at {url} for {self.timeout:g} s: {error}") from error
                time.sleep(1)
        require(
            mode == "processed_logprobs", f"--logprobs-mode of {url}", mode, "processed_logprobs: start it with that"
        )

    def _sample(self, asked: list[tuple[list[int], dict[str, Any]]]) -> list[Sample]:
        def one(i: int) -> Sample:
            tokens, params = asked[i]
            choice = self._generate(self.urls[i % len(self.urls)], tokens, params)["choices"][0]
            logps = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
            return Sample(choice["token_ids"], logps, choice["finish_reason"])

        with ThreadPoolExecutor(min(self.workers, len(asked))) as pool:
            return list(pool.map(one, range(len(asked))))

    def _probe(self, ids: list[int]) -> list[float]:
        """The log-probability of each token but the first, on the server where it is furthest from the others' mean."""
        params = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False}
        answers = [self._generate(url, ids, params)["prompt_logprobs"][1:] for url in self.urls]
        rows = torch.tensor([[found[str(t)]["logprob"] for t, found in zip(ids[1:], a, strict=True)] for a in answers])
        return list(rows[(rows - rows.median(0).values).abs().sum(1).argmax()].tolist())

    def _generate(self, url: str, tokens: list[int], params: dict[str, Any]) -> Any:
        return self._call(url, "inference/v1/generate", token_ids=tokens, sampling_params=params)

    def _call(self, url: str, verb: str, empty: dict[str, Any] | None = None, **body: Any) -> Any:
        """What the server answers; POST if there is a body. ValueError when it refuses."""
        data = json.dumps(body or empty).encode() if body or empty is not None else None
        request = urllib.request.Request(f"{url}/{verb}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            hint = ": start it with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            kind = RuntimeError if error.code >= 500 else ValueError
            raise kind(f"the vLLM server at {url} answered {verb} with {error.code}{hint}. {said}") from None
