#!/usr/bin/env bash
# The 2 x 2 ablation: position schedule on or off, mean per sequence first or over all tokens of a micro-batch.
#
#   bash launchers/ablation.sh MODEL [CELL ...] [-- flags of ea_opsd_train.py ...]
#
# CELL, all four without one (the two on the diagonal are cells of the main table and keep their run names):
#   schedule_sequence  MODEL_pwopsd         schedule on,  mean per sequence, then over sequences
#   schedule_global    MODEL_pwopsd_global  schedule on,  mean over all tokens
#   flat_sequence      MODEL_pwopsd_flat    schedule off (every weight 1), mean per sequence, then over sequences
#   flat_global        MODEL_opsd           schedule off, mean over all tokens
# Settings: launchers/train.sh, and RUN_SUFFIX, which ends every run's name (a training seed, say).

# shellcheck source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

CELLS=(schedule_sequence schedule_global flat_sequence flat_global)

(($# > 0)) || die 2 "usage: bash launchers/ablation.sh MODEL [CELL ...] [-- flags]; CELL: ${CELLS[*]}"
MODEL="$1"
shift
chosen=()
while (($#)) && [[ "$1" != -- ]]; do
  is_one_of "$1" "${CELLS[@]}" || die 2 "unknown cell '$1'; choose from ${CELLS[*]}"
  chosen+=("$1")
  shift
done
(($# == 0)) || shift
((${#chosen[@]})) || chosen=("${CELLS[@]}")
[[ -z "${RUN_NAME:-}" ]] || die 2 "RUN_NAME is set, but each cell has a name of its own; unset it"

for cell in "${chosen[@]}"; do
  case "$cell" in
    schedule_sequence) method=pwopsd suffix="" flags=() ;;
    schedule_global) method=pwopsd suffix=_global flags=(--position_global_reduction True) ;;
    flat_sequence) method=pwopsd suffix=_flat flags=(--position_w_min 1) ;;
    flat_global) method=opsd suffix="" flags=() ;;
  esac
  RUN_NAME="${MODEL}_${method}${suffix}${RUN_SUFFIX:-}" \
    bash "$REPO_ROOT/launchers/train.sh" "$MODEL" "$method" ${flags[@]+"${flags[@]}"} "$@"
done
