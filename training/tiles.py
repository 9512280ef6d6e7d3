"""The world of the embedded LLaVA-NeXT: larger pictures of many shapes, and the views that the model has of them.

LLaVA-NeXT sees a picture twice: squashed to 336 x 336 (the base view), and in tiles of 336 x 336 after it was fitted
into the best of a few resolutions. A scene is drawn on the canvas on which the tiles show it pixel for pixel, or at its
true size where that is smaller, and then resized to its true size. Most plates are 42 to 56 pixels wide there, so the
base view shows them at about half of that, and no word that could be read; a few are large.

A view is an image of 336 x 336 pixels, the base view first, then the tiles row by row.

Shapes: B pictures of one size, V views each, H x W the true size in pixels.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from .scenes import IMAGE_SIZE, Scene, fill_scene, scene_random


PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # height and width, LLaVA-NeXT's own
PICTURE_SIZES = (
    (336, 336), (360, 520), (520, 360), (480, 640), (640, 480), (500, 500),
    (336, 672), (672, 336), (400, 1000), (1000, 400), (600, 1300), (1300, 600),
    (672, 672), (1000, 1000), (1344, 1344), (800, 1200), (1200, 800), (768, 1024), (1344, 1008), (540, 960),
    (336, 1008), (1344, 450),
)  # fmt: skip
"""Height and width of the pictures of this world: every resolution, with and without padding, reduced and enlarged."""
MOST_OBJECTS = 40
PIXELS_PER_OBJECT = 9000  # of canvas, at the most crowded
SMALL_PLATES, LARGE_PLATES = (42, 56), (80, 130)


@dataclass(frozen=True)
class Tiling:
    """How LLaVA-NeXT sees pictures of one size; all sizes are height and width in pixels.

    Attributes:
        picture: true size.
        resolution: what the tiles cover together.
        fitted: the picture in it; black is around.
        canvas: on which its scene is drawn.
    """

    picture: tuple[int, int]
    resolution: tuple[int, int]
    fitted: tuple[int, int]
    canvas: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.resolution[0] // IMAGE_SIZE

    @property
    def columns(self) -> int:
        return self.resolution[1] // IMAGE_SIZE

    @property
    def views(self) -> int:
        return 1 + self.rows * self.columns

    @property
    def padding(self) -> tuple[int, int]:
        """Black above and left of the picture."""
        return (self.resolution[0] - self.fitted[0]) // 2, (self.resolution[1] - self.fitted[1]) // 2

    @property
    def windows(self) -> list[tuple[float, float, float, float]]:
        """Left, top, width and height of the part of the canvas that each view shows."""
        (height, width), (above, before) = self.canvas, self.padding
        down, across = height / self.fitted[0], width / self.fitted[1]
        tiles = [
            (
                (column * IMAGE_SIZE - before) * across,
                (row * IMAGE_SIZE - above) * down,
                IMAGE_SIZE * across,
                IMAGE_SIZE * down,
            )
            for row in range(self.rows)
            for column in range(self.columns)
        ]
        return [(0.0, 0.0, float(width), float(height)), *tiles]

    @property
    def seams(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Columns and rows of the canvas at which a tile ends and the next begins."""
        tiles = self.windows[1:]
        return tuple(sorted({x for x, *_ in tiles}))[1:], tuple(sorted({y for _, y, *_ in tiles}))[1:]


@lru_cache
def tiling(height: int, width: int) -> Tiling:
    """How pictures of `height` x `width` pixels are seen."""
    resolution = select_best_resolution((height, width), PINPOINTS)
    fitted = get_patch_output_size(np.broadcast_to(0, (3, height, width)), resolution, ChannelDimension.FIRST)
    return Tiling((height, width), resolution, fitted, min(fitted, (height, width)))


def tiled_random(split: str, index: int, seed: int = 0) -> random.Random:
    """The random numbers of one example of this world."""
    return scene_random(split, index, f"tiled/{seed}")


def make_tiled_scene(split: str, rng: random.Random, size: tuple[int, int]) -> Scene:
    """A scene of 1 to 40 objects, by the room on its canvas, for a picture of `size` (height and width)."""
    seen = tiling(*size)
    height, width = seen.canvas
    most = min(MOST_OBJECTS, height * width // PIXELS_PER_OBJECT)
    crowd = rng.random()
    number = (
        rng.randint(1, 4)
        if crowd < 0.2
        else rng.randint(5, most // 2)
        if crowd < 0.5
        else rng.randint(most // 2 + 1, most)
    )
    large = 0.3 if number <= most // 2 else 0.1

    def plate_size() -> int:
        return rng.randint(*(LARGE_PLATES if rng.random() < large else SMALL_PLATES))

    return fill_scene(split, rng, number, plate_size, height, width, seen.seams)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pillow's bicubic resize to height and width, with its rounding to 8 bits."""
    if images.shape[2:] == size:
        return images
    resized = functional.interpolate(images, size, mode="bicubic", antialias=True)
    return (resized.clamp(0, 1) * 255).round() / 255


def picture_views(canvases: Tensor, seen: Tiling) -> Tensor:
    """What LLaVA-NeXT's image processor makes of pictures, without its normalisation.

    Args:
        canvases: drawn scenes [B, 3, H, W] in 0..1, of the tiling's canvas size.

    Returns:
        Views [B, V, 3, 336, 336] in 0..1.
    """
    pictures = _resize(canvases, seen.picture)
    base = _resize(pictures, (IMAGE_SIZE, IMAGE_SIZE))
    (above, before), (down, across) = seen.padding, seen.fitted
    below, after = seen.resolution[0] - down - above, seen.resolution[1] - across - before
    padded = functional.pad(_resize(pictures, seen.fitted), (before, after, above, below))
    tiles = padded.unflatten(3, (seen.columns, IMAGE_SIZE)).unflatten(2, (seen.rows, IMAGE_SIZE))
    return torch.cat([base[:, None], tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)], 1)
