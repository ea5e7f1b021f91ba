#!/usr/bin/env bash
# Evaluate a list of cells in parallel: one worker of run_eval.sh per visible GPU.
#
#   bash launchers/eval_workers.sh [FILE] [-- flags of evaluate_math.py ...]
#
# FILE (default: standard input) holds a cell a line: METHOD_NAME DATASET [SEED], as run_eval.sh takes them; empty
# lines and lines that begin with # are skipped. The locks of run_eval.sh keep workers apart, also those of a second
# start, here or on another machine with the same EVAL_ROOT. A cell that another worker has is waited for at the end.
# A failed cell stops no other; the failures are listed at the end, and the exit code is then 1.
#
#   TENSOR_PARALLEL  GPUs that share one copy of the model (default 1)
#   WORKERS          default: the visible GPUs / TENSOR_PARALLEL; without a GPU 1
#   HOSTLABEL        begins the workers' names in the logs' names (default worker)
#   and those of launchers/run_eval.sh

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
python="$(base_python)"
exec "$python" "$REPO_ROOT/launchers/eval_workers.py" "$@"
