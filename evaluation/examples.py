"""Questions to ask: scenes of the embedded checkpoints' recipes, or any file of questions about pictures.

A file has one JSON object a line: `image` (a path, relative to the file), `question`, `answer`, `kind`, and optionally
`history`, a list of [question, answer] pairs that come before in the same conversation.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import training.examples
from recoverable_llava.tools.pictures import open_picture
from training.questions import KINDS, ask
from training.render import render, renderer_constants
from training.scenes import make_scene, scene_arrays, scene_random


SECOND_TURN = "second turn"
# Scenes with at least this many objects are reported as a row of their own.
CROWDED = 10


@dataclass(frozen=True)
class Example:
    """One question. `image` is the number of its picture in the list that comes with the examples."""

    image: int
    question: str
    answer: str
    kind: str
    history: tuple[tuple[str, str], ...] = ()
    num_objects: int | None = None  # how many objects the scene shows, where that is known
    wrong_question: str = ""  # a question of the same kind about another picture, for the control


class LazyPictures(Sequence):
    """Pictures that are drawn when they are asked for, by the process that asks."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: Any) -> Any:
        return self.examples[number].image()


def load_examples(data: str, split: str, num_images: int, seed: int = 0) -> tuple[Sequence[Image.Image], list[Example]]:
    """Pictures and questions.

    Args:
        data: "scenes", "tiled scenes" (of many sizes, one question about each), or the path of a file of questions
            (split and seed do not apply).
    """
    images: Sequence[Image.Image]
    if data == "scenes":
        images, examples = _scenes(split, num_images, seed)
    elif data == "tiled scenes":
        images, examples = _tiled_scenes(split, num_images, seed)
    else:
        images, examples = _file(Path(data), num_images)
    if not examples:
        raise ValueError(
            f"data={data!r} holds no question: pass 'scenes', 'tiled scenes' or a file with one JSON object a line."
        )
    return images, _with_wrong_questions(examples)


def _tiled_scenes(split: str, num_images: int, seed: int) -> tuple[LazyPictures, list[Example]]:
    drawn = list(training.examples.tiled_examples(split, num_images, seed=seed))
    examples = [
        Example(number, each.question, each.answer, each.kind, num_objects=len(each.scene.objects))
        for number, each in enumerate(drawn)
    ]
    return LazyPictures(drawn), examples


def _scenes(split: str, num_images: int, seed: int) -> tuple[list[Image.Image], list[Example]]:
    """One question of every kind that a scene allows, and a second turn about a different object."""
    scenes, examples = [], []
    for number in range(num_images):
        rng = scene_random(split, number, seed)
        scene = make_scene(split, rng)
        scenes.append(scene)
        turns = [turn for kind in KINDS if (turn := ask(scene, kind, rng)) is not None]
        for turn in turns:
            examples.append(Example(number, turn.question, turn.answer, turn.kind, num_objects=len(scene.objects)))
        pairs = [(a, b) for a in turns for b in turns if not set(a.classes) & set(b.classes)]
        if pairs:
            first, second = rng.choice(pairs)
            history = ((first.question, first.answer),)
            examples.append(
                Example(number, second.question, second.answer, SECOND_TURN, history, num_objects=len(scene.objects))
            )
    constants = renderer_constants()
    images: list[Image.Image] = []
    for start in range(0, len(scenes), 64):
        arrays = {name: torch.from_numpy(array) for name, array in scene_arrays(scenes[start : start + 64]).items()}
        pixels = (render(arrays, constants) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        images += [Image.fromarray(picture.numpy()) for picture in pixels]
    return images, examples


def _file(path: Path, num_images: int) -> tuple[list[Image.Image], list[Example]]:
    numbers: dict[str, int] = {}
    examples = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        missing = {"image", "question", "answer", "kind"} - set(row)
        if missing:
            raise ValueError(f"{path} has a line without {sorted(missing)}: {line[:120]}")
        if row["image"] not in numbers and len(numbers) == num_images:
            break
        number = numbers.setdefault(row["image"], len(numbers))
        history = tuple((question, answer) for question, answer in row.get("history", ()))
        examples.append(Example(number, row["question"], row["answer"], row["kind"], history))
    return [open_picture(path.parent / name) for name in numbers], examples


def _with_wrong_questions(examples: list[Example]) -> list[Example]:
    """Give each example a question of its own kind about another picture (its own where there is none)."""
    rng = random.Random(0)
    by_kind: dict[str, list[Example]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    result = []
    for example in examples:
        others = by_kind[example.kind]
        tries = (rng.choice(others) for _ in range(100))
        fitting = (o for o in tries if o.image != example.image and o.question != example.question)
        other = next(fitting, example)
        result.append(replace(example, wrong_question=other.question))
    return result


def is_correct(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one, whatever its case, spaces and closing full stop."""

    def plain(text: str) -> str:
        return " ".join(text.lower().strip().strip(".").split())

    return plain(answer) == plain(expected)
