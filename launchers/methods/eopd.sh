# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
# EOPD, arXiv:2603.07079: a clipped policy gradient on the sampled token, and where the teacher is uncertain (entropy
# above the threshold, nats) the forward KL over its own top k.
METHOD_FLAGS=(--eopd_entropy_threshold 0.8 --eopd_top_k 16 --eopd_clip_epsilon 0.2)
