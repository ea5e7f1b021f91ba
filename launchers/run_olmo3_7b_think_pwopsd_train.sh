#!/usr/bin/env bash
# olmo3_7b_think, pwopsd: see launchers/train.sh for the settings it takes.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" olmo3_7b_think pwopsd "$@"
