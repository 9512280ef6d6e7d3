"""Scenes: pictures of objects on colored plates, some with a word under them, over a textured background.

A scene is a small record made from a seed; `render.py` turns records into images and into what each patch shows.
Everything that a question can ask lies in a few patches: a plate is three or four patches wide, a word under it two
rows of patches high. A crowded scene fills far more patches than a tenth of the image, so no fixed choice of a tenth
serves every question.

Splits differ by seed. Training, validation and test scenes never show the held-out pairs of object and color;
in the split "combination" about half of the objects are such pairs.
"""

import random
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
    def coarse_place(self) -> tuple[int, int]:
        """Row and column of the object's center in a grid of three by three."""
        x, y = self.center
        return min(int(3 * y / IMAGE_SIZE), len(ROWS) - 1), min(int(3 * x / IMAGE_SIZE), len(COLUMNS) - 1)


@dataclass
class Scene:
    """Objects and the parameters of the background (all that `render.render` needs)."""

    objects: list[SceneObject]
    coarse_background: np.ndarray = field(repr=False)  # [6, 6, 3] uint8
    fine_background: np.ndarray = field(repr=False)  # [42, 42] uint8
    stripes: tuple[float, float, float, float]  # frequency in x and y, phase, amplitude

    def counts(self) -> dict[int, int]:
        result: dict[int, int] = {}
        for item in self.objects:
            result[item.class_index] = result.get(item.class_index, 0) + 1
        return result

    def named(self) -> list[SceneObject]:
        """The objects that can be named without doubt: the only ones of their class."""
        counts = self.counts()
        return [item for item in self.objects if counts[item.class_index] == 1]


def scene_random(split: str, index: int, seed: int = 0) -> random.Random:
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


def make_scene(split: str, rng: random.Random) -> Scene:
    """A scene with 1 to 20 objects that do not overlap, placed freely; half of the scenes are crowded (11 or more)."""
    crowd = rng.random()
    number = (
        rng.randint(1, 4) if crowd < 0.2 else rng.randint(5, 10) if crowd < 0.5 else rng.randint(11, MAXIMUM_OBJECTS)
    )
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
            rng.randint(SMALLEST_PLATE, LARGEST_PLATE if number < 11 else LARGEST_CROWDED_PLATE),
            rng.random() < 0.5,
            rng.random() < 0.5,
        )
        _, _, label_width, label_height = item.label_box
        width = max(item.size, label_width) + 2
        height = item.size + (label_height + 1 if label_height else 0) + 2
        for _ in range(60):
            left, top = rng.randint(1, IMAGE_SIZE - width), rng.randint(1, IMAGE_SIZE - height)
            if all(left + width <= x or x + w <= left or top + height <= y or y + h <= top for x, y, w, h in boxes):
                boxes.append((left, top, width, height))
                item.left, item.top = left + (width - item.size) // 2, top + 1
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
    )


OBJECT_FIELDS = (
    "class_index", "color", "word", "left", "top", "size", "round_plate", "dark_label",
    "label_left", "label_top", "label_width", "label_height",
)  # fmt: skip


def scene_arrays(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Scenes as arrays for the renderer: objects [B, 20, 12] int16 (class -1 where there is none) and backgrounds."""
    objects = np.zeros((len(scenes), MAXIMUM_OBJECTS, len(OBJECT_FIELDS)), np.int16)
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
