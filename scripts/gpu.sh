#!/usr/bin/env bash
# What only a GPU can tell: the tests of kernels and runs there, then the benchmarks. Needs the package with its extra `dev`.
#   bash scripts/gpu.sh FOLDER [tests|head|update|sparse|grpo]...     (all by default; logs and numbers go to FOLDER)
# A part that fails or takes too long does not stop those after it; PYTHON and SECONDS_EACH (of a part) may be set.
set -uo pipefail
mkdir -p "${1:?a folder for logs and numbers}"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline
export CUBLAS_WORKSPACE_CONFIG=:4096:8
python=${PYTHON:-python3} failed=0

part() {  # its name, then the command
    local name=$1
    shift
    echo "== $name"
    timeout --kill-after 5 "${SECONDS_EACH:-600}" "$@" > "$out/$name.log" 2>&1 || { failed=1; echo "failed with $?, see $out/$name.log"; }
    grep -v -E "^\{|^ *$" "$out/$name.log" | tail -n 40 | cut -c1-200
}

for name in "${@:-tests head update sparse grpo}"; do
    for one in $name; do
        case $one in
            tests) part tests "$python" -m pytest -q -n 8 --disable-warnings --tb=short -p no:cacheprovider tests/test_gpu.py \
                tests/test_recorded.py tests/test_attention.py tests/triton_checks.py tests/infllm_checks.py tests/triton_ternary_checks.py ;;
            head) part head "$python" scripts/bench/kernels.py --json "$out/kernels.json" ;;
            update) part update "$python" scripts/bench/update.py --json "$out/update.json" ;;
            sparse) part sparse "$python" scripts/bench/sparse_attention_gpu.py --json "$out/sparse.json" ;;
            grpo) part grpo "$python" scripts/bench/grpo.py --device cuda --repeats 1 --limit 90 --json "$out/grpo.json" ;;
            *) echo "unknown part $one"; exit 2 ;;
        esac
    done
done
exit $failed
