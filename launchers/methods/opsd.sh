# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
# OPSD, arXiv:2601.18734: the forward KL to the teacher, each vocabulary entry cut at the clip, over all tokens.
# The teacher is the base at step 0 (LoRA switched off) for every method; there is no other one, hence no flag.
METHOD_FLAGS=(--jsd_token_clip 0.05)
