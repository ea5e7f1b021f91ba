#!/usr/bin/env bash
# Evaluate one model on one benchmark: 12 samples a problem, graded, into one JSON.
#
#   bash launchers/run_eval.sh METHOD_NAME DATASET [TP] [SEED] [-- flags of evaluate_math.py ...]
#
#   METHOD_NAME  a run, MODEL_METHOD or MODEL_METHOD_anything, whose merged model is outputs/METHOD_NAME_merged; or
#                MODEL, MODEL_base or MODEL_base_anything, the untrained model.  MODEL: a file of launchers/models/ without .sh
#   DATASET      math500, aime24, aime25, hmmt25, small, small_hard
#   TP           GPUs that share one copy of the model (default 4 with vllm, 1 with hf)
#   SEED         a whole number from 0; without one the samples are seed 0's and the name holds no seed
#
# Writes eval_results/METHOD_NAME_DATASET_38k_seedSEED.json (no _DATASET for math500, no _seedSEED without one; 38k
# is 38,912 new tokens, other lengths and the first K problems have other names: opsd/evaluation/names.py), and all
# output also to eval_results/logs/. A killed evaluation is continued by the same command. A finished JSON
# of the very same run is left as it is; one of another regime or model is set aside under a new name, never
# deleted. Two workers on one cell: the first does it, the second says so and exits 0 at once.
#
#   WAIT=1           the second worker waits instead, and finds the finished JSON
#   HOSTLABEL        this worker's name in the log's name (default worker)
#   ENGINE           vllm or hf (default: the model's)
#   VAL_N, NUM_SAMPLES, MAX_NEW_TOKENS, MAX_MODEL_LEN   as the flags of evaluate_math.py (default: the paper's)
#   DATASET_PATH     a local file or folder that stands in for DATASET; DATASET may then be any name
#   BASE_MODEL_PATH  a local copy of the base model
#   OUTPUT_ROOT, EVAL_ROOT   default outputs/ and eval_results/ of this checkout
#   and those of launchers/common.sh
#
# Exit codes: 0 done (or another worker's), 2 a wrong argument, 3 no merged model or no sentinel.

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

DATASETS=(math500 aime24 aime25 hmmt25 small small_hard)

usage() {
  die 2 "$1. Usage: bash launchers/run_eval.sh METHOD_NAME DATASET [TP] [SEED] [-- flags]"
}

