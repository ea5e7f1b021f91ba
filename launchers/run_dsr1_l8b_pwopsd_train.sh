#!/usr/bin/env bash
# dsr1_l8b, pwopsd: see launchers/train.sh for the settings it takes.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/train.sh" dsr1_l8b pwopsd "$@"
