#!/usr/bin/env bash
# qwen3_4b_base, eopd: see launchers/train.sh for the settings it takes.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" qwen3_4b_base eopd "$@"
