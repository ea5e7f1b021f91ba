"""Turn result files and metrics.jsonl into tables (Markdown, CSV, LaTeX) and pictures.

`summary` groups results by model and regime, `notes` marks cells that are not the paper's, `commands` fills
missing cells; `summary_plot`, `run_plots` and `plots` draw.
"""
