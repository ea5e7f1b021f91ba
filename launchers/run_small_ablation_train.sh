#!/usr/bin/env bash
# small, the 2 x 2 ablation: see launchers/ablation.sh.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/ablation.sh" small "$@"