# A path of the caller's as one that holds after the change to REPO_ROOT; inside it, relative, so that results
# name the same model in every checkout.
portable() {
  local path="$1"
  [[ "$path" == /* ]] || path="$PWD/$path"
  printf '%s' "${path#"$REPO_ROOT"/}"
}

# Sets MODEL (a tag) and TRAINED (1 for a run, 0 for the base), the longest tag that fits first.
parse_method_name() {
  local file tag rest method found=""
  for file in "$REPO_ROOT"/launchers/models/*.sh; do
    tag="$(basename -- "$file" .sh)"
    [[ "$METHOD_NAME" == "$tag" || "$METHOD_NAME" == "${tag}_"* ]] || continue
    rest="${METHOD_NAME#"$tag"}"
    rest="${rest#_}"
    if [[ -z "$rest" || "$rest" == base || "$rest" == base_* ]]; then
      found="$tag" TRAINED=0
    fi
    for method in "${METHODS[@]}"; do
      if [[ "$rest" == "$method" || "$rest" == "${method}_"* ]]; then
        found="$tag" TRAINED=1
      fi
    done
  done
  [[ -n "$found" && "$METHOD_NAME" =~ ^[A-Za-z0-9._-]+$ ]] \
    || usage "unknown method '$METHOD_NAME': not MODEL_METHOD (METHOD: ${METHODS[*]}) nor MODEL_base"
  MODEL="$found"
}

check_arguments() {
  if [[ -n "${DATASET_PATH:-}" ]]; then
    [[ "$DATASET" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || usage "the dataset's name '$DATASET' does not fit a file name"
  else
    is_one_of "$DATASET" "${DATASETS[@]}" || usage "unknown dataset '$DATASET': choose from ${DATASETS[*]}"
  fi
  is_one_of "$ENGINE" vllm hf || die 2 "ENGINE=$ENGINE: use vllm or hf"
  is_count "$TP" || usage "the tensor parallel size '$TP' is not a positive whole number"
  [[ -z "$SEED" || "$SEED" =~ ^(0|[1-9][0-9]{0,17})$ ]] || usage "the seed '$SEED' is not a whole number from 0"
  if [[ "$ENGINE" == hf && "$TP" != 1 ]]; then
    usage "ENGINE=hf takes no tensor parallel size ('$TP'); use ENGINE=vllm"
  fi
  local name
  [[ -z "${DATA_PARALLEL:-}" ]] || die 2 "DATA_PARALLEL=$DATA_PARALLEL: unknown; start one worker for each GPU instead"
  for name in VAL_N NUM_SAMPLES MAX_NEW_TOKENS MAX_MODEL_LEN; do
    [[ -z "${!name:-}" ]] || is_count "${!name}" || die 2 "$name=${!name}: give a positive whole number"
  done
}

# Exit 3 with what is missing and how to make it.
check_merged_folder() {
  local merged="$1"
  [[ -d "$merged" ]] || die 3 "no merged model at $merged; make it with launchers/train.sh or merge_lora.py"
  [[ -f "$merged/.ready_for_eval" ]] \
    || die 3 "$merged has no .ready_for_eval: its merge did not finish; run launchers/train.sh or merge_lora.py again"
}

# Only one worker at a time on this cell. The lock goes with the process that holds it, however that ends; the
# evaluation inherits it, so that it outlives a killed launcher.
take_lock() {
  local code=0
  mkdir -p -- "$EVAL_ROOT/logs" "$EVAL_ROOT/.locks" || die 3 "cannot write in $EVAL_ROOT"
  exec 9>"$EVAL_ROOT/.locks/$STEM.lock"
  if ! command -v flock >/dev/null; then
    say "no flock here: a second worker on this cell is stopped by the evaluation's own lock"
    return
  fi
  flock -n 9 || code=$?
  if ((code == 1)) && [[ "${WAIT:-0}" != 1 ]]; then
    say "another worker is on $STEM; nothing to do here (WAIT=1 waits for it)"
    exit 0
  elif ((code == 1)); then
    say "another worker is on $STEM; waiting for it"
    code=0
    flock 9 || code=$?
  fi
  # 1 is a lock that another holds; anything else means that nobody can lock here.
  ((code == 0)) || die 3 "$EVAL_ROOT/.locks cannot be locked (flock: exit code $code); set EVAL_ROOT to a file system with locks"
}

METHOD_NAME="${1:-}"
DATASET="${2:-}"
ARGUMENTS=()
while (($#)) && [[ "$1" != -- ]]; do
  ARGUMENTS+=("$1")
  shift
done
(($# == 0)) || shift
((${#ARGUMENTS[@]} >= 2)) || usage "METHOD_NAME and DATASET are needed"
((${#ARGUMENTS[@]} <= 4)) || usage "too many arguments ('${ARGUMENTS[4]}')"
SEED="${ARGUMENTS[3]:-}"

parse_method_name
EVAL_FLAGS=()
# shellcheck source=models/qwen3_4b_base.sh
source "$REPO_ROOT/launchers/models/$MODEL.sh"
ENGINE="${ENGINE:-$DEFAULT_ROLLOUT}"
DEFAULT_TP=4
[[ "$ENGINE" == hf || "$DEVICE" == cpu ]] && DEFAULT_TP=1
TP="${ARGUMENTS[2]:-$DEFAULT_TP}"
check_arguments

OUTPUT_ROOT="$(portable "${OUTPUT_ROOT:-$REPO_ROOT/outputs}")"
EVAL_ROOT="$(portable "${EVAL_ROOT:-$REPO_ROOT/eval_results}")"
if ((TRAINED)); then
  EVALUATED="$OUTPUT_ROOT/${METHOD_NAME}_merged"
elif [[ -n "${BASE_MODEL_PATH:-}" ]]; then
  EVALUATED="$(portable "$BASE_MODEL_PATH")"
else
  EVALUATED="${BASE_MODEL#"$REPO_ROOT"/}"
fi
MORE=()
[[ -z "${DATASET_PATH:-}" ]] || MORE+=(--dataset_path "$(portable "$DATASET_PATH")")
MORE+=(${EVAL_FLAGS[@]+"${EVAL_FLAGS[@]}"})
for name in VAL_N NUM_SAMPLES MAX_NEW_TOKENS MAX_MODEL_LEN; do
  [[ -z "${!name:-}" ]] || MORE+=("--${name,,}" "${!name}")
done
MORE+=("$@")
STEM="$(result_stem "$METHOD_NAME" "$DATASET" "$SEED" ${MORE[@]+"${MORE[@]}"})" || exit $?
FLAGS=(
  --base_model "$EVALUATED"
  --dataset "$DATASET"
  --output "$EVAL_ROOT/$STEM.json"
  --engine "$ENGINE"
  --tensor_parallel_size "$TP"
  --seed "${SEED:-0}"
  --replace
  ${MORE[@]+"${MORE[@]}"}
)

cd -- "$REPO_ROOT"
if [[ "$DRY_RUN" == 1 ]]; then
  ensure_venv
  run "$VENV_PYTHON" "$REPO_ROOT/evaluate_math.py" "${FLAGS[@]}"
  exit 0
fi
((!TRAINED)) || check_merged_folder "$EVALUATED"
take_lock
if [[ "$ENGINE" == vllm ]]; then
  ensure_venv --with-vllm
else
  ensure_venv
fi
LABEL="${HOSTLABEL:-worker}"
LOG="$EVAL_ROOT/logs/${STEM}_${LABEL//[^A-Za-z0-9._-]/_}.log"
{
  printf '== %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  printf '%q ' "$VENV_PYTHON" "$REPO_ROOT/evaluate_math.py" "${FLAGS[@]}"
  printf '\n'
} >>"$LOG"
code=0
"$VENV_PYTHON" "$REPO_ROOT/evaluate_math.py" "${FLAGS[@]}" 2>&1 | tee -a -- "$LOG" || code=$?
exit "$code"
