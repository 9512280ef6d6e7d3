"""Pictures of a recovery: which patches of an image stay, which the question brings back, which are merged.

    recovery = model.recover_tokens(**inputs)
    draw_recovery(image, recovery).save("recovery.png")

Colours are from Okabe and Ito's palette, which people with any form of colour blindness tell apart, and each kind also
has its own mark. Not part of the remote code: it needs this package, and no transformers.

I images, N patches, M merged tokens.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


Color = tuple[int, int, int]

VISION_COLOR: Color = (230, 159, 0)  # orange
TEXT_COLOR: Color = (0, 114, 178)  # blue
MERGED_COLOR: Color = (0, 158, 115)  # bluish green
INK: Color = (34, 34, 34)
PAPER: Color = (255, 255, 255)


def seen_square(image: Image.Image) -> Image.Image:
    """The centre square of an image, which is what CLIP's image processor shows to the vision tower."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def draw_recovery(
    image: Image.Image, recovery: Any, image_index: int = 0, *, size: int = 672, legend: bool = True
) -> Image.Image:
    """The image with the patches of each kind marked, and below it what the marks mean and how many tokens each gives.

    Args:
        image: the picture that was given to the processor; its centre square is drawn.
        recovery: what `model.recover_tokens(**inputs)` returns.
        image_index: which of its images this is.
        size: about how many pixels wide the picture becomes (a whole number of pixels per patch).
        legend: whether to write the legend below.

    Raises:
        ValueError: if `recovery` has no such image, or `size` is smaller than a pixel per patch.
    """
    kinds = _kinds_of_patches(recovery, image_index)
    grid = len(kinds["vision"])
    if size < grid:
        raise ValueError(f"size must be at least one pixel per patch ({grid}), got {size}.")
    cell = round(size / grid)
    side = cell * grid
    picture = np.asarray(seen_square(image).resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32)
    gray = picture.mean(axis=2, keepdims=True)
    faded = 0.3 * (0.5 * gray + 0.5 * picture) + 0.7 * 255
    tinted = 0.82 * faded + 0.18 * np.array(MERGED_COLOR, dtype=np.float32)

    def pixels(mask: np.ndarray) -> np.ndarray:
        return mask.repeat(cell, 0).repeat(cell, 1)[:, :, None]

    shown = np.where(pixels(kinds["absorbed"] | kinds["centre"]), tinted, faded)
    shown = np.where(pixels(kinds["vision"] | kinds["text"]), picture, shown)
    canvas = Image.fromarray(shown.round().astype(np.uint8))
    _draw_marks(ImageDraw.Draw(canvas), kinds, cell)
    return _stack([canvas, _legend(recovery, image_index, side)]) if legend else canvas


def draw_questions(
    image: Image.Image, recoveries: Mapping[str, Any], *, size: int = 480, answers: Mapping[str, str] | None = None
) -> Image.Image:
    """One row: the image, then what stays of it for each question, each under its question and above its counts.

    Args:
        image: the picture that all questions are about.
        recoveries: from each question to its recovery.
        size: about how many pixels wide each picture becomes.
        answers: from a question to the model's answer, written behind it.
    """
    answers = answers or {}
    drawn = [draw_recovery(image, recovery, size=size) for recovery in recoveries.values()]
    width = max(picture.width for picture in drawn)
    captions = [f"{question} - {answers[question]}" if question in answers else question for question in recoveries]
    titles = _text_blocks(["The image", *captions], width)
    original = seen_square(image).resize((width, width), Image.Resampling.LANCZOS)
    return _side_by_side([_stack([title, picture]) for title, picture in zip(titles, [original, *drawn])])


