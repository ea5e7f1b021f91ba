#!/usr/bin/env bash
# What bfloat16 merges cost in the small world: rollouts by merged weights or by the adapter, and the trained model
# evaluated as merged in bfloat16, as merged in float32 and as base + adapter (docs/merging.md).
#
#   bash launchers/reproduce_bf16.sh           DRY_RUN=1 prints every command instead
#
# The same command continues after an interruption. At the end it writes docs/small_world/bf16.jsonl and the tables and
# the picture of docs/merging.md (testbed/bf16_study.py).
#
#   RATES, TRAINING_SEEDS   lists in quotes (5e-6 1e-4 and 1 2 3)
#   STEPS                   optimizer steps (50)
#   JOBS                    runs at the same time, one thread each (default: the cores)
#   OUTPUT_ROOT             default outputs/ of this checkout

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read -r -a RATE_LIST <<<"${RATES:-5e-6 1e-4}"
read -r -a SEED_LIST <<<"${TRAINING_SEEDS:-1 2 3}"
STEPS="${STEPS:-50}"
JOBS="${JOBS:-$(nproc 2>/dev/null || echo 1)}"
for name in STEPS JOBS; do
  is_count "${!name}" || die 2 "$name='${!name}' is not a positive whole number"
done
[[ "$DRY_RUN" == 1 ]] && JOBS=1
export OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO_ROOT/outputs}" OMP_NUM_THREADS=1 MERGE_STEP="$STEPS"
RESULTS="$OUTPUT_ROOT/bf16_results"
export BASE_MODEL_PATH="$OUTPUT_ROOT/small_bf16_base"

evaluate() { # NAME FORM MODEL [flags]
  run "$VENV_PYTHON" "$REPO_ROOT/evaluate_math.py" --base_model "$3" --dataset small --engine hf --hf_batch_size 128 \
    --max_new_tokens 160 --val_n 4 --seed 1 --grading_workers 1 --output "$RESULTS/$1.$2.json" "${@:4}"
}

cell() { # METHOD RATE SEED WEIGHTS
  local name="small_$1_bf16_$4_lr$2_t$3"
  local run="$OUTPUT_ROOT/$name"
  RUN_NAME="$name" ROLLOUT=vllm bash "$REPO_ROOT/launchers/train.sh" small "$1" --learning_rate "$2" --seed "$3" \
    --max_steps "$STEPS" --bf16 True --rollout_weights "$4" --log_completions_steps 1 || return
  [[ "$3" == "${SEED_LIST[0]}" && "$4" == merged ]] || return 0
  run "$VENV_PYTHON" "$REPO_ROOT/merge_lora.py" --base_model "$BASE_MODEL_PATH" --adapter "$run/checkpoint-$STEPS" \
    --output "${run}_float32_merged" --dtype float32 || return
  evaluate "$name" merged "${run}_merged"
  evaluate "$name" float32 "${run}_float32_merged"
  evaluate "$name" adapter "$BASE_MODEL_PATH" --adapter "$run/checkpoint-$STEPS"
}

ensure_venv --with-vllm
run "$VENV_PYTHON" "$REPO_ROOT/testbed/bf16_study.py" base "$BASE_MODEL_PATH"
[[ "$DRY_RUN" == 1 ]] || mkdir -p -- "$RESULTS"
FAILED=0
for rate in "${RATE_LIST[@]}"; do
  for seed in "${SEED_LIST[@]}"; do
    for method in pwopsd opsd eopd reopold; do
      for weights in merged adapter; do
        # The rollouts are compared with one method, over all seeds; the forms of evaluation with all, at one seed.
        [[ "$method" == pwopsd || ("$weights" == merged && "$seed" == "${SEED_LIST[0]}") ]] || continue
        while (($(jobs -rp | wc -l) >= JOBS)); do wait -n || FAILED=1; done
        log="$RESULTS/${method}_${weights}_${rate}_$seed.log"
        if [[ "$DRY_RUN" == 1 ]]; then
          cell "$method" "$rate" "$seed" "$weights"
        else
          say "$method, rollouts by $weights weights, rate $rate, seed $seed"
          cell "$method" "$rate" "$seed" "$weights" >"$log" 2>&1 &
        fi
      done
    done
  done
done
while (($(jobs -rp | wc -l) > 0)); do wait -n || FAILED=1; done
((!FAILED)) || die 1 "a run failed (logs: $RESULTS/*.log); the same command continues from here"
run "$VENV_PYTHON" "$REPO_ROOT/testbed/bf16_study.py" collect
run "$VENV_PYTHON" "$REPO_ROOT/testbed/bf16_study.py" report
