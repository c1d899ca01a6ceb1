"""Weights to a vLLM server over the network, by vLLM's own verbs: init, start, update, finish, shutdown.

The verbs go over HTTP, the weights beside them: over NCCL by the engine that vLLM has (`nccl`), or over TCP by one that
lit-rl brings into the server as a plugin (`lit_rl`), which needs no GPU. Both ends of the latter are in this file.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

Backend = Literal["nccl", "lit_rl"]
"""What the server's `--weight-transfer-config '{"backend": ...}'` names."""


def send(
    post: Callable[..., Any],
    backend: Backend,
    url: str,
    workers: int,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    timeout: float,
) -> None:
    """Replaces the weights of all workers of one server.

    Args:
        post: post(verb, **body) sends a verb to the server. It raises when that refuses.
        backend: What the server was started with.
        url: Of the server. This machine must be reachable from there, at the address that it is reached from here.
        workers: How many the server has.
        weights: Names, layout and shapes are those of a Hugging Face folder.
        dtype: That floating-point weights are sent in.
        timeout: Seconds that a worker may take to receive one of them over `lit_rl`.
    """
    types = {name: dtype if t.is_floating_point() else t.dtype for name, t in weights.items()}
    about = {
        "names": list(weights),
        "dtype_names": [str(t).removeprefix("torch.") for t in types.values()],
        "shapes": [list(t.shape) for t in weights.values()],
    }
    # The server answers a verb when its workers have met us.
    with _listening(url) as listener, ThreadPoolExecutor(1) as server:
        address, port = listener.getsockname()[:2]
        here = {"master_address": address, "master_port": port, "world_size": 1 + workers}
        info = here | {"rank_offset": 1, "packed": False}  # one broadcast a weight
        answer = server.submit(post, "init_weight_transfer_engine", init_info=info)
        group = _nccl(here, listener) if backend == "nccl" else Stream(here, listener, answer, timeout)
        try:
            answer.result()
            post("start_weight_update")
            answer = server.submit(post, "update_weights", update_info=about)
            for name, t in weights.items():
                if answer.done():  # before everything was sent: it has failed
                    break
                group.broadcast(t.detach().to(types[name]).contiguous(), 0)
            answer.result()
            post("finish_weight_update")
        finally:
            group.destroy()
    post("shutdown_weight_transfer_engine")


def _listening(url: str) -> socket.socket:
    """At a free port of this machine's address as the server sees it."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))) as s:
        return socket.create_server((s.getsockname()[0], 0), family=s.family)


def _nccl(here: dict[str, Any], listener: socket.socket) -> Any:
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    listener.close()  # it listens there itself
    return trainer_init(here)


class Stream:
    """To each of the server's workers a connection, over which bytes go as they lie in memory: the part of vLLM's
    PyNcclCommunicator that a transfer needs."""

    def __init__(self, here: dict[str, Any], listener: socket.socket, answer: Future[Any], timeout: float) -> None:
        self.workers: list[socket.socket] = []
        listener.settimeout(1)
        while len(self.workers) < here["world_size"] - 1:
            try:
                self.workers.append(listener.accept()[0])
            except TimeoutError:
                if answer.done():  # they will not come
                    answer.result()
                    raise ConnectionError(f"the workers of the vLLM server did not connect to {here}") from None
        for worker in self.workers:
            worker.settimeout(timeout)  # one that hangs takes nothing and closes nothing

    def broadcast(self, tensor: Tensor, src: int) -> None:
        copy = tensor.to(
            "cpu", copy=True
        )  # numpy would lock the storage of the weights themselves, which FSDP2 resizes
        for worker in self.workers:
            worker.sendall(_bytes(copy))

    def destroy(self) -> None:
        for worker in self.workers:
            worker.close()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def register() -> None:
    """vLLM calls this in each of its processes (the entry point `vllm.general_plugins`)."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
    except ImportError:  # of another version, which must start all the same: it will say that it knows no lit_rl
        return

    class StreamWeightTransferEngine(NCCLWeightTransferEngine):  # type: ignore[misc]
        """Its protocol is that of `nccl`, with a TCP connection in place of the communicator."""

        def init_transfer_engine(self, init_info: Any) -> None:
            self.model_update_group = Receiver((init_info.master_address, init_info.master_port))

        def update_weights(self, update_info: dict[str, Any]) -> None:
            info = self.parse_update_info(update_info)
            try:
                self.model.load_weights(self._arriving(info))
            except BaseException:
                self.shutdown()  # or the trainer would go on sending, for ever
                raise
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

        def _arriving(self, info: Any) -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self.model_update_group.receive(_bytes(tensor))
                yield name, tensor.to(self.device)

    if "lit_rl" not in WeightTransferEngineFactory._registry:  # it may be called again
        WeightTransferEngineFactory.register_engine("lit_rl", StreamWeightTransferEngine)


class Receiver:
    """A worker's end of a `Stream`."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.connection = socket.create_connection(address, timeout=60)

    def receive(self, view: memoryview) -> None:
        while view:
            got = self.connection.recv_into(view)
            if not got:
                raise ConnectionError("the trainer has closed the connection before all weights were there")
            view = view[got:]

    def destroy(self) -> None:
        self.connection.close()
