#!/usr/bin/env bash
# From nothing to a language model that learned by reinforcement: installs into .venv, warm-starts, trains, evaluates.
# Results: runs/quickstart/summary.json and runs/quickstart/report.html. Arguments go to scripts/quickstart.py.
set -euo pipefail
source "$(dirname "$0")/env.sh" ""
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two threads on a busy machine are far slower than one
exec .venv/bin/python scripts/quickstart.py "$@"
