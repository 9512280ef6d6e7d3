"""From answers to the table, the files and the picture."""

import csv
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.examples import CROWDED, SECOND_TURN, Example
from evaluation.statistics import Interval, PairedBootstrap, interval, mean_over_kinds


ALL_TOKENS = "all tokens"


@dataclass
class Outcome:
    """What one method did at one budget, question by question."""

    method: str
    budget: int | None  # None: the method decides per image
    correct: np.ndarray  # [questions] bool
    agrees: np.ndarray  # [questions] bool: the same answer as with all tokens
    num_tokens: np.ndarray  # [questions]
    selector_milliseconds: float | None  # per question, choosing and merging, without the towers; None: not known
    answers: list[str] = field(repr=False)


@dataclass(frozen=True)
class Row:
    """One line of the table. Intervals are 95 %, from a paired bootstrap over images."""

    method: str
    budget: str
    mean_tokens: float
    retained: Interval  # mean over kinds of accuracy over accuracy with all tokens, single turns
    behind: Interval | None  # retained by the reference method at this budget minus retained here
    behind_adaptive: Interval | None  # fixed: the same for the reference's adaptive run, where it uses no more tokens
    ahead_of_fixed: Interval | None  # adaptive: retained here minus by the same method with a fixed number, no smaller
    accuracy: dict[str, Interval]  # by kind
    retained_by_kind: dict[str, Interval]
    fidelity: float
    selector_milliseconds: float | None
    tokens_follow_objects: float | None  # correlation of tokens with objects in the scene, adaptive only
    questions: int


def make_table(examples: list[Example], outcomes: list[Outcome], reference: str | None = None) -> list[Row]:
    """One row for each outcome.

    Args:
        reference: the method that `behind` compares with, where it ran at the same budget.

    Raises:
        ValueError: if no outcome is the one with all tokens.
    """
    everything = next((outcome for outcome in outcomes if outcome.method == ALL_TOKENS), None)
    if everything is None:
        raise ValueError(f"outcomes hold no {ALL_TOKENS!r}, which is what retained accuracy is measured against.")
    kinds = np.array([example.kind for example in examples])
    images = np.array([example.image for example in examples])
    objects = np.array([np.nan if e.num_objects is None else e.num_objects for e in examples])
    single = kinds != SECOND_TURN
    groups = {"overall": single}
    if np.isfinite(objects).any():
        groups["crowded"] = single & (objects >= CROWDED)
    if (~single).any():
        groups[SECOND_TURN] = ~single
    bootstraps = {name: PairedBootstrap(images[mask], kinds[mask]) for name, mask in groups.items() if mask.any()}

    def retained_over_kinds(outcome: Outcome, group: str) -> np.ndarray:
        mask = groups[group]
        return mean_over_kinds(100 * bootstraps[group].retained(outcome.correct[mask], everything.correct[mask]))

    def least_fixed(outcome: Outcome, method: str) -> Outcome | None:
        """The smallest fixed budget of a method that is at least what an adaptive outcome uses on average.

        For a method that cannot run with a budget, since it differs in the threshold alone, it is one of the method
        that its name begins with.
        """
        mean = outcome.num_tokens[single].mean()
        own, like = (
            [o for o in outcomes if o.method == name and o.budget is not None]
            for name in (method, method.split(",")[0])
        )
        return min((o for o in own or like if o.budget >= mean), key=lambda o: o.budget or 0, default=None)

    adaptive = next((o for o in outcomes if o.method == reference and o.budget is None), None)
    references = {o.budget: retained_over_kinds(o, "overall") for o in outcomes if o.method == reference}
    rows = []
    for outcome in outcomes:
        overall = retained_over_kinds(outcome, "overall")
        is_compared = outcome.budget in references and outcome.method not in (reference, ALL_TOKENS)
        is_adaptive = outcome.budget is None and outcome.method != ALL_TOKENS
        fixed = least_fixed(outcome, outcome.method) if is_adaptive else None
        is_least = adaptive is not None and least_fixed(adaptive, outcome.method) is outcome
        accuracy, by_kind = {}, {}
        for name, bootstrap in bootstraps.items():
            mask = groups[name]
            accuracies = 100 * bootstrap.accuracy(outcome.correct[mask])
            ratios = 100 * bootstrap.retained(outcome.correct[mask], everything.correct[mask])
            if name == "overall":
                for column, kind in enumerate(bootstrap.kinds):
                    accuracy[str(kind)] = interval(accuracies[:, column])
                    by_kind[str(kind)] = interval(ratios[:, column])
            else:
                accuracy[name] = interval(mean_over_kinds(accuracies))
                by_kind[name] = interval(mean_over_kinds(ratios))
        known = np.isfinite(objects)
        varies = is_adaptive and known.any() and outcome.num_tokens[known].std() > 0
        rows.append(
            Row(
                method=outcome.method,
                budget="adaptive" if outcome.budget is None else str(outcome.budget),
                mean_tokens=float(outcome.num_tokens[single].mean()),
                retained=interval(overall),
                behind=interval(references[outcome.budget] - overall) if is_compared else None,
                behind_adaptive=interval(references[None] - overall) if is_least else None,
                ahead_of_fixed=None if fixed is None else interval(overall - retained_over_kinds(fixed, "overall")),
                accuracy=accuracy,
                retained_by_kind=by_kind,
                fidelity=float(100 * outcome.agrees[single].mean()),
                selector_milliseconds=outcome.selector_milliseconds,
                tokens_follow_objects=(
                    float(np.corrcoef(outcome.num_tokens[known], objects[known])[0, 1]) if varies else None
                ),
                questions=int(single.sum()),
            )
        )
    return rows


