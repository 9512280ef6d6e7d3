"""Held-out questions about scenes, for evaluation: pictures, questions, answers and where the answer stands.

    for example in scene_examples("test", 100, kinds=("reading",)):
        print(example.question, example.answer)
        example.image()            # PIL picture, 336 x 336
        example.patch_mask()       # patches of the named objects, [24, 24]

`tiled_examples` gives the same for pictures of many sizes, as LLaVA-NeXT sees them in tiles. The same split, count,
kinds and seed always give the same examples. No font is needed.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from .questions import KINDS, Turn, ask, conversation, long_caption
from .render import patch_targets, render, renderer_constants
from .scenes import IMAGE_SIZE, Scene, make_scene, scene_arrays, scene_random
from .tiles import PICTURE_SIZES, make_tiled_scene, tiled_random


@dataclass
class SceneExample:
    """One question about one scene.

    Attributes:
        kind, question, answer: of the first turn.
        classes: indices into `vocabulary.CLASSES` of the objects that the question names.
        turns: the whole conversation; its first turn is the question.
        caption: a caption of several objects of the scene.
        caption_facts: what the caption says, as `questions.scene_facts` numbers it.
        picture_size: height and width of the picture, to which its scene is enlarged.
    """

    scene: Scene
    kind: str
    question: str
    answer: str
    classes: tuple[int, ...]
    turns: list[Turn]
    caption: str
    caption_facts: set[int]
    picture_size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)

    def image(self) -> Image.Image:
        """The picture of the scene."""
        height, width = self.picture_size
        return scene_image(self.scene).resize((width, height), Image.Resampling.BICUBIC)

    def patch_mask(self, patches: int = 24) -> np.ndarray:
        """True on the patches of the named objects that are in the scene, plate and label: [patches, patches]."""
        owner = self.owners(patches)
        named = [index for index, item in enumerate(self.scene.objects) if item.class_index in self.classes]
        return np.isin(owner, named)

    def owners(self, patches: int = 24) -> np.ndarray:
        """Index into `scene.objects` of the object that each patch shows, -1 for background: [patches, patches].

        The patches are those of the whole picture, squashed to a square if it is none.
        """
        height, width = self.scene.height, self.scene.width
        _, owner = patch_targets(_tensors(self.scene), _constants(), patches, height=height, width=width)
        grid = owner[0].reshape(patches, patches).numpy()
        return np.where(grid < len(self.scene.objects), grid, -1)


@lru_cache
def _constants() -> dict[str, torch.Tensor]:
    return renderer_constants()


def _tensors(scene: Scene) -> dict[str, torch.Tensor]:
    arrays = scene_arrays([scene], len(scene.objects))
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def scene_image(scene: Scene) -> Image.Image:
    """The picture of one scene, as large as its canvas, drawn on the CPU."""
    pixels = render(_tensors(scene), _constants(), scene.height, scene.width)[0].permute(1, 2, 0)
    return Image.fromarray((pixels * 255).round().to(torch.uint8).numpy())


def scene_examples(
    split: str, count: int, kinds: tuple[str, ...] | None = None, seed: int = 0, turns: int = 1
) -> Iterator[SceneExample]:
    """`count` examples, one scene each, the kinds in turn.

    Args:
        split: "train", "validation", "test" or "combination" (questions about held-out pairs of class and color).
        kinds: kinds of the first question, by default all of `questions.KINDS`.
        seed: another seed gives other scenes of the same split; 0 is what training and the reports use.
        turns: questions per scene at most, the first one included.
    """

    def make(index: int) -> tuple[Scene, random.Random, tuple[int, int]]:
        rng = scene_random(split, index, seed)
        return make_scene(split, rng), rng, (IMAGE_SIZE, IMAGE_SIZE)

    return _examples(make, split, count, kinds, turns)


def tiled_examples(
    split: str, count: int, kinds: tuple[str, ...] | None = None, seed: int = 0, turns: int = 1
) -> Iterator[SceneExample]:
    """As `scene_examples`, for pictures of the sizes in `tiles.PICTURE_SIZES`, drawn at random."""

    def make(index: int) -> tuple[Scene, random.Random, tuple[int, int]]:
        rng = tiled_random(split, index, seed)
        size = rng.choice(PICTURE_SIZES)
        return make_tiled_scene(split, rng, size), rng, size

    return _examples(make, split, count, kinds, turns)


def _examples(
    make: Callable[[int], tuple[Scene, random.Random, tuple[int, int]]],
    split: str,
    count: int,
    kinds: tuple[str, ...] | None,
    turns: int,
) -> Iterator[SceneExample]:
    kinds = KINDS if kinds is None else tuple(kinds)
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds={sorted(unknown)} are not kinds of question: choose from {KINDS}")
    produced, index = 0, 0
    while produced < count:
        kind = kinds[produced % len(kinds)]
        scene, rng, size = make(index)
        index += 1
        first = ask(scene, kind, rng, prefer_held_out=split == "combination")
        if first is None:
            continue
        later = (
            [turn for turn in conversation(scene, rng, turns) if turn.question != first.question] if turns > 1 else []
        )
        yield SceneExample(
            scene, kind, first.question, first.answer, first.classes, [first, *later[: turns - 1]],
            *long_caption(scene, rng), size,
        )  # fmt: skip
        produced += 1
