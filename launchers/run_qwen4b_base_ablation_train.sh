#!/usr/bin/env bash
# qwen3_4b_base, the 2 x 2 ablation: see launchers/ablation.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/ablation.sh" qwen3_4b_base "$@"
