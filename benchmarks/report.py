"""Rows of measurements as results.json, results.csv, table.md (with the bars of the project) and table.png."""

import csv
import json
from pathlib import Path
from typing import Any

from .models import SHAPES


Row = dict[str, Any]
NAMES = {
    ("stock", "eager"): "stock LLaVA",
    ("adaptive", "eager"): "ours, adaptive",
    ("adaptive, even", "eager"): "ours, adaptive, even batch",
    ("fixed", "eager"): "ours, fixed",
    ("bound", "eager"): "bound (58 tokens for free)",
    ("stock", "captured"): "stock LLaVA, captured",
    ("stock", "compiled"): "stock LLaVA, compiled",
    ("fixed", "captured"): "ours, fixed, captured",
    ("fixed", "compiled"): "ours, fixed, compiled",
}
CALLS = {
    "first_token_ms": ("first token, ms", 1.0),
    "prefill_ms": ("prefill, ms", 1.0),
    "decode_step_ms": ("decode step, ms", 1.0),
    "tokens_per_s": ("tokens/s over 128", 1.0),
    "first_token_low_ms": ("lowest", 1.0),
    "first_token_high_ms": ("highest", 1.0),
    "answer_32_ms": ("32 tokens, ms", 1.0),
    "answer_32_low_ms": ("lowest", 1.0),
    "answer_32_high_ms": ("highest", 1.0),
    "answer_128_ms": ("128 tokens, ms", 1.0),
    "mean_visual_tokens": ("visual tokens, mean", 1.0),
    "first_token_peak_bytes": ("peak, GB", 1e9),
    "prefill_peak_bytes": ("prefill peak, GB", 1e9),
    "cache_bytes": ("KV cache, GB", 1e9),
    "prompt_length": ("prompt", 1.0),
}


class Results:
    """Rows by (shape, batch, method, mode, quantity)."""

    def __init__(self, rows: list[Row]):
        self.rows = rows
        self.values = {(r["shape"], r["batch"], r["method"], r["mode"], r["quantity"]): r["value"] for r in rows}
        self.shapes = list(dict.fromkeys(row["shape"] for row in rows))

    def get(self, shape: str, batch: int, method: str, mode: str, quantity: str) -> float | None:
        return self.values.get((shape, batch, method, mode, quantity))

    def largest_batch(self, shape: str, method: str, quantity: str) -> float | None:
        found = [r["value"] for r in self.rows if (r["shape"], r["method"], r["quantity"]) == (shape, method, quantity)]
        return found[0] if found else None


def names_of(results: Results, shape: str) -> dict[tuple[str, str], str]:
    """What the methods and modes of a shape are called: those of all shapes, and its own."""
    found = dict.fromkeys((row["method"], row["mode"]) for row in results.rows if row["shape"] == shape)
    own = [case for case in found if case not in NAMES and case[0].startswith(("fixed ", "stock, "))]
    return NAMES | {case: case[0] if case[0].startswith("stock") else f"ours, {case[0]}" for case in own}


def selection_shares(results: Results, shape: str) -> list[tuple[str, int, float]]:
    """(method, batch, percent of stock's first token) of every selection that was timed."""
    listed = []
    for row in results.rows:
        if row["shape"] == shape and row["quantity"] == "selection_ms":
            stock = results.get(shape, row["batch"], "stock", "eager", "first_token_ms")
            if stock:
                listed.append((row["method"], row["batch"], 100 * row["value"] / stock))
    return listed


