"""PW-OPSD and the methods it is compared with: objectives, rollouts, grading, results."""
