"""Scenes: pictures of objects on colored plates, some with a word under them, over a textured background.

A scene is a small record made from a seed; `render.py` turns records into images and into what each patch shows.
Everything that a question can ask lies in a few patches: a plate is three or four patches wide, a word under it two
rows of patches high. A crowded scene fills far more patches than a tenth of the image, so no fixed choice of a tenth
serves every question.

A scene has a canvas: 336 pixels square in the world of LLaVA-1.5, anything else in the one of LLaVA-NeXT (tiles.py).

Splits differ by seed. Training, validation and test scenes never show the held-out pairs of object and color;
in the split "combination" about half of the objects are such pairs.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .vocabulary import CLASSES, COLORS, COLUMNS, ROWS, WORDS, held_out


IMAGE_SIZE = 336
MAXIMUM_OBJECTS = 20
LETTER_CELL_WIDTH, LETTER_CELL_HEIGHT = 14, 18
LABEL_PADDING = 2
SMALLEST_PLATE, LARGEST_PLATE, LARGEST_CROWDED_PLATE = 38, 62, 48
COARSE_GRID, FINE_GRID = 6, 42
SPLITS = ("train", "validation", "test", "combination")


@dataclass
class SceneObject:
    """One object: indices into the vocabulary, and its plate in pixels. `word` is -1 without a word under it."""

    class_index: int
    color: int
    word: int
    left: int
    top: int
    size: int
    round_plate: bool
    dark_label: bool

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.size / 2, self.top + self.size / 2

    @property
    def label_box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the label under the plate; all zero without one."""
        if self.word < 0:
            return 0, 0, 0, 0
        width = LETTER_CELL_WIDTH * len(WORDS[self.word]) + 2 * LABEL_PADDING
        return self.left + (self.size - width) // 2, self.top + self.size + 1, width, LETTER_CELL_HEIGHT + 2

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of plate and label together."""
        left, top, width, height = self.label_box
        if self.word < 0:
            return self.left, self.top, self.left + self.size, self.top + self.size
        return min(self.left, left), self.top, max(self.left + self.size, left + width), top + height


@dataclass
class Scene:
    """Objects and the parameters of the background (all that `render.render` needs).

    Attributes:
        height, width: of the canvas, in pixels.
        seams: columns and rows of the canvas at which a tile ends and the next begins; none in a picture of one view.
    """

    objects: list[SceneObject]
    coarse_background: np.ndarray = field(repr=False)  # [6, 6, 3] uint8
    fine_background: np.ndarray = field(repr=False)  # [42, 42] uint8
    stripes: tuple[float, float, float, float]  # frequency in x and y, phase, amplitude
    height: int = IMAGE_SIZE
    width: int = IMAGE_SIZE
    seams: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    def counts(self) -> dict[int, int]:
        result: dict[int, int] = {}
        for item in self.objects:
            result[item.class_index] = result.get(item.class_index, 0) + 1
        return result

    def named(self) -> list[SceneObject]:
        """The objects that can be named without doubt: the only ones of their class."""
        counts = self.counts()
        return [item for item in self.objects if counts[item.class_index] == 1]

    def coarse_place(self, item: SceneObject) -> tuple[int, int]:
        """Row and column of the object's center in a grid of three by three."""
        x, y = item.center
        return min(int(3 * y / self.height), len(ROWS) - 1), min(int(3 * x / self.width), len(COLUMNS) - 1)

    def is_cut(self, item: SceneObject) -> bool:
        """Whether a seam between two tiles runs through the object's plate or label."""
        left, top, right, bottom = item.box
        return any(left < seam < right for seam in self.seams[0]) or any(top < seam < bottom for seam in self.seams[1])


