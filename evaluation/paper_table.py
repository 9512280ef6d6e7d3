"""lmms-eval's output as the paper's table, our rows beside the published ones:

    python -m evaluation.paper_table OUTPUT/results.json [MORE.json ...] --everything OUTPUT/results_all_tokens.json

Retained accuracy is the mean over benchmarks of a row's score over the score with all tokens: for the published rows,
those of the paper's own first row; for ours, those of `--everything` (the same command with `compress=False`), or the
published ones where it is not given.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path


# Of each benchmark: lmms-eval's task and metric, and the factor that brings it to the paper's scale.
BENCHMARKS: dict[str, tuple[str, str, float]] = {
    "ScienceQA": ("scienceqa_img", "exact_match,none", 100.0),
    "TextVQA": ("textvqa_val", "exact_match,none", 100.0),
    "MME": ("mme", "mme_perception_score,none", 1.0),
    "VQAv2": ("vqav2_val", "exact_match,none", 100.0),
    "POPE": ("pope", "pope_f1_score,none", 100.0),
    "MMBench": ("mmbench_en_dev", "gpt_eval_score,none", 1.0),
    "GQA": ("gqa", "exact_match,none", 100.0),
}
EVERYTHING = "LLaVA-1.5-7B, 576 tokens (published)"
# The table of the paper's README (training-free, about 58 tokens); it has no GQA.
PUBLISHED: dict[str, dict[str, float]] = {
    name: dict(zip(BENCHMARKS, scores, strict=False))
    for name, scores in {
        EVERYTHING: (68.40, 58.20, 1476.9, 79.10, 86.40, 66.10),
        "ToMe (published)": (50.00, 45.30, 1138.0, 57.10, 52.50, 43.70),
        "PruMerge (published)": (68.52, 53.51, 1191.5, 65.90, 70.70, 56.78),
        "Recoverable Compression (published)": (69.01, 55.51, 1284.9, 70.41, 72.00, 57.90),
    }.items()
}


@dataclass(frozen=True)
class Measured:
    name: str
    scores: dict[str, float]  # by benchmark, for those that ran
    mean_visual_tokens: float | None


def read_results(file: Path) -> Measured:
    """The benchmarks of the paper in one results file of lmms-eval.

    Raises:
        ValueError: if the file holds none of them.
    """
    document = json.loads(file.read_text())
    scores = {}
    for benchmark, (task, metric, factor) in BENCHMARKS.items():
        value = document["results"].get(task, {}).get(metric)
        if isinstance(value, (int, float)):
            scores[benchmark] = factor * value
    if not scores:
        tasks = [task for task, _, _ in BENCHMARKS.values()]
        raise ValueError(f"{file} has results of {sorted(document['results'])}, but none of the paper's tasks {tasks}.")
    name = document["config"].get("model_args") or document.get("model_name", file.stem)
    return Measured(str(name), scores, document.get("throughput", {}).get("avg_mean_visual_tokens"))


def retained(scores: dict[str, float], everything: dict[str, float]) -> float | None:
    """Mean over common benchmarks of score over score with all tokens, in percent; None without a common one."""
    ratios = [scores[name] / everything[name] for name in scores if everything.get(name)]
    return 100 * sum(ratios) / len(ratios) if ratios else None


def make_table(measured: list[Measured], everything: Measured | None = None) -> str:
    """The table in markdown."""
    header = ["", "tokens", *BENCHMARKS, "retained %"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]

    def line(name: str, tokens: str, scores: dict[str, float], base: dict[str, float]) -> None:
        cells = [f"{scores[benchmark]:.2f}" if benchmark in scores else "" for benchmark in BENCHMARKS]
        share = retained(scores, base)
        lines.append("| " + " | ".join([name, tokens, *cells, "" if share is None else f"{share:.1f}"]) + " |")

    for name, scores in PUBLISHED.items():
        line(name, "576" if name == EVERYTHING else "about 58", scores, PUBLISHED[EVERYTHING])
    base = PUBLISHED[EVERYTHING] if everything is None else everything.scores
    for row in [*([everything] if everything else []), *measured]:
        tokens = "all" if row.mean_visual_tokens is None else f"{row.mean_visual_tokens:.1f}"
        line(row.name, tokens, row.scores, base)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.paper_table", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="results files of lmms-eval")
    parser.add_argument("--everything", type=Path, help="results file of the same model with compress=False")
    options = parser.parse_args(arguments)
    everything = None if options.everything is None else read_results(options.everything)
    print(make_table([read_results(file) for file in options.results], everything))


if __name__ == "__main__":
    main()
