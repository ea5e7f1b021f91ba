#!/usr/bin/env bash
# The study in the small world, on a CPU: base and four methods, the 2 x 2 ablation, several training and evaluation
# seeds, tables and pictures.
#
#   bash launchers/reproduce_small.sh            DRY_RUN=1 prints every command instead
#
# The same command continues after an interruption; finished runs are not repeated. At the end it writes the records
# and pictures of docs/small_world/ and the tables in README.md and docs/small_world.md (testbed/study.py).
#
#   1. search      each method at each learning rate up to HIGHEST_RATE (testbed/study.py), SEARCH_STEPS steps with
#                  seed 42; the rate with the most right rollouts in the last 10 of these steps is taken
#   2. training    each method, the ablation's two other cells and the four without the published clip, STEPS steps,
#                  TRAINING_SEEDS
#   3. long runs   each method once for LONG_STEPS steps with the paper's seed 42
#   4. evaluation  the base and every trained model, both held-out sets, SEEDS
#
#   TRAINING_SEEDS, SEEDS, LEARNING_RATES   lists in quotes (defaults below)
#   STEPS, LONG_STEPS, SEARCH_STEPS         optimizer steps
#   VAL_N, NUM_SAMPLES                      samples a problem; problems of each held-out set
#   JOBS                                    runs at the same time, one thread each (default: the cores)
#   OUTPUT_ROOT, EVAL_ROOT                  default outputs/ and eval_results/ of this checkout

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read -r -a TRAINING_SEED_LIST <<<"${TRAINING_SEEDS:-1 2 3}"
read -r -a SEED_LIST <<<"${SEEDS:-1 2 3}"
read -r -a RATE_LIST <<<"${LEARNING_RATES:-3e-5 1e-4 3e-4 1e-3 3e-3}"
STEPS="${STEPS:-50}"
LONG_STEPS="${LONG_STEPS:-100}"
LONG_SEED=42
SEARCH_STEPS="${SEARCH_STEPS:-25}"
export VAL_N="${VAL_N:-2}" NUM_SAMPLES="${NUM_SAMPLES:-128}"
JOBS="${JOBS:-$(nproc 2>/dev/null || echo 1)}"
export OUTPUT_ROOT="${OUTPUT_ROOT:-$REPO_ROOT/outputs}"
export EVAL_ROOT="${EVAL_ROOT:-$REPO_ROOT/eval_results}"
# Parallel runs share the cores; one thread each also gives the same numbers on every machine.
export OMP_NUM_THREADS=1

for name in STEPS LONG_STEPS SEARCH_STEPS VAL_N NUM_SAMPLES JOBS; do
  is_count "${!name}" || die 2 "$name='${!name}' is not a positive whole number"
done
for item in "${TRAINING_SEED_LIST[@]}" "${SEED_LIST[@]}"; do
  [[ "$item" =~ ^(0|[1-9][0-9]{0,8})$ ]] || die 2 "TRAINING_SEEDS and SEEDS: '$item' is not a whole number"
done
for item in "${TRAINING_SEED_LIST[@]}"; do
  [[ "$item" != "$LONG_SEED" ]] || die 2 "TRAINING_SEEDS: $LONG_SEED is the long runs' seed; choose another"
done
for item in "${RATE_LIST[@]}"; do
  [[ "$item" =~ ^[0-9]+([.][0-9]+)?(e-[0-9]+)?$ ]] || die 2 "LEARNING_RATES: '$item' is not a rate such as 1e-3"
done
[[ -z "${RUN_NAME:-}" ]] || die 2 "RUN_NAME is set, but each run has a name of its own; unset it"
[[ "$DRY_RUN" == 1 ]] && JOBS=1

FAILURES=""
if [[ "$DRY_RUN" != 1 ]]; then
  mkdir -p -- "$EVAL_ROOT/logs"
  FAILURES="$(mktemp)"
  trap 'rm -f -- "$FAILURES"' EXIT
fi

# Run a function in the background, at most JOBS at a time; what it prints goes to a log of its own.
#   background LABEL FUNCTION ARGUMENTS...
background() {
  local label="$1"
  shift
  if [[ "$DRY_RUN" == 1 ]]; then
    "$@"
    return
  fi
  while (($(jobs -rp | wc -l) >= JOBS)); do
    wait -n || true
  done
  say "$label"
  { "$@" >"$EVAL_ROOT/logs/study_${label//[^A-Za-z0-9._-]/_}.out" 2>&1 || echo "$label" >>"$FAILURES"; } &
}

