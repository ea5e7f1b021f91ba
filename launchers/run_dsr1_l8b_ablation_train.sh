#!/usr/bin/env bash
# dsr1_l8b, the 2 x 2 ablation: see launchers/ablation.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/ablation.sh" dsr1_l8b "$@"
