"""Pictures of a recovery: which patches of an image stay, which the question brings back, which are merged.

    recovery = model.recover_tokens(**inputs)
    draw_recovery(image, recovery).save("recovery.png")

What a model sees of a picture depends on its family: LLaVA-1.5 the centre square, LLaVA-NeXT all of it, in tiles.
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

_SMOOTH = Image.Resampling.LANCZOS


def seen_square(image: Image.Image) -> Image.Image:
    """The centre square of an image, which is what CLIP's image processor shows to the vision tower."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def draw_recovery(
    image: Image.Image, recovery: Any, image_index: int = 0, *, size: int = 672, legend: bool = True
) -> Image.Image:
    """The image with the patches of each kind marked, and below it what the marks mean and how many tokens each gives.

    LLaVA-1.5 sees the centre square. LLaVA-NeXT sees the whole picture twice, and so it is drawn twice, one below the
    other (a high one side by side): its tiles joined, where patches are small and sharp, and the whole in one tile,
    where they are large and coarse.

    Args:
        image: the picture that was given to the processor.
        recovery: what `model.recover_tokens(**inputs)` returns.
        image_index: which of its images this is.
        size: about how many pixels the longer side of the picture becomes (a whole number of pixels per patch).
        legend: whether to write the legend below.

    Raises:
        ValueError: if `recovery` has no such image, or `size` is smaller than a pixel per patch.
    """
    kinds = _kinds_of_patches(recovery, image_index)
    if recovery.tiles is None:
        grid = round(len(kinds["vision"]) ** 0.5)
        _check_size(size, grid)
        cell = round(size / grid)
        drawn = _draw_patches(seen_square(image), kinds, (grid, grid), (cell, cell))
        size = cell * grid
    else:
        drawn = _draw_tiles(image, kinds, recovery.tiles[image_index], size)
    return _stack([drawn, _legend(recovery, image_index, size)]) if legend else drawn


def draw_questions(
    image: Image.Image, recoveries: Mapping[str, Any], *, size: int = 480, answers: Mapping[str, str] | None = None
) -> Image.Image:
    """One row: the image, then what stays of it for each question, each under its question and above its counts.

    Args:
        image: the picture that all questions are about.
        recoveries: from each question to its recovery.
        size: as in `draw_recovery`.
        answers: from a question to the model's answer, written behind it.
    """
    answers = answers or {}
    drawn = [draw_recovery(image, recovery, size=size) for recovery in recoveries.values()]
    is_square = all(recovery.tiles is None for recovery in recoveries.values())
    original = seen_square(image) if is_square else image.convert("RGB")
    scale = (drawn[0].width if is_square else size) / max(original.size)
    original = original.resize((_scaled(original.width, scale), _scaled(original.height, scale)), _SMOOTH)
    captions = [f"{question} - {answers[question]}" if question in answers else question for question in recoveries]
    pictures = [original, *drawn]
    titles = _text_blocks(["The image", *captions], [picture.width for picture in pictures])
    margin = max(titles[0].width, 1) // 24
    return _side_by_side([_stack([title, picture]) for title, picture in zip(titles, pictures)], margin, around=margin)


def _kinds_of_patches(recovery: Any, image_index: int) -> dict[str, np.ndarray]:
    """Masks [N]: kept by vision, recovered by text, centres of merged tokens, absorbed by a centre."""
    selection = recovery.selection
    num_images = len(selection.chosen_by_vision)
    if not 0 <= image_index < num_images:
        raise ValueError(
            f"image_index must be from 0 to {num_images - 1}, as recovery has so many images, got {image_index}."
        )
    centres = selection.chosen & False if selection.centres is None else selection.centres
    num_centres = int(centres[image_index].sum())
    masks = {
        "vision": selection.chosen_by_vision[image_index],
        "text": selection.chosen_by_text[image_index],
        "centre": centres[image_index],
        "absorbed": (recovery.assembly.merge_weights[image_index, :num_centres] > 0).any(0),
    }
    return {kind: mask.cpu().numpy() for kind, mask in masks.items()}


