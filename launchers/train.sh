#!/usr/bin/env bash
# Train one cell of the paper's table, merge its checkpoint-100 and leave the sentinel:
#
#   bash launchers/train.sh MODEL METHOD [flags of ea_opsd_train.py ...]
#
# MODEL is a file of launchers/models/ without .sh, METHOD one of launchers/methods/. Started again, it continues:
# training resumes from its newest complete checkpoint, a finished merge is not repeated.
#
#   NUM_PROCESSES     ranks (default: the model's); accumulation follows, the effective batch stays 32
#   PER_DEVICE_BATCH  sequences per rank and micro-batch (default: the model's)
#   ROLLOUT           hf or vllm (default: the model's)
#   RUN_NAME          default MODEL_METHOD; a run with other numbers needs a name of its own
#   BASE_MODEL_PATH   a local copy of the base model
#   PWOPSD_TRAIN_DATASET  a local copy of the paper's training data
#   MERGE_STEP        the checkpoint that is merged (default 100)
#   MERGE_DTYPE       of the merged weights: auto (the base's, default), float32 or bfloat16
#   MERGE_ROUNDING    nearest (default) or stochastic (docs/merging.md)
#   OUTPUT_ROOT       default outputs/ of this checkout
#   WANDB_PROJECT     project of --report_to wandb (default pwopsd)
#   and those of launchers/common.sh

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

usage() {
  die 2 "$1. Usage: bash launchers/train.sh MODEL METHOD [flags]; MODEL: ${MODEL_TAGS[*]}; METHOD: ${METHODS[*]}"
}

MODEL="${1:-}" METHOD="${2:-}"
is_one_of "$MODEL" "${MODEL_TAGS[@]}" || usage "unknown model '$MODEL'"
is_one_of "$METHOD" "${METHODS[@]}" || usage "unknown method '$METHOD'"
shift 2
# shellcheck source=models/qwen3_4b_base.sh
source "$REPO_ROOT/launchers/models/$MODEL.sh"
# shellcheck source=methods/pwopsd.sh
source "$REPO_ROOT/launchers/methods/$METHOD.sh"

BASE_MODEL="${BASE_MODEL_PATH:-$BASE_MODEL}"
NUM_PROCESSES="${NUM_PROCESSES:-$DEFAULT_PROCESSES}"
PER_DEVICE_BATCH="${PER_DEVICE_BATCH:-$DEFAULT_PER_DEVICE_BATCH}"
ROLLOUT="${ROLLOUT:-$DEFAULT_ROLLOUT}"
MERGE_STEP="${MERGE_STEP:-100}"
MERGE_FLAGS=(--dtype "${MERGE_DTYPE:-auto}" --rounding "${MERGE_ROUNDING:-nearest}")
RUN_NAME="${RUN_NAME:-${MODEL}_${METHOD}}"
OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO_ROOT/outputs}"
RUN_DIR="$OUTPUT_ROOT/$RUN_NAME"
MERGED_DIR="$OUTPUT_ROOT/${RUN_NAME}_merged"
export WANDB_PROJECT="${WANDB_PROJECT:-pwopsd}"

# The paper's experiment. A model's own flags replace these, the user's replace both (launchers/plan_command.py).
LAUNCHER_FLAGS=(
  --model_name_or_path "$BASE_MODEL" --method "$METHOD" --output_dir "$RUN_DIR" --run_name "$RUN_NAME"
  --train_dataset "${PWOPSD_TRAIN_DATASET:-siyanzhao/Openthoughts_math_30k_opsd}"
  # adapter
  --lora_r 64 --lora_alpha 128 --lora_dropout 0
  --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj
  # optimizer
  --optim adamw_torch_fused --adam_beta1 0.9 --adam_beta2 0.999 --weight_decay 0 --max_grad_norm 0.1
  --learning_rate 5e-6 --lr_scheduler_type linear --warmup_steps 0 --max_steps 150 --seed 42
  --bf16 True --gradient_checkpointing True
  --per_device_train_batch_size "$PER_DEVICE_BATCH"
  # rollouts, one a problem
  --rollout "$ROLLOUT" --rollout_temperature 1.1 --rollout_top_p 0.95 --rollout_top_k 20
  --max_completion_length 1024 --max_length 20000
  # objective: the temperature of both distributions, then the method's own numbers
  --temperature 1.1 --loss_scope micro_batch "${METHOD_FLAGS[@]}"
  # checkpoints
  --save_strategy steps --save_steps 25 --merge_step "$MERGE_STEP" --resume_from_checkpoint auto
)
[[ "$ROLLOUT" != vllm || -z "$VLLM_MEMORY_SHARE" ]] \
  || LAUNCHER_FLAGS+=(--vllm_gpu_memory_utilization "$VLLM_MEMORY_SHARE")
