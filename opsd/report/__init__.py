"""Turn result files and metrics.jsonl into tables (Markdown, CSV, LaTeX) and pictures.

`summary` groups results by model and regime, `notes` says what is unlike the paper and how to fill missing
cells; `summary_plot`, `run_plots` and `plots` draw.
"""
