"""A real `vllm serve` takes our weights, says what we would, and may be killed."""

import os
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec

import pytest
from test_vllm import PROMPTS, gap, learn, seeds, tiny

from lit_rl import Sampling, VLLMServer

# The package for CPUs has another name than the command asks for.
SERVE = """import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: "0.32.0+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    main()
"""


def serve(script, port):
    script.write_text(SERVE)
    options = f"--port {port} --host 127.0.0.1 --logprobs-mode processed_logprobs --enable-scale-out --enforce-eager"
    small = f"--kv-cache-memory-bytes {2**26} --max-model-len 256 --dtype float32"
    return subprocess.Popen(
        [sys.executable, script, "serve", "model", *options.split(), *small.split()],
        env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        start_new_session=True,
    )


def kill(process):
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: bash scripts/vllm.sh")
def test_a_server_has_our_weights_also_after_it_was_killed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    generator = VLLMServer(f"http://127.0.0.1:{port}", "weights", max_model_len=256, timeout=120)
    actor = tiny(generator)
    from lit_rl import models

    models.export(actor.model, actor.tokenizer, "model")
    processes = [serve(tmp_path / "serve.py", port)]
    try:
        for _ in range(2):
            learn(actor.model)
            generator.sync(actor.model)
            for sampling in (Sampling(16), Sampling(16, temperature=0.7)):
                assert gap(actor, generator.generate(PROMPTS, seeds(), sampling), sampling) < 1e-4
        want = generator.generate(PROMPTS, seeds(), Sampling(200))

        kill(processes[0])
        threading.Timer(1, lambda: processes.append(serve(tmp_path / "serve.py", port))).start()
        with pytest.warns(UserWarning, match="Connection refused.*again"):
            got = generator.generate(PROMPTS, seeds(), Sampling(200))
        assert [[c.tokens.tolist() for c in row] for row in got] == [[c.tokens.tolist() for c in row] for row in want]
    finally:
        for process in processes:
            kill(process)