def _kinds_of_patches(recovery: Any, image_index: int) -> dict[str, np.ndarray]:
    """Masks [grid, grid]: kept by vision, recovered by text, centres of merged tokens, absorbed by a centre."""
    selection = recovery.selection
    num_images, num_patches = selection.chosen_by_vision.shape
    if not 0 <= image_index < num_images:
        raise ValueError(
            f"image_index must be from 0 to {num_images - 1}, as recovery has so many images, got {image_index}."
        )
    grid = round(num_patches**0.5)
    centres = selection.chosen & False if selection.centres is None else selection.centres
    num_centres = int(centres[image_index].sum())
    masks = {
        "vision": selection.chosen_by_vision[image_index],
        "text": selection.chosen_by_text[image_index],
        "centre": centres[image_index],
        "absorbed": (recovery.assembly.merge_weights[image_index, :num_centres] > 0).any(0),
    }
    return {kind: mask.cpu().numpy().reshape(grid, grid) for kind, mask in masks.items()}


def _draw_marks(draw: ImageDraw.ImageDraw, kinds: dict[str, np.ndarray], cell: int) -> None:
    for kind in ("vision", "text", "centre"):
        for row, column in np.argwhere(kinds[kind]):
            _draw_mark(draw, kind, int(column) * cell, int(row) * cell, cell)


def _draw_mark(draw: ImageDraw.ImageDraw, kind: str, left: int, top: int, cell: int) -> None:
    """Vision: a frame. Text: a frame with a filled corner. Centre of a merged token: a disc."""
    line, right, bottom = max(cell // 9, 1), left + cell - 1, top + cell - 1
    if kind == "centre":
        inset = cell // 5
        draw.ellipse((left + inset, top + inset, right - inset, bottom - inset), fill=MERGED_COLOR, outline=PAPER)
        return
    color = VISION_COLOR if kind == "vision" else TEXT_COLOR
    draw.rectangle((left, top, right, bottom), outline=color, width=line)
    if kind == "text":
        corner = cell // 2
        draw.polygon([(left, top), (left + corner, top), (left, top + corner)], fill=color)


def _legend(recovery: Any, image_index: int, width: int) -> Image.Image:
    selection = recovery.selection
    num_visual, num_text, num_merged, num_tokens = (
        int(getattr(selection, f"num_{name}")[image_index]) for name in ("visual", "text", "merged", "tokens")
    )
    num_patches = selection.chosen_by_vision.shape[1]
    rows = [
        ("vision", f"{num_visual} kept by vision"),
        ("text", f"{num_text} recovered for the question"),
        ("centre", f"the rest merged into {num_merged}" if num_merged else "nothing merged"),
    ]
    total = f"{num_tokens} of {num_patches} visual tokens ({100 * num_tokens / num_patches:.0f} %)"
    text_size = max(round(width / 24), 11)
    font, swatch, line = _font(text_size), round(text_size * 1.1), round(text_size * 1.6)
    margin = line // 3
    canvas = Image.new("RGB", (width, line * 4 + 2 * margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), total, fill=INK, font=_font(round(text_size * 1.1)))
    for number, (kind, text) in enumerate(rows, start=1):
        top = margin + number * line
        _draw_mark(draw, kind, margin, top, swatch)
        draw.text((margin + round(swatch * 1.5), top - text_size // 10), text, fill=INK, font=font)
    return canvas


def _text_blocks(texts: list[str], width: int) -> list[Image.Image]:
    """Each text, broken into lines, at the bottom of a block; all blocks are as high as the longest text needs."""
    font = _font(max(round(width / 22), 11))
    line_height = round(font.size * 1.3)
    broken = []
    for text in texts:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and font.getlength(longer) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        broken.append(lines)
    height = max(map(len, broken)) * line_height + line_height // 2
    blocks = []
    for lines in broken:
        block = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(block)
        for number, line in enumerate(reversed(lines), start=1):
            draw.text((0, height - number * line_height - line_height // 4), line, fill=INK, font=font)
        blocks.append(block)
    return blocks


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _stack(pictures: list[Image.Image]) -> Image.Image:
    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    margin = pictures[0].width // 24
    width = sum(p.width for p in pictures) + margin * (len(pictures) + 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures) + 2 * margin), PAPER)
    left = margin
    for picture in pictures:
        canvas.paste(picture, (left, margin))
        left += picture.width + margin
    return canvas
