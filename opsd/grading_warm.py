"""Imported by the server process that grading workers are forked from: what it learns, every worker knows."""

from opsd.grading_worker import warm_up

warm_up()
