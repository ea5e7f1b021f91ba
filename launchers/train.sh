#!/usr/bin/env bash
# Train one cell of the paper's table, merge its checkpoint-100 and leave the sentinel:
#
#   bash launchers/train.sh MODEL METHOD [flags of ea_opsd_train.py ...]
#
# MODEL is a file of launchers/models/ without .sh, METHOD one of opsd, eopd, reopold, pwopsd. Started again, it
# goes on where it was: training resumes from its newest complete checkpoint, a finished merge is not repeated.
#
#   NUM_PROCESSES     ranks (default: the model's); accumulation follows, the effective batch stays 32
#   PER_DEVICE_BATCH  sequences per rank and micro-batch (default: the model's)
#   ROLLOUT           hf or vllm (default: the model's)
#   RUN_NAME          default MODEL_METHOD; a run with other flags needs a name of its own
#   BASE_MODEL_PATH   a local copy of the base model
#   MERGE_STEP        the checkpoint that is merged (default 100)
#   OUTPUT_ROOT       default outputs/ of this checkout
#   and those of launchers/common.sh

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

EFFECTIVE_BATCH=32

usage() {
  die 2 "$1. Usage: bash launchers/train.sh MODEL METHOD [flags];\
 MODEL: $(model_tags); METHOD: ${METHODS[*]}"
}

model_tags() {
  local file tags=()
  for file in "$REPO_ROOT"/launchers/models/*.sh; do
    tags+=("$(basename -- "$file" .sh)")
  done
  printf '%s' "${tags[*]}"
}

# The flags that the launcher decides, with what decides each: given twice, the later one would win silently.
refuse_own_flags() {
  local flag name
  for flag in "$@"; do
    [[ "$flag" == --* ]] || continue
    name="${flag%%=*}"
    name="${name//-/_}"
    case "${name#__}" in
      method | model_name_or_path)
        die 2 "$flag is set by the launcher: train.sh MODEL METHOD, BASE_MODEL_PATH" ;;
      output_dir | run_name) die 2 "$flag is set by the launcher: use RUN_NAME and OUTPUT_ROOT" ;;
      per_device_train_batch_size | gradient_accumulation_steps)
        die 2 "$flag is set by the launcher: use NUM_PROCESSES and PER_DEVICE_BATCH" ;;
      resume_from_checkpoint) die 2 "$flag is set by the launcher, which always resumes by itself" ;;
      rollout) die 2 "$flag is set by the launcher: use ROLLOUT" ;;
    esac
  done
}

# The value that "$@" gives to a flag (--name value or --name=value); empty when it is not there.
#   value_of NAME FLAGS...
value_of() {
  local wanted="$1" value=""
  shift
  while (($#)); do
    case "$1" in
      "--$wanted="*) value="${1#*=}" ;;
      "--$wanted") value="${2:-}" ;;
    esac
    shift
  done
  printf '%s' "$value"
}

check_merge_step() {
  local max_steps save_steps
  is_count "$MERGE_STEP" || die 2 "MERGE_STEP=$MERGE_STEP: give a number of optimizer steps such as 100"
  max_steps="$(value_of max_steps "$@")"
  save_steps="$(value_of save_steps "$@")"
  if is_count "$max_steps" && ((max_steps < MERGE_STEP)); then
    die 2 "--max_steps $max_steps ends before checkpoint-$MERGE_STEP; set MERGE_STEP to a step that is saved"
  fi
  if is_count "$save_steps" && ((MERGE_STEP % save_steps != 0)) && [[ "$max_steps" != "$MERGE_STEP" ]]; then
    die 2 "--save_steps $save_steps never saves checkpoint-$MERGE_STEP; set MERGE_STEP to a step that is saved"
  fi
}

visible_gpus() {
  if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]'
  elif command -v nvidia-smi >/dev/null; then
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  else
    echo 0
  fi
}

check_batch() {
  is_count "$NUM_PROCESSES" || die 2 "NUM_PROCESSES=$NUM_PROCESSES: give the number of ranks, such as 4"
  is_count "$PER_DEVICE_BATCH" || die 2 "PER_DEVICE_BATCH=$PER_DEVICE_BATCH: give a number of sequences, such as 2"
  local per_micro_batch=$((NUM_PROCESSES * PER_DEVICE_BATCH))
  if ((EFFECTIVE_BATCH % per_micro_batch != 0)); then
    die 2 "NUM_PROCESSES=$NUM_PROCESSES x PER_DEVICE_BATCH=$PER_DEVICE_BATCH does not divide the effective batch of\
 $EFFECTIVE_BATCH; choose both so that it does"
  fi
  ACCUMULATION=$((EFFECTIVE_BATCH / per_micro_batch))
  if [[ "$DEVICE" == gpu && "$DRY_RUN" != 1 ]]; then
    local gpus
    gpus="$(visible_gpus)"
    ((gpus > 0)) || die 2 "$MODEL needs NVIDIA GPUs and none is visible; the small world does not:\
 bash launchers/quickstart.sh"
    ((NUM_PROCESSES <= gpus)) || die 2 "NUM_PROCESSES=$NUM_PROCESSES, but $gpus GPU(s) are visible; lower\
 NUM_PROCESSES (the effective batch stays $EFFECTIVE_BATCH)"
  fi
}

# Fills LAUNCH with what starts ea_opsd_train.py on every rank.
choose_launch() {
  if ((NUM_PROCESSES == 1)); then
    LAUNCH=("$VENV_PYTHON")
  else
    local config="$REPO_ROOT/launchers/accelerate_4gpu.yaml"
    [[ "$DEVICE" == cpu ]] && config="$REPO_ROOT/launchers/accelerate_cpu.yaml"
    LAUNCH=("$VENV_PYTHON" "$REPO_ROOT/launchers/accelerate_launch.py")
    LAUNCH+=(--config_file "$config" --num_processes "$NUM_PROCESSES")
  fi
}

# 0: the merged folder is whole and this cell's; 1: it is missing or incomplete. Another run's ends the launcher.
merged_is_done() {
  local code=0
  [[ -e "$MERGED_DIR" ]] || return 1
  "$VENV_PYTHON" "$REPO_ROOT/merge_lora.py" --check "$MERGED_DIR" --base_model "$BASE_MODEL" \
    --run_name "$RUN_NAME" --step "$MERGE_STEP" -- "${TRAIN_FLAGS[@]}" || code=$?
  ((code <= 1)) || exit "$code"
  return "$code"
}

MODEL="${1:-}"
METHOD="${2:-}"
[[ "$MODEL" =~ ^[A-Za-z0-9_]+$ && -f "$REPO_ROOT/launchers/models/$MODEL.sh" ]] || usage "unknown model '$MODEL'"
is_one_of "$METHOD" "${METHODS[@]}" || usage "unknown method '$METHOD'"
shift 2
# shellcheck source=models/qwen3_4b_base.sh
source "$REPO_ROOT/launchers/models/$MODEL.sh"

BASE_MODEL="${BASE_MODEL_PATH:-$BASE_MODEL}"
NUM_PROCESSES="${NUM_PROCESSES:-$DEFAULT_PROCESSES}"
PER_DEVICE_BATCH="${PER_DEVICE_BATCH:-$DEFAULT_PER_DEVICE_BATCH}"
ROLLOUT="${ROLLOUT:-$DEFAULT_ROLLOUT}"
MERGE_STEP="${MERGE_STEP:-100}"
RUN_NAME="${RUN_NAME:-${MODEL}_${METHOD}}"
OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO_ROOT/outputs}"
RUN_DIR="$OUTPUT_ROOT/$RUN_NAME"
MERGED_DIR="$OUTPUT_ROOT/${RUN_NAME}_merged"

is_one_of "$ROLLOUT" hf vllm || die 2 "ROLLOUT=$ROLLOUT: use hf or vllm"
[[ "$RUN_NAME" != */* && "$RUN_NAME" != *[[:cntrl:]]* && "$RUN_NAME" != .* && "$RUN_NAME" != -* && "$RUN_NAME" != *_merged ]] \
  || die 2 "RUN_NAME=$RUN_NAME: use a name without '/' or control characters, not starting with '.' or '-', not ending in _merged"
