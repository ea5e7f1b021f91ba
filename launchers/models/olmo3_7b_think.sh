# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
BASE_MODEL="allenai/Olmo-3-7B-Think"
DEVICE=gpu
DEFAULT_PROCESSES=4
DEFAULT_PER_DEVICE_BATCH=2
DEFAULT_ROLLOUT=vllm
VLLM_MEMORY_SHARE=0.55
MODEL_FLAGS=()
# For the estimate of hours: parameters, and bytes of the key-value cache for a token of context.
# 24 of the 32 layers keep a window of 4,096 tokens: the mean over a context of 8,000.
PARAMETERS=7.30e9
KV_BYTES_PER_TOKEN=332000
