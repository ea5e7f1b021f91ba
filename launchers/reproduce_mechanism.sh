#!/usr/bin/env bash
# The mechanism study on a CPU: when does weighting positions help, and when does it cost? (docs/mechanism.md)
#
#   bash launchers/reproduce_mechanism.sh [flags of testbed/plan_world/study.py run ...]
#
# The same command continues after an interruption; finished cells are not repeated. At the end it writes the records,
# the tables and the picture of docs/mechanism.md. DRY_RUN=1 prints every command instead.
#
#   JOBS         cells at the same time, one thread each (default: the cores)
#   OUTPUT_ROOT  default outputs/ of this checkout

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

JOBS="${JOBS:-$(nproc 2>/dev/null || echo 1)}"
is_count "$JOBS" || die 2 "JOBS='$JOBS' is not a positive whole number"
export OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO_ROOT/outputs}"
# One thread for each gives the same numbers on every number of cores.
export OMP_NUM_THREADS=1
STUDY="$REPO_ROOT/testbed/plan_world/study.py"
LOGS="$OUTPUT_ROOT/plan_world/logs"

# shellcheck disable=SC2119  # no option of its own
ensure_venv
[[ "$DRY_RUN" == 1 ]] || mkdir -p -- "$LOGS" || die 3 "cannot create $LOGS"
processes=()
for ((part = 1; part <= JOBS; part++)); do
  command=("$VENV_PYTHON" "$STUDY" run --part "$part/$JOBS" "$@")
  if [[ "$DRY_RUN" == 1 ]]; then
    run "${command[@]}"
  else
    "${command[@]}" 2>"$LOGS/part$part.log" &
    processes+=("$!")
  fi
done
code=0
for process in ${processes[@]+"${processes[@]}"}; do
  wait "$process" || code=$?
done
if ((code)); then
  tail -n 1 -- "$LOGS"/part*.log >&2
  die "$code" "a part of the study failed (its last line is above, logs: $LOGS); the same command continues from here"
fi
run "$VENV_PYTHON" "$STUDY" collect
run "$VENV_PYTHON" "$STUDY" report
