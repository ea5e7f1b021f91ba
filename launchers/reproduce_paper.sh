#!/usr/bin/env bash
# Reproduce the paper's table: 3 models, untrained and by 4 methods, 4 benchmarks x 3 seeds, on one machine with GPUs.
#
#   bash launchers/reproduce_paper.sh            DRY_RUN=1 prints every command instead
#
# The same command continues after an interruption; finished cells are not repeated. A failed cell stops no other; the
# failures are listed at the end, and the exit code is then 1. The table is printed and drawn from all results that
# exist: EVAL_ROOT/paper_table.md and paper_table.png.
#
#   MODELS, METHODS_TO_RUN, BENCHMARKS, SEEDS   lists in quotes, to run a part
#   TENSOR_PARALLEL, WORKERS                    see launchers/eval_workers.sh (default: 4 GPUs share a model)
#   GPUS                                        how many the estimate of hours is for (default 4)
#   OUTPUT_ROOT, EVAL_ROOT                      default outputs/ and eval_results/ of this checkout

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

read -r -a MODEL_LIST <<<"${MODELS:-qwen3_4b_base dsr1_l8b olmo3_7b_think}"
read -r -a METHOD_LIST <<<"${METHODS_TO_RUN:-${METHODS[*]}}"
read -r -a BENCHMARK_LIST <<<"${BENCHMARKS:-math500 aime24 aime25 hmmt25}"
read -r -a SEED_LIST <<<"${SEEDS:-1 2 3}"
export TENSOR_PARALLEL="${TENSOR_PARALLEL:-4}"
export EVAL_ROOT="${EVAL_ROOT:-$REPO_ROOT/eval_results}"
GPUS="${GPUS:-4}"

estimate() {
  local model facts=()
  for model in "${MODEL_LIST[@]}"; do
    unset PARAMETERS KV_BYTES_PER_TOKEN
    # shellcheck source=models/qwen3_4b_base.sh
    source "$REPO_ROOT/launchers/models/$model.sh"
    facts+=(--model "$model" "$PARAMETERS" "$KV_BYTES_PER_TOKEN")
  done
  "$(base_python)" "$REPO_ROOT/launchers/estimate_hours.py" "${facts[@]}" --methods "${#METHOD_LIST[@]}" \
    --benchmarks "${BENCHMARK_LIST[@]}" --seeds "${#SEED_LIST[@]}" --gpus "$GPUS"
}

check_lists() {
  local item
  for item in "${METHOD_LIST[@]}"; do
    is_one_of "$item" "${METHODS[@]}" || die 2 "METHODS_TO_RUN: unknown method '$item'; choose from ${METHODS[*]}"
  done
  for item in "${MODEL_LIST[@]}"; do
    is_one_of "$item" "${MODEL_TAGS[@]}" || die 2 "MODELS: unknown model '$item'; choose from ${MODEL_TAGS[*]}"
  done
  for item in "${SEED_LIST[@]}"; do
    [[ "$item" =~ ^[0-9]+$ ]] || die 2 "SEEDS: '$item' is not a whole number"
  done
  for item in GPUS TENSOR_PARALLEL; do
    is_count "${!item}" || die 2 "$item='${!item}' is not a positive whole number"
  done
  [[ -z "${RUN_NAME:-}" ]] || die 2 "RUN_NAME is set, but each cell has a name of its own; unset it"
  if [[ -n "${BASE_MODEL_PATH:-}" ]] && ((${#MODEL_LIST[@]} > 1)); then
    die 2 "BASE_MODEL_PATH is one model's copy, but there are ${#MODEL_LIST[@]} models; choose one with MODELS"
  fi
}

evaluate() { # CELL
  local benchmark seed
  for benchmark in "${BENCHMARK_LIST[@]}"; do
    for seed in "${SEED_LIST[@]}"; do
      printf '%s %s %s\n' "$1" "$benchmark" "$seed"
    done
  done | bash "$REPO_ROOT/launchers/eval_workers.sh"
}

# The table and its picture from the existing result files of the listed models.
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
  # A damaged file makes the exit code 1; the table of the others is written all the same.
  run "$VENV_PYTHON" "$REPO_ROOT/summarize_results.py" "${patterns[@]}" --seeds "${SEED_LIST[@]}" \
    --output "$EVAL_ROOT/paper_table.md" --plot "$EVAL_ROOT/paper_table.png"
}

# A missing file must stop the work before its first day.
check_hmmt() {
  local benchmark variable parquet
  for benchmark in hmmt25 hmmt_feb26; do
    is_one_of "$benchmark" "${BENCHMARK_LIST[@]}" || continue
    variable="${benchmark^^}_PARQUET_PATH"
    parquet="${!variable:-$REPO_ROOT/data/${benchmark}_clean/train.parquet}"
    [[ -f "$parquet" ]] || die 3 "$benchmark is not at $parquet: see data/README.md, or leave it out with BENCHMARKS"
  done
}

check_lists
say "${#MODEL_LIST[@]} models x ${#METHOD_LIST[@]} methods, ${#BENCHMARK_LIST[@]} benchmarks x ${#SEED_LIST[@]} seeds"
estimate >&2
[[ "$DRY_RUN" == 1 ]] || check_hmmt
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
    evaluate "$cell" || FAILED+=("$cell: evaluation (exit code $?; the parts that failed are named above)")
  done
  say "== $model, untrained"
  evaluate "$model" || FAILED+=("$model: evaluation (exit code $?; the parts that failed are named above)")
done

summarize || FAILED+=("the table (exit code $?)")
if [[ "$DRY_RUN" != 1 && -f "$EVAL_ROOT/paper_table.md" ]]; then
  cat -- "$EVAL_ROOT/paper_table.md"
fi
if ((${#FAILED[@]})); then
  printf '  %s\n' "${FAILED[@]}" >&2
  die 1 "${#FAILED[@]} part(s) failed (listed above); the same command continues from here"
fi
