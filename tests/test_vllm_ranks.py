"""Each of two ranks has its own vLLM, and they learn what one process does. One of the engines fails on the way.

As a script it is a rank (see worker.py); with the server at VLLM_URL if that is set.
"""

import os
import warnings
from importlib.util import find_spec

import pytest
import torch.distributed as dist
import worker
from test_ranks import assert_equal, run_by_two

from lit_rl import VLLM, VLLMServer


class Failing(VLLM):
    """Rank 1's, in the second step, when the others have long begun to wait for its samples."""

    steps = 0

    def _sample(self, asked):
        self.steps += 1
        if self.steps == 2 and dist.get_world_size() == 2 and dist.get_rank() == 1:
            raise RuntimeError("CUDA error: an illegal memory access")
        return super()._sample(asked)


def learn(ranks, strategy):
    if url := os.environ.get("VLLM_URL"):
        return worker.learn(ranks, strategy, settings={"generator": VLLMServer(url, timeout=120)}, data={"long": (3,)})
    generator = Failing(max_model_len=256, options={"kv_cache_memory_bytes": 2**26, "enforce_eager": True})
    try:
        return worker.learn(ranks, strategy, settings={"generator": generator}, data={"long": (3,)})
    finally:
        generator.stop()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: bash scripts/vllm.sh")
def test_ranks_with_an_engine_each_learn_what_one_process_does(tmp_path):
    two, one = run_by_two(__file__, tmp_path), learn(1, "")
    assert one["metrics"].pop("sampler/restarts") == 0
    for strategy in worker.STRATEGIES:
        both = two("vllm", strategy)
        assert [result["metrics"].pop("sampler/restarts") for result in both] == [1, 1]  # whichever rank's it was
        assert_equal(one, *both)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    worker.main({"vllm": learn})