def write_table(rows: list[Row], facts: dict[str, Any], folder: Path) -> None:
    """results.json (everything), results.csv (one line a row), results.md and retained.png in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"facts": facts, "rows": [asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for line in flat for name in line))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(flat)
    (folder / "results.md").write_text(markdown(rows) + "\n")
    draw_curves(rows, folder / "retained.png")


def markdown(rows: list[Row]) -> str:
    """The table for people: accuracy by kind in percent, retained with its interval."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.accuracy))
    header = ["method", "budget", "tokens", "retained %", "ahead of it by", "adaptive ahead of it by"]
    header += ["ahead of fixed by", *kinds]
    header += ["fidelity", "selector ms", "r(objects)"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows:
        cells = [row.method, row.budget, f"{row.mean_tokens:.1f}", _bracketed(row.retained)]
        cells += [
            "" if part is None else _bracketed(part) for part in (row.behind, row.behind_adaptive, row.ahead_of_fixed)
        ]
        cells += [f"{row.accuracy[kind].value:.1f}" if kind in row.accuracy else "" for kind in kinds]
        cells.append(f"{row.fidelity:.1f}")
        cells.append("" if row.selector_milliseconds is None else f"{row.selector_milliseconds:.2f}")
        cells.append("" if row.tokens_follow_objects is None else f"{row.tokens_follow_objects:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(rows: list[Row], file: Path) -> None:
    """Retained accuracy over mean tokens, one curve a method, adaptive runs as stars."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    drawn = [row for row in rows if row.method != ALL_TOKENS and np.isfinite(row.retained.value)]
    methods = list(dict.fromkeys(row.method for row in drawn))
    colors = pyplot.get_cmap("tab20")
    for number, method in enumerate(methods):
        mine = sorted((row for row in drawn if row.method == method), key=lambda row: row.mean_tokens)
        fixed = [row for row in mine if row.budget != "adaptive"]
        style = {"color": colors(number % 20), "linewidth": 2.5 if number == 0 else 1.2}
        style |= {"linestyle": "-" if number < 20 else "--"}  # there are 20 colors
        if fixed:
            tokens = [row.mean_tokens for row in fixed]
            axes.plot(tokens, [row.retained.value for row in fixed], marker="o", markersize=4, label=method, **style)
            if number == 0:
                lows, highs = [row.retained.low for row in fixed], [row.retained.high for row in fixed]
                axes.fill_between(tokens, lows, highs, color=style["color"], alpha=0.2)
        for row in mine:
            if row.budget == "adaptive":
                label = None if fixed else method
                axes.plot(row.mean_tokens, row.retained.value, "*", markersize=12, color=style["color"], label=label)
    axes.axhline(100, color="black", linewidth=0.8, linestyle="dotted")
    if methods:
        axes.set_xscale("log", base=2)
    axes.set_xlabel("visual tokens per image (mean); stars: adaptive")
    axes.set_ylabel("retained accuracy, % of all tokens")
    if methods:
        axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _flat(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if name in ("accuracy", "retained_by_kind"):
            for kind, part in value.items():
                line |= {f"{name} {kind} {end}": round(part[end], 4) for end in ("value", "low", "high")}
        elif isinstance(value, dict):
            line |= {f"{name} {end}": round(value[end], 4) for end in ("value", "low", "high")}
        else:
            line[name] = round(value, 4) if isinstance(value, float) else value
    return line


def _bracketed(part: Interval) -> str:
    return f"{part.value:.1f} [{part.low:.1f}, {part.high:.1f}]"
