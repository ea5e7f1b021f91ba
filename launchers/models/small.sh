# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
# The small arithmetic world (testbed/): a real transformer that trains on a CPU in minutes.
BASE_MODEL="$REPO_ROOT/testbed/base_model"
DEVICE=cpu
DEFAULT_PROCESSES=1
DEFAULT_PER_DEVICE_BATCH=8
DEFAULT_ROLLOUT=hf
VLLM_MEMORY_SHARE=""
# Its base reads nothing but its own problems, so PWOPSD_TRAIN_DATASET does not apply here.
MODEL_FLAGS=(
  --train_dataset "$REPO_ROOT/testbed/data/train.jsonl"
  --max_completion_length 160
  --learning_rate 1e-3
  --bf16 False
  --gradient_checkpointing False
  --use_cpu True
)
PARAMETERS=7e5
KV_BYTES_PER_TOKEN=2048
# The paper's 38,912 new tokens are more positions than this model has; its answers take about a hundred.
EVAL_FLAGS=(--max_new_tokens 160)
