"""PW-OPSD and the methods it is compared with: objectives, rollouts, grading, results."""

from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent
