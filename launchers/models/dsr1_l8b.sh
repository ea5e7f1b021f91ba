# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
BASE_MODEL="deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
DEVICE=gpu
DEFAULT_PROCESSES=4
DEFAULT_PER_DEVICE_BATCH=2
DEFAULT_ROLLOUT=vllm
VLLM_MEMORY_SHARE=0.30
MODEL_FLAGS=()
# For the estimate of hours: parameters, and bytes of the key-value cache for a token of context.
PARAMETERS=8.03e9
KV_BYTES_PER_TOKEN=131072
