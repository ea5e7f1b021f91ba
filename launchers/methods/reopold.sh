# shellcheck shell=bash disable=SC2034  # read by the launcher that sources this
# REOPOLD, arXiv:2603.11137: the reward of a token is floored at log(lambda) / (1 - lambda) nats; from the switch on
# only the share beta of the tokens with the highest student entropy counts.
METHOD_FLAGS=(--reopold_lambda 0.1 --reopold_beta 0.2 --reopold_t_switch 50)