LAUNCHER_FLAGS+=(${MODEL_FLAGS[@]+"${MODEL_FLAGS[@]}"})

planner="$(base_python)"
mapfile -d '' -t PLAN < <("$planner" "$REPO_ROOT/launchers/plan_command.py" MODEL="$MODEL" METHOD="$METHOD" \
  DEVICE="$DEVICE" DRY_RUN="$DRY_RUN" RUN_NAME="$RUN_NAME" ROLLOUT="$ROLLOUT" MERGE_STEP="$MERGE_STEP" \
  NUM_PROCESSES="$NUM_PROCESSES" PER_DEVICE_BATCH="$PER_DEVICE_BATCH" -- "${LAUNCHER_FLAGS[@]}" -- "$@")
wait "$!"
SHOWN_VARIABLES+=(WANDB_PROJECT)
[[ -z "${PLAN[0]}" ]] || export PYTORCH_CUDA_ALLOC_CONF="${PLAN[0]}"
[[ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]] || SHOWN_VARIABLES+=(PYTORCH_CUDA_ALLOC_CONF)
TRAIN_FLAGS=("${PLAN[@]:1}")

if [[ "$ROLLOUT" == vllm ]]; then ensure_venv --with-vllm; else ensure_venv; fi
LAUNCH=("$VENV_PYTHON")
if ((NUM_PROCESSES > 1)); then
  config="$REPO_ROOT/launchers/accelerate_4gpu.yaml"
  [[ "$DEVICE" == cpu ]] && config="$REPO_ROOT/launchers/accelerate_cpu.yaml"
  LAUNCH+=("$REPO_ROOT/launchers/accelerate_launch.py" --config_file "$config" --num_processes "$NUM_PROCESSES")
fi

if [[ "$DRY_RUN" != 1 ]]; then
  mkdir -p -- "$RUN_DIR" "$OUTPUT_ROOT/.locks" || die 3 "cannot create $RUN_DIR"
  # The trainer inherits the lock, so that it holds while either of the two lives.
  exec 9>"$OUTPUT_ROOT/.locks/$RUN_NAME.lock"
  try_lock "$RUN_DIR" || die 3 "another launcher is working on $RUN_NAME; wait for it, or choose another RUN_NAME"
  code=0
  [[ -e "$MERGED_DIR" ]] && { "$VENV_PYTHON" "$REPO_ROOT/merge_lora.py" --check "$MERGED_DIR" \
    --base_model "$BASE_MODEL" --run_name "$RUN_NAME" --step "$MERGE_STEP" "${MERGE_FLAGS[@]}" \
    -- "${TRAIN_FLAGS[@]}" || code=$?; }
  # 0: complete and of this cell; 1: incomplete, so it is merged again; anything else: of another run.
  ((code <= 1)) || exit "$code"
  if [[ -e "$MERGED_DIR" && "$code" == 0 ]]; then
    say "$MERGED_DIR is complete; nothing to do"
    exit 0
  fi
  say "training $RUN_NAME: $NUM_PROCESSES ranks x $PER_DEVICE_BATCH sequences a micro-batch, rollouts by $ROLLOUT"
fi
run "${LAUNCH[@]}" "$REPO_ROOT/ea_opsd_train.py" "${TRAIN_FLAGS[@]}"
[[ "$DRY_RUN" == 1 ]] || say "merging checkpoint-$MERGE_STEP into $MERGED_DIR"
run "$VENV_PYTHON" "$REPO_ROOT/merge_lora.py" --base_model "$BASE_MODEL" \
  --adapter "$RUN_DIR/checkpoint-$MERGE_STEP" --output "$MERGED_DIR" "${MERGE_FLAGS[@]}"
[[ "$DRY_RUN" == 1 ]] || say "done: $MERGED_DIR/.ready_for_eval"
