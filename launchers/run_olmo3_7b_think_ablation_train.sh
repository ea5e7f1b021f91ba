#!/usr/bin/env bash
# olmo3_7b_think, the 2 x 2 ablation: see launchers/ablation.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/ablation.sh" olmo3_7b_think "$@"
