# Sourced by the other scripts: a virtual environment in .venv with lit-rl and the extras named in $1 (say "[dev]").
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
stamp=".venv/lit-rl-installed$(echo "$1" | tr -cd 'a-z')"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing into $PWD/.venv, which takes a few minutes"
  .venv/bin/python -c "import torch" 2>/dev/null || .venv/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0"
  .venv/bin/pip install --quiet --disable-pip-version-check -e ".$1"
  touch "$stamp"
fi
