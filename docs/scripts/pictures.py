"""`make pictures`: draw questions.png and steps.png of docs/pictures with the embedded checkpoint."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from recoverable_llava.tools.asking import ask, load, user_turn
from recoverable_llava.tools.pictures import open_picture
from recoverable_llava.tools.visualize import draw_questions, draw_recovery, seen_square


ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"
QUESTIONS = ("What word is under the lemon?", "What color is the plate of the penguin?")
PANEL = 384


def _heat(picture: Image.Image, scores: torch.Tensor) -> Image.Image:
    """Scores [N] over the picture, low to high in cividis, which the colour-blind read as well."""
    grid = round(len(scores) ** 0.5)
    ranks = scores.argsort().argsort().float() / len(scores)
    colors = matplotlib.colormaps["cividis"](ranks.reshape(grid, grid).numpy())[:, :, :3]
    heat = Image.fromarray((colors * 255).astype(np.uint8)).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    return Image.blend(seen_square(picture).resize((PANEL, PANEL)), heat, 0.7)


def _tiled(panels: dict[str, Image.Image], columns: int) -> Image.Image:
    margin, title_height, font = 16, 30, ImageFont.load_default(size=24)
    width, height = PANEL + margin, PANEL + margin + title_height
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (columns * width + margin, rows * height + margin), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for number, (title, panel) in enumerate(panels.items()):
        left, top = margin + number % columns * width, margin + number // columns * height
        draw.text((left, top - 4), title, fill=(34, 34, 34), font=font)
        canvas.paste(panel, (left, top + title_height))
    return canvas


def main() -> None:
    model, processor = load(str(ROOT / "checkpoints" / "tiny"), "cpu")
    picture = open_picture(ROOT / "demo" / "scene.png")
    answers = {question: ask(model, processor, [user_turn(question, picture)]) for question in QUESTIONS}
    draw_questions(
        picture,
        {question: answer.recovery for question, answer in answers.items()},
        answers={question: answer.text for question, answer in answers.items()},
    ).save(PICTURES / "questions.png", optimize=True)

    recovery = answers[QUESTIONS[1]].recovery
    selection, nothing = recovery.selection, torch.zeros_like(recovery.selection.chosen_by_vision)
    first = replace(selection, chosen_by_text=nothing, centres=None)
    second = replace(selection, centres=None)

    def drawn(selected: object) -> Image.Image:
        return draw_recovery(picture, replace(recovery, selection=selected), size=PANEL, legend=False)

    panels = {
        "the image": seen_square(picture).resize((PANEL, PANEL)),
        "class attention, low to high": _heat(picture, recovery.visual_scores[0]),
        f"1. {int(selection.num_visual)} kept by vision": drawn(first),
        "relevance, low to high": _heat(picture, recovery.text_scores[0]),
        f"2. {int(selection.num_text)} recovered": drawn(second),
        f"3. the rest merged into {int(selection.num_merged)}": drawn(selection),
    }
    _tiled(panels, columns=3).save(PICTURES / "steps.png", optimize=True)


if __name__ == "__main__":
    main()
