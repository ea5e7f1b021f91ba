#!/usr/bin/env bash
# Train, merge and evaluate on this machine without a GPU: PW-OPSD trains a small transformer on its own rollouts, its
# checkpoint-100 is merged, and base and trained model are evaluated on held-out problems.
#
#   bash launchers/quickstart.sh
#
# The same command continues an interrupted quickstart; a finished one only prints its result.
#
#   METHOD       opsd, eopd, reopold or pwopsd (default)
#   ROLLOUT      hf (default) or vllm: what samples, in training and in evaluation
#   VAL_N        samples a problem (default 4)
#   NUM_SAMPLES  only the first so many of the 256 held-out problems
#   OUTPUT_ROOT, EVAL_ROOT   default outputs/ and eval_results/ of this checkout
#   and those of launchers/common.sh

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

METHOD="${METHOD:-pwopsd}"
is_one_of "$METHOD" "${METHODS[@]}" || die 2 "METHOD=$METHOD: choose from ${METHODS[*]}"
export ROLLOUT="${ROLLOUT:-hf}"
is_one_of "$ROLLOUT" hf vllm || die 2 "ROLLOUT=$ROLLOUT: use hf or vllm"
export ENGINE="$ROLLOUT" VAL_N="${VAL_N:-4}" RUN_NAME="small_${METHOD}_quickstart" MERGE_STEP=100
[[ "$ROLLOUT" == hf ]] || RUN_NAME+="_$ROLLOUT"
OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO_ROOT/outputs}"
EVAL_ROOT="${EVAL_ROOT:-$REPO_ROOT/eval_results}"
export OUTPUT_ROOT EVAL_ROOT
SEED=1
STEPS=100
# The base and the trained model must be measured by the same engine, so its name is part of the files'.
BASE_NAME="small_base"
[[ "$ROLLOUT" == hf ]] || BASE_NAME+="_$ROLLOUT"

started=$SECONDS
say "1/4  environment: .venv with the pinned requirements (a few minutes the first time)"
if [[ "$ROLLOUT" == vllm ]]; then
  ensure_venv --with-vllm
else
  ensure_venv
fi
[[ "$DRY_RUN" == 1 ]] || say "     ready after $((SECONDS - started)) s"
started=$SECONDS

evaluate() { # NAME
  WAIT=1 bash "$REPO_ROOT/launchers/run_eval.sh" "$1" small 1 "$SEED"
}

# With a second core the base is measured while the other model trains.
base_in_background=0
if [[ "$DRY_RUN" != 1 ]] && (($(nproc 2>/dev/null || echo 1) > 1)); then
  base_in_background=1
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  say "2/4  the base model on held-out problems, in the background"
  mkdir -p -- "$EVAL_ROOT/logs"
  evaluate "$BASE_NAME" >"$EVAL_ROOT/logs/quickstart_base.out" 2>&1 &
  base_process=$!
  # An interrupted quickstart ends its evaluation too.
  trap 'kill "$base_process" 2>/dev/null || true' EXIT
else
  say "2/4  the base model on held-out problems"
  evaluate "$BASE_NAME"
fi

say "3/4  $METHOD: $STEPS optimizer steps of 32 fresh rollouts, then the merge of checkpoint-100"
bash "$REPO_ROOT/launchers/train.sh" small "$METHOD" --max_steps "$STEPS"
[[ "$DRY_RUN" == 1 ]] || [[ -f "$OUTPUT_ROOT/${RUN_NAME}_merged/.ready_for_eval" ]] \
  || die 3 "the merge left no sentinel in $OUTPUT_ROOT/${RUN_NAME}_merged"

say "4/4  the trained model on the same problems"
evaluate "$RUN_NAME"
if ((base_in_background)); then
  if ! wait "$base_process"; then
    tail -n 5 -- "$EVAL_ROOT/logs/quickstart_base.out" >&2
    die 3 "the evaluation of the base model failed (its last lines are above)"
  fi
  trap - EXIT
fi

result_of() { # NAME
  result_stem "$1" small "$SEED" --max_new_tokens "${MAX_NEW_TOKENS:-160}" ${NUM_SAMPLES:+--num_samples "$NUM_SAMPLES"}
}
BASE_RESULT="$EVAL_ROOT/$(result_of "$BASE_NAME").json"
TRAINED_RESULT="$EVAL_ROOT/$(result_of "$RUN_NAME").json"
run "$VENV_PYTHON" "$REPO_ROOT/testbed/compare.py" "$BASE_RESULT" "$TRAINED_RESULT"
if [[ "$DRY_RUN" != 1 ]]; then
  printf '\n%s\n' "Where it is:"
  printf '  %-22s%s\n' \
    "adapter checkpoints" "$OUTPUT_ROOT/$RUN_NAME/checkpoint-*" \
    "metrics, completions" "$OUTPUT_ROOT/$RUN_NAME/metrics.jsonl, completions/" \
    "merged model" "$OUTPUT_ROOT/${RUN_NAME}_merged" \
    "every sample, graded" "$BASE_RESULT, $TRAINED_RESULT"
  say "done in $((SECONDS - started)) s after installation"
fi
