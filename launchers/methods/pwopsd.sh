# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
# PW-OPSD, arXiv:2605.21606: OPSD's term weighted by the position in its own sequence, averaged per sequence first.
METHOD_FLAGS=(
  --jsd_token_clip 0.05
  # The Moderate schedule: smallest weight, relative position of half weight, width.
  --position_w_min 0.25 --position_tau 0.30 --position_s 0.10
  --position_global_reduction False
)