refuse_own_flags "$@"
check_batch
check_merge_step "$@"

if [[ "$ROLLOUT" == vllm ]]; then
  ensure_venv --with-vllm
else
  ensure_venv
fi
choose_launch

TRAIN_FLAGS=(
  --model_name_or_path "$BASE_MODEL"
  --method "$METHOD"
  --output_dir "$RUN_DIR"
  --run_name "$RUN_NAME"
  --per_device_train_batch_size "$PER_DEVICE_BATCH"
  --gradient_accumulation_steps "$ACCUMULATION"
  --rollout "$ROLLOUT"
)
if [[ "$ROLLOUT" == vllm && -n "$VLLM_MEMORY_SHARE" ]]; then
  TRAIN_FLAGS+=(--vllm_gpu_memory_utilization "$VLLM_MEMORY_SHARE")
fi
if [[ "$DEVICE" == gpu && -n "${PWOPSD_TRAIN_DATASET:-}" ]]; then
  TRAIN_FLAGS+=(--train_dataset "$PWOPSD_TRAIN_DATASET")
fi
TRAIN_FLAGS+=(${MODEL_FLAGS[@]+"${MODEL_FLAGS[@]}"} --resume_from_checkpoint auto "$@")

if [[ "$DRY_RUN" != 1 ]]; then
  mkdir -p -- "$RUN_DIR" || die 3 "cannot create $RUN_DIR"
  # The lock is on the folder itself: nothing to leave behind, and a trainer that outlives its launcher holds it.
  exec 9<"$RUN_DIR"
  if command -v flock >/dev/null && ! flock -n 9; then
    die 3 "another launcher is working on $RUN_NAME; wait for it, or choose another RUN_NAME"
  fi
  if merged_is_done; then
    say "$MERGED_DIR is complete; nothing to do"
    exit 0
  fi
  say "training $RUN_NAME: $NUM_PROCESSES ranks x $PER_DEVICE_BATCH sequences x $ACCUMULATION micro-batches" \
    "= $EFFECTIVE_BATCH a step, rollouts by $ROLLOUT"
fi
run "${LAUNCH[@]}" "$REPO_ROOT/ea_opsd_train.py" "${TRAIN_FLAGS[@]}"
[[ "$DRY_RUN" == 1 ]] || say "merging checkpoint-$MERGE_STEP into $MERGED_DIR"
run "$VENV_PYTHON" "$REPO_ROOT/merge_lora.py" --base_model "$BASE_MODEL" \
  --adapter "$RUN_DIR/checkpoint-$MERGE_STEP" --output "$MERGED_DIR"
[[ "$DRY_RUN" == 1 ]] || say "done: $MERGED_DIR/.ready_for_eval"