finish_phase() {
  [[ "$DRY_RUN" == 1 ]] && return 0
  wait
  [[ ! -s "$FAILURES" ]] && return 0
  sed 's/^/  /' -- "$FAILURES" >&2
  die 1 "these failed (logs: $EVAL_ROOT/logs/study_*.out); the same command continues from here"
}

search() { # METHOD RATE
  RUN_NAME="small_${1}_lr$2" MERGE_STEP="$SEARCH_STEPS" bash "$REPO_ROOT/launchers/train.sh" small "$1" \
    --learning_rate "$2" --max_steps "$SEARCH_STEPS" --save_steps "$SEARCH_STEPS" --seed 42 \
    --log_completions_steps 1
}

study() { # CELL RATE TRAINING_SEED STEPS
  local flags=(--learning_rate "$2" --max_steps "$4" --seed "$3" --log_completions_steps 1)
  export MERGE_STEP="$4"
  # The paper switches after a third of its 150 steps. The long runs keep its step 50.
  [[ "$1" != reopold || "$4" == "$LONG_STEPS" ]] || flags+=(--reopold_t_switch "$(($4 / 3))")
  case "$1" in
    pwopsd_global) RUN_SUFFIX="_t$3" bash "$REPO_ROOT/launchers/ablation.sh" small schedule_global -- "${flags[@]}" ;;
    pwopsd_flat) RUN_SUFFIX="_t$3" bash "$REPO_ROOT/launchers/ablation.sh" small flat_sequence -- "${flags[@]}" ;;
    *_noclip) RUN_NAME="small_${1}_t$3" bash "$REPO_ROOT/launchers/train.sh" small "${1%%_*}" "${flags[@]}" \
      --jsd_token_clip 0 ;;
    *_tokenclip) RUN_NAME="small_${1}_t$3" bash "$REPO_ROOT/launchers/train.sh" small "${1%%_*}" "${flags[@]}" \
      --divergence_clip_scope token ;;
    *) RUN_NAME="small_${1}_t$3" bash "$REPO_ROOT/launchers/train.sh" small "$1" "${flags[@]}" ;;
  esac
}

evaluate() { # NAME
  local benchmark seed
  for benchmark in small small_hard; do
    for seed in "${SEED_LIST[@]}"; do
      # One worker grades: the samples take longer than the grades.
      WAIT=1 ENGINE=hf bash "$REPO_ROOT/launchers/run_eval.sh" "$1" "$benchmark" 1 "$seed" \
        -- --grading_workers 1
    done
  done
}

train_and_evaluate() { # CELL RATE TRAINING_SEED STEPS
  study "$@" && evaluate "small_${1}_t$3"
}

started=$SECONDS
# shellcheck disable=SC2119  # no option of its own
ensure_venv
background "evaluate small_base" evaluate small_base
for method in "${METHODS[@]}"; do
  for rate in "${RATE_LIST[@]}"; do
    background "search $method at $rate" search "$method" "$rate"
  done
done
finish_phase

rate_of() { # METHOD
  if [[ "$DRY_RUN" == 1 ]]; then
    echo "RATE_OF_$1"
  else
    "$VENV_PYTHON" "$REPO_ROOT/testbed/study.py" rate "$1"
  fi
}

for seed in "${TRAINING_SEED_LIST[@]}"; do
  for cell in "${METHODS[@]}" pwopsd_global pwopsd_flat {opsd,pwopsd}_{noclip,tokenclip}; do
    rate="$(rate_of "${cell%%_*}")"
    background "train and evaluate $cell at $rate, seed $seed" train_and_evaluate "$cell" "$rate" "$seed" "$STEPS"
  done
done
for method in "${METHODS[@]}"; do
  rate="$(rate_of "$method")"
  background "long run of $method at $rate" train_and_evaluate "$method" "$rate" "$LONG_SEED" "$LONG_STEPS"
done
finish_phase

run "$VENV_PYTHON" "$REPO_ROOT/testbed/study.py" collect
run "$VENV_PYTHON" "$REPO_ROOT/testbed/study.py" report
[[ "$DRY_RUN" == 1 ]] || say "done in $(((SECONDS - started) / 60)) minutes"
