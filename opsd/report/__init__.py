"""Turn results into tables and pictures.

Result JSONs and metrics.jsonl enter; Markdown, CSV, LaTeX and images leave.

`summary` groups results by model and regime, `notes` marks cells that are not the paper's, `commands` prints what
would fill a missing cell; `summary_plot`, `run_plots` and `plots` draw.
"""
