#!/usr/bin/env bash
# The paper's table from top to bottom: 3 models x 4 methods, 4 benchmarks x 3 seeds, on one machine with GPUs.
#
#   bash launchers/reproduce_paper.sh            DRY_RUN=1 prints every command instead
#
# Whatever is finished is not done again: after a crash, or on another day, give the same command. A cell that
# fails does not stop the others; the failures are listed at the end, and the exit code is then 1. The table is
# printed and drawn from whatever results there are: EVAL_ROOT/paper_table.md and paper_table.png.
#
#   MODELS, METHODS_TO_RUN, BENCHMARKS, SEEDS   lists in quotes, to run a part
#   TENSOR_PARALLEL                             GPUs that share one copy in evaluation (default 4)
#   OUTPUT_ROOT, EVAL_ROOT                      default outputs/ and eval_results/ of this checkout

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read -r -a MODEL_LIST <<<"${MODELS:-qwen3_4b_base dsr1_l8b olmo3_7b_think}"
read -r -a METHOD_LIST <<<"${METHODS_TO_RUN:-${METHODS[*]}}"
read -r -a BENCHMARK_LIST <<<"${BENCHMARKS:-math500 aime24 aime25 hmmt25}"
read -r -a SEED_LIST <<<"${SEEDS:-1 2 3}"
TENSOR_PARALLEL="${TENSOR_PARALLEL:-4}"
EVAL_ROOT="${EVAL_ROOT:-$REPO_ROOT/eval_results}"

# What the estimate assumes for 80 GB GPUs: orders of magnitude, measured on no machine. Set each to what you see.
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
  is_count "$TENSOR_PARALLEL" || die 2 "TENSOR_PARALLEL='$TENSOR_PARALLEL' is not a positive whole number"
  [[ -z "${RUN_NAME:-}" ]] || die 2 "RUN_NAME is set, but each cell has a name of its own; unset it"
  if [[ -n "${BASE_MODEL_PATH:-}" ]] && ((${#MODEL_LIST[@]} > 1)); then
    die 2 "BASE_MODEL_PATH is one model's copy, but there are ${#MODEL_LIST[@]} models; choose one with MODELS"
  fi
}

# The table and its picture from the result files of the listed models, whichever are there.
summarize() {
  local model patterns=()
  for model in "${MODEL_LIST[@]}"; do
    patterns+=("$EVAL_ROOT/${model}_*38k*.json")
    [[ "$DRY_RUN" == 1 ]] || compgen -G "${patterns[-1]}" >/dev/null || unset 'patterns[-1]'
  done
  if ((${#patterns[@]} == 0)); then
    say "no result in $EVAL_ROOT yet: no table"
    return 0
  fi
  # --output first: a table with a damaged file beside it is written all the same, and the exit code says so.
  run "$VENV_PYTHON" "$REPO_ROOT/summarize_results.py" "${patterns[@]}" --seeds "${SEED_LIST[@]}" \
    --output "$EVAL_ROOT/paper_table.md" --plot "$EVAL_ROOT/paper_table.png"
}

# Days of work must not end at a file that was missing all along.
check_hmmt25() {
  is_one_of hmmt25 "${BENCHMARK_LIST[@]}" || return 0
  local parquet="${HMMT25_PARQUET_PATH:-$REPO_ROOT/data/hmmt25_clean/train.parquet}"
  [[ -f "$parquet" ]] || die 3 "hmmt25 is not at $parquet: see data/README.md, or leave it out with BENCHMARKS"
}

check_lists
say "${#MODEL_LIST[@]} models x ${#METHOD_LIST[@]} methods, ${#BENCHMARK_LIST[@]} benchmarks x ${#SEED_LIST[@]} seeds"
say "estimate from ASSUMED speeds and lengths, none of them measured here (formula: launchers/reproduce_paper.sh;"
say "each can be set): $SECONDS_PER_STEP_4B and $SECONDS_PER_STEP_8B s a step (4B, 8B), $TOKENS_PER_MATH500_SAMPLE\
 and $TOKENS_PER_CONTEST_SAMPLE tokens a sample (MATH-500, contests), $TOKENS_PER_SECOND_4B and\
 $TOKENS_PER_SECOND_8B tokens a second of $GPUS GPUs (4B, 8B)"
estimate >&2
[[ "$DRY_RUN" == 1 ]] || check_hmmt25
ensure_venv --with-vllm

FAILED=()
DONE=0
for model in "${MODEL_LIST[@]}"; do
  for method in "${METHOD_LIST[@]}"; do
    cell="${model}_${method}"
    say "== $cell"
    code=0
    bash "$REPO_ROOT/launchers/train.sh" "$model" "$method" || code=$?
    # A wrong setting (2) that the first cell meets is wrong for every cell.
    ((code != 2 || ${#FAILED[@]} + DONE > 0)) || exit 2
    if ((code != 0)); then
      FAILED+=("$cell: training or merge (exit code $code)")
      continue
    fi
    DONE=$((DONE + 1))
    for benchmark in "${BENCHMARK_LIST[@]}"; do
      for seed in "${SEED_LIST[@]}"; do
        bash "$REPO_ROOT/launchers/run_eval.sh" "$cell" "$benchmark" "$TENSOR_PARALLEL" "$seed" \
          || FAILED+=("$cell: $benchmark, seed $seed (exit code $?)")
      done
    done
  done
done

summarize || FAILED+=("the table (exit code $?)")
if [[ "$DRY_RUN" != 1 && -f "$EVAL_ROOT/paper_table.md" ]]; then
  cat -- "$EVAL_ROOT/paper_table.md"
fi
if ((${#FAILED[@]})); then
  printf '  %s\n' "${FAILED[@]}" >&2
  die 1 "${#FAILED[@]} part(s) failed (listed above); the same command goes on from here"
fi