def bars(results: Results, shape: str) -> list[tuple[str, float | None, str, bool | None]]:
    """(what, measured, bar, met) for every bar of the project that was measured."""

    def ratio(above: float | None, below: float | None) -> float | None:
        return None if above is None or not below else above / below

    def first(batch: int, method: str, mode: str = "eager") -> float | None:
        return results.get(shape, batch, method, mode, "first_token_ms")

    def fastest(batch: int) -> float | None:
        times = [first(batch, "fixed", mode) for mode in ("captured", "compiled")]
        return min((time for time in times if time is not None), default=None)

    def total(*parts: float | None) -> float | None:
        return None if None in parts else sum(part for part in parts if part is not None)

    listed: list[tuple[str, float | None, str, float]] = []
    for batch, bar in ((32, 3.7), (8, 2.6), (1, 1.0)):
        value = ratio(first(batch, "stock"), first(batch, "adaptive"))
        listed.append((f"first token, adaptive against stock, both eager, B = {batch}", value, ">=", bar))
    value = ratio(first(32, "stock"), first(32, "adaptive, even"))
    listed.append(("first token, adaptive against stock, both eager, every image as long, B = 32", value, ">=", 3.7))
    for batch, bar in ((32, 4.0), (8, 3.8), (1, 5.0)):
        value = ratio(first(batch, "stock"), fastest(batch))
        listed.append((f"first token, fixed captured or compiled against stock eager, B = {batch}", value, ">=", bar))
    for mode in ("captured", "compiled"):
        value = ratio(first(1, "stock", mode), first(1, "fixed", mode))
        listed.append((f"first token, fixed against stock, both {mode}, B = 1", value, ">=", 1.8))
    for method in ("adaptive", "fixed"):
        value = results.get(shape, 1, method, "eager", "selector_ms")
        listed.append((f"selector, {method}, eager, B = 1, ms", value, "<=", 3.0))
    listed.append(
        ("selector, captured, B = 1, ms", results.get(shape, 1, "fixed", "captured", "selector_ms"), "<=", 0.5)
    )
    selector = results.get(shape, 32, "adaptive", "eager", "selector_ms")
    tower = results.get(shape, 32, "adaptive", "eager", "question_tower_ms")
    share = ratio(total(selector, tower), first(32, "stock"))
    listed.append(("selector and text tower against stock's first token, B = 32, %", share and 100 * share, "<=", 2.0))
    for mode in ("captured", "compiled"):
        decode = [results.get(shape, 32, method, mode, "decode_step_ms") for method in ("stock", "fixed")]
        listed.append((f"decode step, fixed against stock, both {mode}, B = 32", ratio(*decode), ">=", 1.4))
    caches = [results.get(shape, 32, method, "eager", "cache_bytes") for method in ("adaptive", "stock")]
    lengths = [results.get(shape, 32, method, "eager", "prompt_length") for method in ("adaptive", "stock")]
    value = ratio(ratio(*caches), ratio(*lengths))
    listed.append(("KV cache, share of stock's over share of the tokens", value, "<=", 1.01))
    for method in ("adaptive", "fixed"):
        peaks = [results.get(shape, 32, m, "eager", "prefill_peak_bytes") for m in (method, "stock")]
        listed.append((f"prefill peak, {method}, share of stock's, B = 32", ratio(*peaks), "<=", 0.22))
        for what in ("first_token", "128_more"):
            value = ratio(*(results.largest_batch(shape, m, f"largest_batch_{what}") for m in (method, "stock")))
            listed.append((f"largest batch, {what.replace('_', ' ')}, {method} against stock", value, ">=", 4.0))
    released = results.get(shape, 1, "paper, as released", "eager", "released_step_ms")
    for mode in ("eager", "captured"):
        ours = results.get(shape, 1, "fixed", mode, "same_step_ms")
        listed.append((f"recovery step, {mode}, against the paper's release, B = 1", ratio(released, ours), ">=", 20.0))
    return [
        (what, value, f"{sign} {bar:g}", None if value is None else (value >= bar if sign == ">=" else value <= bar))
        for what, value, sign, bar in listed
    ]


