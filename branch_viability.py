"""The paper's branch-viability diagnostic, with the control that it lacks.

    python branch_viability.py --model_name_or_path testbed/base_model --dataset testbed/data/heldout.jsonl \\
        --num_problems 50 --num_positions 4 --top_k 2 --continuations 6 --max_new_tokens 128 --engine hf \\
        --suggest_schedule --output_dir outputs/small_branches

Take a student rollout (the spine). At forks along it, force each of the privileged teacher's likeliest next
tokens after the student's prompt and the spine so far, and let the student go on: the branch is viable if its
continuations recover the answer. The control continues the same prefixes with nothing forced. From both
follows whether PW-OPSD is to be expected above OPSD, and with --suggest_schedule which schedule gains most.

Writes branches.csv, branches.parquet, viability_vs_position.png, report.md and journal.jsonl (every
continuation) into --output_dir. The same command resumes a killed run, and analyses a finished one again
without sampling. docs/branch_viability.md says how to read the report. Exit codes: 0 done, 2 a wrong argument
(or another run's journal in the folder), 3 a missing or damaged model, data set or file.
"""

from __future__ import annotations

import sys
from pathlib import Path

from opsd.diagnostic.config import parse_config
from opsd.errors import printable, run_cli


def main(argv: list[str] | None = None) -> int:
    """Run the diagnostic that the command line asks for."""
    config = parse_config(argv)
    # torch and transformers take seconds to import; a wrong flag is answered before that.
    from opsd.diagnostic.report import prediction
    from opsd.diagnostic.run import diagnose

    analysis = diagnose(config, command=sys.argv[1:] if argv is None else argv)
    everything, decision = analysis.subsets[0], analysis.decision
    position = everything.aurocs["relative_position"]
    print(
        f"{everything.branches} branches of {everything.problems} problems: {prediction(decision)} (value of "
        f"the teacher's choices where it takes weight away: {decision.early.text(digits=3)}). AUROC of "
        f"relative position {position['absolute'].text()} for absolute viability, "
        f"{position['relative'].text()} relative to the control; report in "
        f"{printable(Path(config.output_dir) / 'report.md')}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
