"""Glyph atlas: the pictures of the objects and the letters, as one PNG that travels with the recipe.

The pictures are rendered from Noto Color Emoji (SIL Open Font License 1.1) and the letters from DejaVu Sans Bold
(Bitstream Vera license). `python -m training atlas` renders them again; everything else only reads the PNG, so that
neither the tests nor a user needs a font.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import LETTERS, PICTURES


PICTURE_SIZE = 64
LETTER_WIDTH, LETTER_HEIGHT = 28, 36
PICTURES_PER_ROW = 8
ATLAS_FILE = Path(__file__).parent / "assets" / "atlas.png"
EMOJI_FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
LETTER_FONT = "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf"
NOTO_BITMAP_SIZE = 109  # the only size of the font's bitmaps


def _picture(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("RGBA", (2 * NOTO_BITMAP_SIZE, 2 * NOTO_BITMAP_SIZE))
    ImageDraw.Draw(canvas).text((20, 20), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"the emoji font has no picture for {character!r}: install fonts-noto-color-emoji")
    cropped = canvas.crop(box)
    side = max(cropped.size)
    square = Image.new("RGBA", (side, side))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)


def _letter(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    canvas = Image.new("L", (LETTER_WIDTH, LETTER_HEIGHT))
    draw = ImageDraw.Draw(canvas)
    draw.text((LETTER_WIDTH / 2, LETTER_HEIGHT / 2), character, fill=255, font=font, anchor="mm")
    return canvas


def build_atlas(emoji_font: str = EMOJI_FONT, letter_font: str = LETTER_FONT, file: Path = ATLAS_FILE) -> None:
    """Renders the pictures in rows of eight, then the letters (in the alpha channel) in one row below them."""
    for font_file, package in ((emoji_font, "fonts-noto-color-emoji"), (letter_font, "fonts-dejavu-core")):
        if not Path(font_file).exists():
            raise ValueError(f"no font at {font_file!r}: install the Debian package {package} or name another file")
    emoji = ImageFont.truetype(emoji_font, NOTO_BITMAP_SIZE)
    letters = ImageFont.truetype(letter_font, 32)
    rows = -(-len(PICTURES) // PICTURES_PER_ROW)
    width = max(PICTURES_PER_ROW * PICTURE_SIZE, len(LETTERS) * LETTER_WIDTH)
    sheet = Image.new("RGBA", (width, rows * PICTURE_SIZE + LETTER_HEIGHT))
    for index, character in enumerate(PICTURES.values()):
        row, column = divmod(index, PICTURES_PER_ROW)
        sheet.paste(_picture(character, emoji), (column * PICTURE_SIZE, row * PICTURE_SIZE))
    for index, character in enumerate(LETTERS):
        tile = Image.new("RGBA", (LETTER_WIDTH, LETTER_HEIGHT))
        tile.putalpha(_letter(character, letters))
        sheet.paste(tile, (index * LETTER_WIDTH, rows * PICTURE_SIZE))
    file.parent.mkdir(exist_ok=True)
    sheet.save(file, optimize=True)


@lru_cache
def load_atlas(file: Path = ATLAS_FILE) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [classes, 64, 64, 4] with color premultiplied by alpha, and letter masks [26, 36, 28]; both in 0..1."""
    if not file.exists():
        raise ValueError(f"no glyph atlas at {str(file)!r}: run `python -m training atlas`")
    sheet = np.asarray(Image.open(file).convert("RGBA"), dtype=np.float32) / 255
    pictures = []
    for index in range(len(PICTURES)):
        row, column = divmod(index, PICTURES_PER_ROW)
        top, left = row * PICTURE_SIZE, column * PICTURE_SIZE
        pictures.append(sheet[top : top + PICTURE_SIZE, left : left + PICTURE_SIZE])
    picture_tensor = torch.from_numpy(np.stack(pictures))
    picture_tensor[..., :3] *= picture_tensor[..., 3:]
    top = -(-len(PICTURES) // PICTURES_PER_ROW) * PICTURE_SIZE
    letters = [
        sheet[top : top + LETTER_HEIGHT, index * LETTER_WIDTH : (index + 1) * LETTER_WIDTH, 3]
        for index in range(len(LETTERS))
    ]
    return picture_tensor, torch.from_numpy(np.stack(letters))