def table(results: Results, facts: dict[str, Any]) -> str:
    is_tiled = all(SHAPES[shape].is_tiled for shape in results.shapes)
    how = "medians" if is_tiled else f"budget {facts['budget']}, median of {facts['repeats']} or more"
    parts = [
        f"{facts['device']}, torch {facts['torch']}, transformers {facts['transformers']}, {facts['dtype']}, "
        f"{facts['date']}; 64 text tokens a prompt, {how}.",
    ]
    for shape in results.shapes:
        rows = [row for row in results.rows if row["shape"] == shape]
        batches = sorted({row["batch"] for row in rows if row["quantity"] == "first_token_ms"})
        for batch in batches:
            stock = results.get(shape, batch, "stock", "eager", "first_token_ms")
            measured_here = {row["quantity"] for row in rows if row["batch"] == batch}
            calls = {quantity: call for quantity, call in CALLS.items() if quantity in measured_here}
            lines = [f"### {shape}, batch {batch}", ""]
            lines.append("| | " + " | ".join(title for title, _ in calls.values()) + " | stock eager / this |")
            lines.append("|---" * (len(calls) + 2) + "|")
            for (method, mode), name in names_of(results, shape).items():
                values = [results.get(shape, batch, method, mode, quantity) for quantity in calls]
                if any(value is not None for value in values):
                    cells = [_number(v, scale) for v, (_, scale) in zip(values, calls.values())]
                    ratio = f"{stock / values[0]:.2f} ×" if stock and values[0] else ""
                    lines.append(f"| {name} | " + " | ".join(cells) + f" | {ratio} |")
            parts.append("\n".join(lines))
        others = [row for row in rows if row["quantity"] not in CALLS]
        if others:
            lines = [f"### {shape}, parts", "", "| part | method | mode | batch | value |", "|---|---|---|---|---|"]
            for row in others:
                value = _number(row["value"], 1.0)
                lines.append(f"| {row['quantity']} | {row['method']} | {row['mode']} | {row['batch']} | {value} |")
            parts.append("\n".join(lines))
        for method, batch, share in selection_shares(results, shape):
            parts.append(f"Selection, {method}, batch {batch}: {share:.2f} % of stock's first token.")
        measured = [bar for bar in bars(results, shape) if bar[1] is not None]
        if measured and not SHAPES[shape].is_tiled:
            lines = [f"### {shape}, bars", "", "| | measured | bar | |", "|---|---|---|---|"]
            for what, value, bar, met in measured:
                lines.append(f"| {what} | {value:.3g} | {bar} | {'met' if met else 'missed'} |")
            parts.append("\n".join(lines))
    if facts["left_out"]:
        parts.append("Left out: " + "; ".join(facts["left_out"]))
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, scale: float) -> str:
    if value is None:
        return ""
    value = value / scale
    return f"{value:.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def draw(results: Results, facts: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results.shapes), 3, figsize=(13, 3.6 * len(results.shapes)), squeeze=False)
    for shape, row_of_axes in zip(results.shapes, axes):
        batches = sorted(
            {r["batch"] for r in results.rows if r["shape"] == shape and r["quantity"] == "first_token_ms"}
        )[:3]
        for batch, axis in zip(batches, row_of_axes):
            known = [
                (name, value)
                for case, name in names_of(results, shape).items()
                if (value := results.get(shape, batch, *case, "first_token_ms")) is not None
                and not name.startswith("stock, ")  # measured again: its spread is in the table
            ]
            colours = ["#888888" if "stock" in n else "#c9c9c9" if "bound" in n else "#2a6fb0" for n, _ in known]
            drawn = axis.barh([name for name, _ in known], [value for _, value in known], color=colours)
            axis.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.set_title(f"{shape}, batch {batch}", fontsize=10)
            axis.set_xlabel("time to first token, ms")
            axis.margins(x=0.15)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{facts['device']}, {facts['dtype']}, transformers {facts['transformers']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_report(folder: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    write_tables(folder, rows, facts)
    if rows:
        draw(Results(rows), facts, folder / "table.png")
    print((folder / "table.md").read_text())


def write_tables(folder: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["shape", "batch", "method", "mode", "quantity", "value"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "table.md").write_text(table(Results(rows), facts))