def scene_random(split: str, index: int, seed: int | str = 0) -> random.Random:
    """The random numbers of one example: the same for the same split, index and seed, on every machine."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {SPLITS}")
    return random.Random(f"{split}/{seed}/{index}")


def _color(class_index: int, split: str, rng: random.Random) -> int:
    wanted = split == "combination" and rng.random() < 0.5
    choices = [color for color in range(len(COLORS)) if held_out(class_index, color) == wanted]
    return rng.choice(choices)


def _classes(number: int, rng: random.Random) -> list[int]:
    """Object classes: mostly different ones, often some classes two to four times."""
    chosen: list[int] = []
    pool = rng.sample(range(len(CLASSES)), number)
    repeated = int(number >= 2 and rng.random() < 0.75) + int(number >= 8) + int(number >= 13 and rng.random() < 0.5)
    for _ in range(repeated):
        room = number - len(chosen)
        if room >= 2:
            chosen += [pool.pop()] * min(rng.randint(2, 4), room)
    return chosen + pool[: number - len(chosen)]


def fill_scene(
    split: str,
    rng: random.Random,
    number: int,
    plate_size: Callable[[], int],
    height: int = IMAGE_SIZE,
    width: int = IMAGE_SIZE,
    seams: tuple[tuple[float, ...], tuple[float, ...]] = ((), ()),
) -> Scene:
    """A scene with up to `number` objects that do not overlap, placed freely on the canvas while there is room."""
    objects: list[SceneObject] = []
    boxes: list[tuple[int, int, int, int]] = []
    words = rng.sample(range(len(WORDS)), number)
    for class_index, word in zip(_classes(number, rng), words, strict=True):
        item = SceneObject(
            class_index,
            _color(class_index, split, rng),
            word if rng.random() < 0.6 else -1,
            0,
            0,
            plate_size(),
            rng.random() < 0.5,
            rng.random() < 0.5,
        )
        _, _, label_width, label_height = item.label_box
        box_width = max(item.size, label_width) + 2
        box_height = item.size + (label_height + 1 if label_height else 0) + 2
        for _ in range(60):
            left, top = rng.randint(1, width - box_width), rng.randint(1, height - box_height)
            right, bottom = left + box_width, top + box_height
            if all(right <= x or x + w <= left or bottom <= y or y + h <= top for x, y, w, h in boxes):
                boxes.append((left, top, box_width, box_height))
                item.left, item.top = left + (box_width - item.size) // 2, top + 1
                objects.append(item)
                break
    rng.shuffle(objects)
    frequency, angle = rng.uniform(0.02, 0.25), rng.uniform(0, 2 * np.pi)
    amplitude = rng.choice((0.0, rng.uniform(5, 30)))
    level, spread = rng.randint(50, 200), rng.randint(5, 55)
    coarse = np.frombuffer(rng.randbytes(COARSE_GRID * COARSE_GRID * 3), np.uint8).reshape(COARSE_GRID, COARSE_GRID, 3)
    fine = np.frombuffer(rng.randbytes(FINE_GRID * FINE_GRID), np.uint8).reshape(FINE_GRID, FINE_GRID)
    fine_amplitude = rng.choice((0, rng.randint(5, 40)))
    return Scene(
        objects,
        (level + (coarse.astype(np.int32) - 128) * spread // 128).clip(0, 255).astype(np.uint8),
        (128 + (fine.astype(np.int32) - 128) * fine_amplitude // 128).astype(np.uint8),
        (frequency * np.cos(angle), frequency * np.sin(angle), rng.uniform(0, 6.28), amplitude),
        height,
        width,
        seams,
    )


def make_scene(split: str, rng: random.Random) -> Scene:
    """A scene with 1 to 20 objects in 336 pixels square; half of the scenes are crowded (11 or more)."""
    crowd = rng.random()
    number = (
        rng.randint(1, 4) if crowd < 0.2 else rng.randint(5, 10) if crowd < 0.5 else rng.randint(11, MAXIMUM_OBJECTS)
    )
    largest = LARGEST_PLATE if number < 11 else LARGEST_CROWDED_PLATE
    return fill_scene(split, rng, number, lambda: rng.randint(SMALLEST_PLATE, largest))


OBJECT_FIELDS = (
    "class_index", "color", "word", "left", "top", "size", "round_plate", "dark_label",
    "label_left", "label_top", "label_width", "label_height",
)  # fmt: skip


def scene_arrays(scenes: list[Scene], maximum: int = MAXIMUM_OBJECTS) -> dict[str, np.ndarray]:
    """Scenes as arrays for the renderer: objects [B, maximum, 12] int16 (class -1 for none) and backgrounds."""
    objects = np.zeros((len(scenes), maximum, len(OBJECT_FIELDS)), np.int16)
    objects[..., 0] = -1
    for scene, rows in zip(scenes, objects, strict=True):
        for item, row in zip(scene.objects, rows, strict=False):
            row[:] = (
                item.class_index, item.color, item.word, item.left, item.top, item.size, item.round_plate,
                item.dark_label, *item.label_box,
            )  # fmt: skip
    return {
        "objects": objects,
        "coarse_background": np.stack([scene.coarse_background for scene in scenes]),
        "fine_background": np.stack([scene.fine_background for scene in scenes]),
        "stripes": np.array([scene.stripes for scene in scenes], np.float32),
    }
