"""Evaluate a model: a benchmark and a model enter, one result JSON leaves.

`benchmarks` loads problems (a benchmark is a row), `config` and `model` say what runs, `run` samples,
`journal` keeps every finished sample, `grading` decides which answers are correct and votes, `results` and
`names` write the file.
"""
