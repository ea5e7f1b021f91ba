#!/usr/bin/env bash
# Evaluate one model on one benchmark: 12 samples a problem, graded, into one JSON.
#
#   bash launchers/run_eval.sh METHOD_NAME DATASET [TP] [SEED] [-- flags of evaluate_math.py ...]
#
#   METHOD_NAME  a run, MODEL_METHOD or MODEL_METHOD_anything, whose merged model is outputs/METHOD_NAME_merged; or
#                MODEL, MODEL_base or MODEL_base_anything, the untrained model.  MODEL: a file of launchers/models/ without .sh
#   DATASET      math500, aime24, aime25, hmmt25, aime26, hmmt_feb26, small, small_hard
#   TP           GPUs that share one copy of the model (default 4 with vllm, 1 with hf)
#   SEED         a whole number from 0; without one the samples are seed 0's and the name holds no seed
#
# Writes eval_results/METHOD_NAME_DATASET_38k_seedSEED.json (opsd/evaluation/names.py has the rule for the name) and a
# log in eval_results/logs/. The same command resumes a killed evaluation and leaves a finished JSON of this very run
# alone; one of another regime or model is renamed, never deleted. Two workers on one cell: the first does it, the
# second says so and exits 0 at once.
#
#   WAIT=1           the second worker waits instead, and finds the finished JSON
#   HOSTLABEL        this worker's name in the log's name (default worker)
#   ENGINE           vllm or hf (default: the model's)
#   VAL_N, NUM_SAMPLES, MAX_NEW_TOKENS, MAX_MODEL_LEN   as the flags of evaluate_math.py (default: the paper's)
#   DATASET_PATH     a local file or folder that replaces DATASET; DATASET may then be any name
#   BASE_MODEL_PATH  a local copy of the base model
#   ADAPTER=1        the base model with outputs/METHOD_NAME/checkpoint-STEP, instead of the merged model; `_adapter` in
#                    the name. STEP: MERGE_STEP, or the merged one, or 100
#   OUTPUT_ROOT, EVAL_ROOT   default outputs/ and eval_results/ of this checkout
#   and those of launchers/common.sh
#
# Exit codes: 0 done (or another worker's), 2 a wrong argument, 3 no merged model or no sentinel.

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  die 2 "$1. Usage: bash launchers/run_eval.sh METHOD_NAME DATASET [TP] [SEED] [-- flags]"
}

