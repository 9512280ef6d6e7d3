"""A picture of a run: losses and accuracy per kind of question over the steps."""

import json
from pathlib import Path

from .questions import KINDS


LOSSES = ("answers", "dense", "contrastive")


def plot(run: str, output: str) -> None:
    """Draws `run`/log.jsonl to the PNG `output`."""
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "answers" in row]
    if not rows:
        raise ValueError(f"{run}/log.jsonl has no training rows: name the folder of a run")
    steps = [row["step"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in LOSSES:
        left.plot(steps, [row[name] for row in rows], label=name)
    left.set(yscale="log", xlabel="step", ylabel="loss")
    for kind in KINDS:
        right.plot(steps, [row[f"first_{kind}"] for row in rows], label=kind)
    right.plot(steps, [row["retrieved"] for row in rows], "k--", label="caption retrieval")
    right.set(xlabel="step", ylabel="accuracy of the first question (fresh scenes)", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    minutes = rows[-1]["seconds"] / 60
    figure.suptitle(f"Training of the embedded checkpoint: {steps[-1]} steps in {minutes:.1f} minutes")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
