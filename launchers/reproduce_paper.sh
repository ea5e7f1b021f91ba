#!/usr/bin/env bash
# The paper's table from top to bottom: 3 models x 4 methods, 4 benchmarks x 3 seeds, on one machine with GPUs.
#
#   bash launchers/reproduce_paper.sh            DRY_RUN=1 prints every command instead
#
# Whatever is finished is not done again: after a crash, or on another day, give the same command. A cell that
# fails does not stop the others; the failures are listed at the end.
#
#   MODELS, METHODS_TO_RUN, BENCHMARKS, SEEDS   lists in quotes, to run a part
#   TENSOR_PARALLEL                             GPUs that share one copy in evaluation (default 4)

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read -r -a MODEL_LIST <<<"${MODELS:-qwen3_4b_base dsr1_l8b olmo3_7b_think}"
read -r -a METHOD_LIST <<<"${METHODS_TO_RUN:-${METHODS[*]}}"
read -r -a BENCHMARK_LIST <<<"${BENCHMARKS:-math500 aime24 aime25 hmmt25}"
read -r -a SEED_LIST <<<"${SEEDS:-1 2 3}"
TENSOR_PARALLEL="${TENSOR_PARALLEL:-4}"

# What the estimate assumes for 80 GB GPUs. Nothing here was measured on your machine: set each to what you see.
GPUS="${GPUS:-4}"
TRAIN_STEPS=150
SECONDS_PER_STEP_4B="${SECONDS_PER_STEP_4B:-40}"
SECONDS_PER_STEP_8B="${SECONDS_PER_STEP_8B:-60}"
SAMPLES=12
TOKENS_PER_MATH500_SAMPLE="${TOKENS_PER_MATH500_SAMPLE:-5000}"
TOKENS_PER_CONTEST_SAMPLE="${TOKENS_PER_CONTEST_SAMPLE:-16000}"
TOKENS_PER_SECOND_4B="${TOKENS_PER_SECOND_4B:-10000}" # of all GPUs together
TOKENS_PER_SECOND_8B="${TOKENS_PER_SECOND_8B:-7000}"

# GPU-hours of the list above:
#   training    cells x TRAIN_STEPS x seconds per step x GPUS / 3600
#   evaluation  cells x seeds x SAMPLES x sum over benchmarks (problems x tokens per sample)
#               / tokens per second x GPUS / 3600
estimate() {
  local model benchmark tokens=0 step rate lines=()
  for benchmark in "${BENCHMARK_LIST[@]}"; do
    case "$benchmark" in
      math500) tokens=$((tokens + 500 * TOKENS_PER_MATH500_SAMPLE)) ;;
      *) tokens=$((tokens + 30 * TOKENS_PER_CONTEST_SAMPLE)) ;;
    esac
  done
  for model in "${MODEL_LIST[@]}"; do
    case "$model" in
      qwen3_4b_base) step=$SECONDS_PER_STEP_4B rate=$TOKENS_PER_SECOND_4B ;;
      *) step=$SECONDS_PER_STEP_8B rate=$TOKENS_PER_SECOND_8B ;;
    esac
    lines+=("$model $step $rate")
  done
  printf '%s\n' "${lines[@]}" | awk -v cells="${#METHOD_LIST[@]}" -v seeds="${#SEED_LIST[@]}" \
    -v steps="$TRAIN_STEPS" -v samples="$SAMPLES" -v tokens="$tokens" -v gpus="$GPUS" '
    { train = cells * steps * $2 * gpus / 3600
      evaluation = cells * seeds * samples * tokens / $3 * gpus / 3600
      printf "  %-16s training %6.1f, evaluation %7.1f GPU-hours\n", $1, train, evaluation
      sum += train + evaluation }
    END { printf "  together %.0f GPU-hours, about %.1f days on %d GPUs, less what is already there\n",
          sum, sum / gpus / 24, gpus }'
}

check_lists() {
  local item
  for item in "${METHOD_LIST[@]}"; do
    is_one_of "$item" "${METHODS[@]}" || die 2 "METHODS_TO_RUN: unknown method '$item'; choose from ${METHODS[*]}"
  done
  for item in "${MODEL_LIST[@]}"; do
    [[ -f "$REPO_ROOT/launchers/models/$item.sh" ]] || die 2 "MODELS: unknown model '$item'; see launchers/models/"
  done
  for item in "${SEED_LIST[@]}"; do
    [[ "$item" =~ ^[0-9]+$ ]] || die 2 "SEEDS: '$item' is not a whole number"
  done
  for item in GPUS SECONDS_PER_STEP_4B SECONDS_PER_STEP_8B TOKENS_PER_MATH500_SAMPLE TOKENS_PER_CONTEST_SAMPLE \
    TOKENS_PER_SECOND_4B TOKENS_PER_SECOND_8B; do
    is_count "${!item}" || die 2 "$item='${!item}' is not a positive whole number"
  done
  [[ -z "${RUN_NAME:-}" ]] || die 2 "RUN_NAME is set, but each cell has a name of its own; unset it"
}

# Days of work must not end at a file that was missing all along.
check_hmmt25() {
  is_one_of hmmt25 "${BENCHMARK_LIST[@]}" || return 0
  local parquet="${HMMT25_PARQUET_PATH:-$REPO_ROOT/data/hmmt25_clean/train.parquet}"
  [[ -f "$parquet" ]] || die 3 "hmmt25 is not at $parquet: see data/README.md, or leave it out with BENCHMARKS"
}

check_lists
say "${#MODEL_LIST[@]} models x ${#METHOD_LIST[@]} methods, ${#BENCHMARK_LIST[@]} benchmarks x ${#SEED_LIST[@]} seeds"
say "estimate (formula and assumptions: launchers/reproduce_paper.sh):"
estimate >&2
[[ "$DRY_RUN" == 1 ]] || check_hmmt25
ensure_venv --with-vllm

FAILED=()
for model in "${MODEL_LIST[@]}"; do
  for method in "${METHOD_LIST[@]}"; do
    cell="${model}_${method}"
    say "== $cell"
    code=0
    bash "$REPO_ROOT/launchers/train.sh" "$model" "$method" || code=$?
    # A wrong setting (2) is wrong for every cell.
    ((code != 2)) || exit 2
    if ((code != 0)); then
      FAILED+=("$cell: training or merge")
      continue
    fi
    for benchmark in "${BENCHMARK_LIST[@]}"; do
      for seed in "${SEED_LIST[@]}"; do
        bash "$REPO_ROOT/launchers/run_eval.sh" "$cell" "$benchmark" "$TENSOR_PARALLEL" "$seed" \
          || FAILED+=("$cell: $benchmark, seed $seed")
      done
    done
  done
done

run "$VENV_PYTHON" "$REPO_ROOT/summarize_results.py"
if ((${#FAILED[@]})); then
  printf '  %s\n' "${FAILED[@]}" >&2
  die 1 "${#FAILED[@]} part(s) failed (listed above); the same command goes on from here"
fi
