"""Evaluate a model: a benchmark and a model enter, one result JSON leaves.

`config` holds the settings, `benchmarks` loads the problems, `model` checks the model and builds the engine,
`run` samples, `journal` keeps finished samples, `scoreboard` and `grading` grade, `results` and `names` write
the file.
"""
