"""Sample a benchmark from a model, grade the answers, write the result.

    python evaluate_math.py --base_model Qwen/Qwen3-4B --dataset aime25 --tensor_parallel_size 4 --seed 1 \\
        --output eval_results/qwen3_4b_base_aime25_38k_seed1.json

Every flag has the paper's value as its default: 12 samples a problem, temperature 1.0, top_p 0.95, top_k and
min_p off, thinking on, at most 38,912 new tokens. The same command resumes a killed run. Prints one line with
the figures and what grading killed. Exit codes: 0 done, 2 a wrong argument (or another run's result or
journal at OUTPUT), 3 a missing or damaged model, benchmark or file.
"""

from __future__ import annotations

from opsd.errors import printable, run_cli
from opsd.evaluation.config import parse_config
from opsd.evaluation.run import evaluate


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation that the command line asks for."""
    config, replace = parse_config(argv)
    result = evaluate(config, replace=replace)
    n, grading = result["val_n"], result.get("grading") or {}
    killed = ""
    if grading.get("killed"):
        items = [item["predicted"] or item["gold"] for item in grading.get("killed_items", [])]
        texts = ", ".join(printable(text, 40) for text in items[:5]) + (", …" if len(items) > 5 else "")
        killed = f"{grading['killed']} killed in grading and counted as not equal ({texts}), "
    print(
        f"{printable(result['dataset'])}: Avg@{n} {result['average_at_n_pct']:.2f} %, "
        f"Pass@{n} {result['pass_at_n_pct']:.2f} %, Maj@{n} {result['majority_vote_at_n_pct']:.2f} %, "
        f"{result['num_problems']} problems, boxed {result['format_rate']:.2f} %, "
        f"truncated {100 * result.get('truncation_share', 0):.2f} %, "
        f"{killed}in {printable(config.output)}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
