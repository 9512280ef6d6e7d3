"""The picture in docs/architecture.md: the way of an image and its question through the code.

python docs/scripts/architecture.py
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # noqa: E402


PICTURE = Path(__file__).parents[1] / "pictures" / "architecture.png"
INK, QUIET = "#1b1f24", "#57606a"
ROOMS = {
    "processing": ("#fff1d6", "question_processor.py, question_text.py"),
    "vision": ("#dcecff", "recoverable_vision.py"),
    "model": ("#ddf4e4", "recoverable_model.py"),
    "generation": ("#f3e3ff", "recoverable_generation.py"),
}
# Title, what it yields, the file that says how, room, column, row.
BOXES = {
    "processor": ("Processor", "ids with N placeholders,\npixels, the question", "processing_…", "processing", 0, 1),
    "tower": ("Vision tower", "patches, class attention,\nkeys", "clip_scores.py", "vision", 1, 2),
    "question": ("Question tower", "the question in CLIP's\njoint space", "CLIP, frozen", "vision", 1, 0),
    "score": ("Score", "relevance of each patch\nto its question", "clip_scores.py", "vision", 2, 1),
    "select": ("Select", "which patches stay", "novelty_selection.py\nor paper_selection.py", "vision", 3, 1),
    "assemble": ("Assemble, project", "K visual tokens,\nmerged ones last", "token_assembly.py", "vision", 4, 1),
    "shorten": ("Shorten the prompt", "S of L tokens", "short_prompt.py", "model", 4, 0),
    "language": ("Language model", "hidden states, KV cache", "stock, untouched", "model", 5, 0.5),
    "back": (
        "Back to the original",
        "logits, loss, ids as\nthe caller counts",
        "original_prompt.py\ncache_history.py",
        "generation",
        6,
        0.5,
    ),
}
ARROWS = [
    ("processor", "tower"),
    ("processor", "question"),
    ("tower", "score"),
    ("question", "score"),
    ("score", "select"),
    ("select", "assemble"),
    ("select", "shorten"),
    ("assemble", "language"),
    ("shorten", "language"),
    ("language", "back"),
]
WIDTH, HEIGHT, STEP_X, STEP_Y = 2.35, 1.5, 2.85, 1.95


def main() -> None:
    figure, axes = plt.subplots(figsize=(20, 6), dpi=90)
    places = {}
    for name, (title, yields, file, room, column, row) in BOXES.items():
        left, bottom = column * STEP_X, row * STEP_Y
        places[name] = (left, bottom + HEIGHT / 2)
        style = "round,pad=0.02,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((left, bottom), WIDTH, HEIGHT, style, fc=ROOMS[room][0], ec=QUIET, lw=1))
        middle = left + WIDTH / 2
        axes.text(middle, bottom + 1.26, title, ha="center", va="center", fontsize=12, weight="bold", color=INK)
        axes.text(middle, bottom + 0.82, yields, ha="center", va="center", fontsize=10.5, color=INK)
        axes.text(middle, bottom + 0.28, file, ha="center", va="center", fontsize=8.5, color=QUIET, family="monospace")
    for start, end in ARROWS:
        (left, middle), (to_left, to_middle) = places[start], places[end]
        arrow = {"arrowstyle": "-|>", "mutation_scale": 14, "color": QUIET, "shrinkA": 3, "shrinkB": 3}
        if start == "select" and end == "shorten":
            arrow["connectionstyle"] = "arc3,rad=0.15"
        axes.add_patch(FancyArrowPatch((left + WIDTH, middle), (to_left, to_middle), **arrow))
    for number, (color, file) in enumerate(ROOMS.values()):
        left = number * 5.4
        axes.add_patch(FancyBboxPatch((left, -0.95), 0.35, 0.3, "round,pad=0.02", fc=color, ec=QUIET, lw=1))
        axes.text(left + 0.5, -0.8, file, va="center", fontsize=10.5, color=INK, family="monospace")
    axes.set_xlim(-0.2, 6 * STEP_X + WIDTH + 0.2)
    axes.set_ylim(-1.1, 2 * STEP_Y + HEIGHT + 0.15)
    axes.axis("off")
    figure.savefig(PICTURE, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
