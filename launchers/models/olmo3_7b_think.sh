# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
BASE_MODEL="allenai/Olmo-3-7B-Think"
DEVICE=gpu
DEFAULT_PROCESSES=4
DEFAULT_PER_DEVICE_BATCH=2
DEFAULT_ROLLOUT=vllm
VLLM_MEMORY_SHARE=0.55
MODEL_FLAGS=()