# A path that still holds after the change to REPO_ROOT; inside it, relative, so that results name the same model in
# every checkout.
portable() {
  local path="$1"
  [[ "$path" == /* ]] || path="$PWD/$path"
  printf '%s' "${path#"$REPO_ROOT"/}"
}

ARGUMENTS=()
while (($#)) && [[ "$1" != -- ]]; do
  ARGUMENTS+=("$1")
  shift
done
(($# == 0)) || shift
((${#ARGUMENTS[@]} >= 2)) || usage "METHOD_NAME and DATASET are needed"
((${#ARGUMENTS[@]} <= 4)) || usage "too many arguments ('${ARGUMENTS[4]}')"
METHOD_NAME="${ARGUMENTS[0]}" DATASET="${ARGUMENTS[1]}" SEED="${ARGUMENTS[3]:-}"

# The last model that fits has the longest name; TRAINED is 0 for the untrained model.
MODEL="" TRAINED=0
for tag in "${MODEL_TAGS[@]}"; do
  for method in base "${METHODS[@]}"; do
    if [[ "$METHOD_NAME" == "$tag" || "${METHOD_NAME}_" == "${tag}_${method}_"* ]]; then
      MODEL="$tag" TRAINED=1
      [[ "$METHOD_NAME" != "$tag" && "$method" != base ]] || TRAINED=0
    fi
  done
done
[[ -n "$MODEL" ]] || usage "unknown method '$METHOD_NAME': not MODEL_METHOD (METHOD: ${METHODS[*]}) nor MODEL_base"
[[ -z "${DATA_PARALLEL:-}" ]] || die 2 "DATA_PARALLEL=$DATA_PARALLEL: unknown; start one worker for each GPU instead"
EVAL_FLAGS=()
# shellcheck source=models/qwen3_4b_base.sh
source "$REPO_ROOT/launchers/models/$MODEL.sh"
ENGINE="${ENGINE:-$DEFAULT_ROLLOUT}"
DEFAULT_TP=4
[[ "$ENGINE" == hf || "$DEVICE" == cpu ]] && DEFAULT_TP=1
OUTPUT_ROOT="$(portable "${OUTPUT_ROOT:-$REPO_ROOT/outputs}")"
EVAL_ROOT="$(portable "${EVAL_ROOT:-$REPO_ROOT/eval_results}")"
EVALUATED="$OUTPUT_ROOT/${METHOD_NAME}_merged"
ADAPTER="${ADAPTER:-0}"
[[ "$ADAPTER" == [01] ]] || die 2 "ADAPTER=$ADAPTER: write 0 or 1"
ADAPTER_FLAGS=()
if ((ADAPTER)); then
  ((TRAINED)) || die 2 "ADAPTER=1: $METHOD_NAME is the untrained model, which has no adapter; leave it out"
  STEP="$(cd -- "$REPO_ROOT" && sed -n 's/.*"adapter_step": \([0-9]*\).*/\1/p' "$EVALUATED/.ready_for_eval" 2>/dev/null)" \
    || true
  STEP="${MERGE_STEP:-${STEP:-100}}"
  ADAPTER_FLAGS=(--adapter "$OUTPUT_ROOT/$METHOD_NAME/checkpoint-$STEP")
fi
if ((!TRAINED || ADAPTER)); then
  EVALUATED="${BASE_MODEL#"$REPO_ROOT"/}"
  [[ -z "${BASE_MODEL_PATH:-}" ]] || EVALUATED="$(portable "$BASE_MODEL_PATH")"
fi
MORE=(${ADAPTER_FLAGS[@]+"${ADAPTER_FLAGS[@]}"} --engine "$ENGINE" --tensor_parallel_size "${ARGUMENTS[2]:-$DEFAULT_TP}" --seed "${SEED:-0}" --replace)
[[ -z "${DATASET_PATH:-}" ]] || MORE+=(--dataset_path "$(portable "$DATASET_PATH")")
MORE+=(${EVAL_FLAGS[@]+"${EVAL_FLAGS[@]}"})
for name in VAL_N NUM_SAMPLES MAX_NEW_TOKENS MAX_MODEL_LEN; do
  [[ -z "${!name:-}" ]] || MORE+=("--${name,,}" "${!name}")
done
MORE+=("$@")
STEM="$(result_stem "$METHOD_NAME" "$DATASET" "$SEED" "${MORE[@]}")" || exit $?
COMMAND=("$VENV/bin/python" "$REPO_ROOT/evaluate_math.py")
COMMAND+=(--base_model "$EVALUATED" --dataset "$DATASET" --output "$EVAL_ROOT/$STEM.json" "${MORE[@]}")

cd -- "$REPO_ROOT"
if [[ "$DRY_RUN" == 1 ]]; then
  run "${COMMAND[@]}"
  exit 0
fi
if ((TRAINED && !ADAPTER)); then
  remedy="run launchers/train.sh or merge_lora.py"
  [[ -d "$EVALUATED" ]] || die 3 "no merged model at $EVALUATED; $remedy"
  [[ -f "$EVALUATED/.ready_for_eval" ]] \
    || die 3 "$EVALUATED has no .ready_for_eval: its merge did not finish; $remedy again"
fi
mkdir -p -- "$EVAL_ROOT/logs" "$EVAL_ROOT/.locks" || die 3 "cannot write in $EVAL_ROOT"
# The lock ends with the process that holds it, and the evaluation inherits it, so that it outlives a killed launcher.
exec 9>"$EVAL_ROOT/.locks/$STEM.lock"
if ! try_lock "$EVAL_ROOT/.locks"; then
  if [[ "${WAIT:-0}" != 1 ]]; then
    say "another worker is on $STEM; nothing to do here (WAIT=1 waits for it)"
    exit 0
  fi
  say "another worker is on $STEM; waiting for it"
  flock 9
fi
if [[ "$ENGINE" == vllm ]]; then ensure_venv --with-vllm; else ensure_venv; fi
LABEL="${HOSTLABEL:-worker}"
LOG="$EVAL_ROOT/logs/${STEM}_${LABEL//[^A-Za-z0-9._-]/_}.log"
{
  printf '== %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  DRY_RUN=1 run "${COMMAND[@]}"
} >>"$LOG"
"${COMMAND[@]}" 2>&1 | tee -a -- "$LOG"