def _check_size(size: int, most_patches: int) -> None:
    if size < most_patches:
        raise ValueError(f"size must be at least one pixel per patch ({most_patches}), got {size}.")


def _draw_tiles(image: Image.Image, kinds: dict[str, np.ndarray], tiles: Any, size: int) -> Image.Image:
    """A picture that was cut into tiles, as its tiles show it and as its base tile does."""
    side, num_base = tiles.grid_width, tiles.grid_width**2
    _check_size(size, max(side, tiles.rows, tiles.columns))
    scale = size / max(image.size)
    base_cell = _scaled(image.width, scale / side), _scaled(image.height, scale / side)
    whole = image.convert("RGB")
    base = _draw_patches(whole, {kind: mask[:num_base] for kind, mask in kinds.items()}, (side, side), base_cell)
    views = {f"As a whole, coarse: {_num_kept(kinds, slice(num_base))} of {num_base} patches": base}
    if tiles.num_patches > num_base:  # the tiles show nothing of a very narrow picture
        grid = slice(num_base, tiles.num_patches)
        cell = round(size / max(tiles.rows, tiles.columns))
        seen = _seen_in_tiles(whole, tiles, cell)
        of_grid = {kind: mask[grid] for kind, mask in kinds.items()}
        title = (
            f"In {tiles.num_tiles - 1} tiles, sharp: {_num_kept(kinds, grid)} of {tiles.rows * tiles.columns} patches"
        )
        views = {title: _draw_patches(seen, of_grid, (tiles.rows, tiles.columns), (cell, cell)), **views}
    drawn = list(views.values())
    titles = _text_blocks(list(views), [max(view.width, size // 2) for view in drawn])
    if image.width >= image.height:
        return _stack([part for pair in zip(titles, drawn) for part in pair])
    return _side_by_side([_stack([title, view]) for title, view in zip(titles, drawn)], margin=size // 24, around=0)


def _num_kept(kinds: dict[str, np.ndarray], some: slice) -> int:
    return int((kinds["vision"] | kinds["text"])[some].sum())


def _seen_in_tiles(image: Image.Image, tiles: Any, cell: int) -> Image.Image:
    """What rows and columns of the joined tiles show: the picture, fitted into the tiles and centred.

    At an edge less than a patch may be black padding, or cut off.
    """
    height, width = (cell * count * tiles.grid_width for count in (tiles.tile_rows, tiles.tile_columns))
    scale = min(width / image.width, height / image.height)
    fitted = image.resize((_scaled(image.width, scale), _scaled(image.height, scale)), _SMOOTH)
    canvas = Image.new("RGB", (tiles.columns * cell, tiles.rows * cell))
    left, top = (width - fitted.width) // 2 - tiles.left * cell, (height - fitted.height) // 2 - tiles.top * cell
    canvas.paste(fitted, (left, top))
    return canvas


def _draw_patches(
    image: Image.Image, kinds: dict[str, np.ndarray], shape: tuple[int, int], cell: tuple[int, int]
) -> Image.Image:
    """The image under a grid of `shape` (rows, columns) patches, each `cell` (width, height) pixels large."""
    kinds = {kind: mask.reshape(shape) for kind, mask in kinds.items()}
    size = shape[1] * cell[0], shape[0] * cell[1]
    picture = np.asarray(image.resize(size, _SMOOTH), dtype=np.float32)
    gray = picture.mean(axis=2, keepdims=True)
    faded = 0.3 * (0.5 * gray + 0.5 * picture) + 0.7 * 255
    tinted = 0.82 * faded + 0.18 * np.array(MERGED_COLOR, dtype=np.float32)

    def pixels(mask: np.ndarray) -> np.ndarray:
        return mask.repeat(cell[1], 0).repeat(cell[0], 1)[:, :, None]

    shown = np.where(pixels(kinds["absorbed"] | kinds["centre"]), tinted, faded)
    shown = np.where(pixels(kinds["vision"] | kinds["text"]), picture, shown)
    canvas = Image.fromarray(shown.round().astype(np.uint8))
    _draw_marks(ImageDraw.Draw(canvas), kinds, cell)
    return canvas


def _draw_marks(draw: ImageDraw.ImageDraw, kinds: dict[str, np.ndarray], cell: tuple[int, int]) -> None:
    for kind in ("vision", "text", "centre"):
        for row, column in np.argwhere(kinds[kind]):
            _draw_mark(draw, kind, int(column) * cell[0], int(row) * cell[1], cell)


def _draw_mark(draw: ImageDraw.ImageDraw, kind: str, left: int, top: int, cell: tuple[int, int]) -> None:
    """Vision: a frame. Text: a frame with a filled corner. Centre of a merged token: a disc."""
    shorter = min(cell)
    line, right, bottom = max(shorter // 9, 1), left + cell[0] - 1, top + cell[1] - 1
    if kind == "centre":
        across, down = (side // 5 for side in cell)
        draw.ellipse((left + across, top + down, right - across, bottom - down), fill=MERGED_COLOR, outline=PAPER)
        return
    color = VISION_COLOR if kind == "vision" else TEXT_COLOR
    draw.rectangle((left, top, right, bottom), outline=color, width=line)
    if kind == "text":
        corner = shorter // 2
        draw.polygon([(left, top), (left + corner, top), (left, top + corner)], fill=color)


def _legend(recovery: Any, image_index: int, width: int) -> Image.Image:
    selection = recovery.selection
    num_visual, num_text, num_merged, num_tokens = (
        int(getattr(selection, f"num_{name}")[image_index]) for name in ("visual", "text", "merged", "tokens")
    )
    num_uncompressed = recovery.num_uncompressed[image_index]
    rows = [
        ("vision", f"{num_visual} kept by vision"),
        ("text", f"{num_text} recovered for the question"),
        ("centre", f"the rest merged into {num_merged}" if num_merged else "nothing merged"),
    ]
    total = f"{num_tokens} of {num_uncompressed} visual tokens ({100 * num_tokens / num_uncompressed:.0f} %)"
    text_size = max(round(width / 24), 11)
    font, swatch, line = _font(text_size), round(text_size * 1.1), round(text_size * 1.6)
    margin = line // 3
    canvas = Image.new("RGB", (width, line * 4 + 2 * margin), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin), total, fill=INK, font=_font(round(text_size * 1.1)))
    for number, (kind, text) in enumerate(rows, start=1):
        top = margin + number * line
        _draw_mark(draw, kind, margin, top, (swatch, swatch))
        draw.text((margin + round(swatch * 1.5), top - text_size // 10), text, fill=INK, font=font)
    return canvas


def _text_blocks(texts: list[str], widths: list[int]) -> list[Image.Image]:
    """Each text, broken into lines, at the bottom of a block; all blocks are as high as the longest text needs."""
    font = _font(max(round(min(widths) / 22), 11))
    line_height = round(font.size * 1.3)
    broken = []
    for text, width in zip(texts, widths):
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
    for lines, width in zip(broken, widths):
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


def _side_by_side(pictures: list[Image.Image], margin: int, around: int) -> Image.Image:
    """Pictures in a row, with so many pixels between them and around all."""
    width = sum(p.width for p in pictures) + margin * (len(pictures) - 1) + 2 * around
    canvas = Image.new("RGB", (width, max(p.height for p in pictures) + 2 * around), PAPER)
    left = around
    for picture in pictures:
        canvas.paste(picture, (left, around))
        left += picture.width + margin
    return canvas


def _scaled(length: int, scale: float) -> int:
    return max(round(length * scale), 1)
