"""Real `vllm serve`s take our weights, say what we would, and may be killed."""

import os
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from itertools import count

import pytest
import test_vllm_ranks
import torch
import worker
from test_ranks import assert_equal, free_port, run_by_two
from test_vllm import PROMPTS, gap, learn, seeds, tiny

from lit_rl import Sampling, VLLMServer
from lit_rl.export import export_model
from lit_rl.generation.vllm_transfer import Stream, send

# The package for CPUs has another name than the command asks for.
SERVE = """import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: "0.32.0+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


def serve(script, port, *more):
    script.write_text(SERVE)
    options = f"--port {port} --host 127.0.0.1 --logprobs-mode processed_logprobs --enable-scale-out --enforce-eager"
    small = f"--kv-cache-memory-bytes {2**26} --max-model-len 256 --dtype float32"
    return subprocess.Popen(
        [sys.executable, script, "serve", "model", *options.split(), *small.split(), *more],
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        start_new_session=True,
    )


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: bash scripts/vllm.sh")
def test_servers_have_our_weights_whatever_happens(tmp_path, monkeypatch):
    """One of them takes weights over TCP, the other reads them from a folder."""
    ports = [free_port() for _ in range(2)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    generator = VLLMServer(urls, "weights", max_model_len=256, timeout=120)
    actor = tiny(generator)
    export_model(actor.model, actor.tokenizer, "model")
    script, streaming = tmp_path / "serve.py", (ports[0], "--weight-transfer-config", '{"backend": "lit_rl"}')
    processes = [serve(script, *streaming), serve(script, ports[1])]

    def assert_ours(sampling):
        assert gap(actor, generator.generate(PROMPTS, seeds(), sampling), sampling) < 1e-4

    try:
        for _ in range(2):
            learn(actor.model)
            with pytest.warns(UserWarning, match=f"{urls[1]} takes weights by no --weight.* through the folder"):
                generator.sync(actor.model)
            for sampling in (Sampling(16), Sampling(16, temperature=0.7)):
                assert_ours(sampling)

        learn(actor.model)  # and the network fails in the middle of it
        broadcast, sent = Stream.broadcast, count()

        def interrupted(*args):
            if next(sent) == 5:
                raise ConnectionError("the cable was pulled")
            broadcast(*args)

        monkeypatch.setattr(Stream, "broadcast", interrupted)
        with pytest.warns(UserWarning, match="the cable was pulled.*again"):
            generator.sync(actor.model)
        assert_ours(Sampling(16))

        monkeypatch.setenv("VLLM_URL", urls[0])
        two, one = run_by_two(test_vllm_ranks.__file__, tmp_path), test_vllm_ranks.learn(1, "")
        for strategy in worker.STRATEGIES:
            assert_equal(one, *two("vllm", strategy))

        with pytest.warns(UserWarning, match=f"{urls[0]} has other weights by now.*again"):  # those of the two ranks
            want = generator.generate(PROMPTS, seeds(), Sampling(200))
        kill(processes[0])
        threading.Timer(1, lambda: processes.append(serve(script, *streaming))).start()
        with pytest.warns(UserWarning, match="Connection refused.*again"):
            got = generator.generate(PROMPTS, seeds(), Sampling(200))
        assert [[c.tokens.tolist() for c in row] for row in got] == [[c.tokens.tolist() for c in row] for row in want]
    finally:
        for process in processes:
            kill(process)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: bash scripts/vllm.sh")
def test_the_protocol_of_nccl_is_vllms(monkeypatch):
    """All of it but NCCL itself, which needs a GPU: rendezvous and messages are vLLM's, broadcasts go over its CPU store."""
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.distributed.weight_transfer import nccl_common
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    class Communicator:
        def __init__(self, here, rank):
            where = here["master_address"], here["master_port"]
            self.group = StatelessProcessGroup.create(*where, rank, here["world_size"])

        def broadcast(self, tensor, src):
            return self.group.broadcast(tensor, src)

        def destroy(self):
            said.append("destroy")

    said, got, joined = [], {}, []

    def post(verb, **body):
        said.append(verb)
        if verb == "init_weight_transfer_engine":
            info = nccl_common.NCCLWeightTransferInitInfo(**body["init_info"])
            assert not info.packed
            joined.append(Communicator(vars(info), info.rank_offset))
        if verb == "update_weights":
            info = NCCLWeightTransferUpdateInfo(**body["update_info"])
            for name, dtype, shape in zip(info.names, info.dtype_names, info.shapes, strict=True):
                got[name] = joined[0].broadcast(torch.empty(shape, dtype=getattr(torch, dtype)), 0)

    monkeypatch.setattr(nccl_common, "trainer_init", lambda here: Communicator(here, 0))
    weights = {"matrix": torch.randn(4, 3).T, "vector": torch.nn.Parameter(torch.randn(5)), "whole": torch.arange(3)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        send(post, "nccl", f"http://127.0.0.1:{server.getsockname()[1]}", 1, weights, torch.bfloat16, 60)
    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    assert said == ["init_weight_transfer_engine", *update, "destroy", "shutdown_weight_transfer_engine"]
    for name, want in weights.items():
        assert torch.equal(got[name], want if name == "whole" else want.bfloat16())


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_worker_that_hangs_is_an_error(host):
    """It has connected and reads nothing; the server's own answer has failed by then."""
    connections = []

    def post(verb, **body):
        if verb == "init_weight_transfer_engine":
            info = body["init_info"]
            connections.append(socket.create_connection((info["master_address"], info["master_port"])))
        if verb == "update_weights":
            raise TimeoutError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    url = f"http://{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"
    weights = {"large": torch.zeros(2**24)}  # more than the sockets' buffers
    with server, pytest.raises(TimeoutError, match="timed out"):
        send(post, "lit_rl", url, 1, weights, torch.float32, 0.5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (None, "by no --weight-transfer-config, neither by nccl nor by lit_rl"),
        ("ipc", "by ipc, neither by nccl nor by lit_rl"),
        ("nccl", "by nccl, from GPU to GPU, and the model is not on one"),
    ],
)
def test_weights_that_have_no_way_to_a_server_are_an_error(backend, message, monkeypatch):
    generator = VLLMServer("http://127.0.0.1:8000")
    config = {"model_config": {"logprobs_mode": "processed_logprobs"}}
    config["weight_transfer_config"] = backend and {"backend": backend}
    answers = {"server_info?config_format=json": {"vllm_config": config}, "weight_info": {"weight_version": "default"}}
    monkeypatch.setattr(generator, "_get", lambda url, verb: answers[verb])
    monkeypatch.setattr(generator, "_post", lambda url, verb, **body: None)
    with pytest.raises(ValueError, match=f"{message}: start it with .* or set the generator's `folder`"):
        generator.sync(tiny(generator).model)
