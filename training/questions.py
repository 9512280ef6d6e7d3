"""Questions, conversations and captions about a scene.

Seven kinds: existence (yes and no in equal parts), attribute (color of a named object's plate), reading (the word
under a named object), counting, location, relation (yes and no in equal parts) and choice (answer with a letter).
Every answer is one or two words.
"""

import random
from dataclasses import dataclass

from .scenes import Scene, SceneObject
from .vocabulary import ARTICLE, CLASSES, COLORS, COLUMNS, ROWS, WORDS, held_out


KINDS = ("existence", "attribute", "reading", "counting", "location", "relation", "choice")
COLOR_NAMES = tuple(COLORS)
OPTIONS = ("A", "B", "C", "D")
BORDER = 1 / 48  # of the side: an object whose center lies nearer to a third of it is not asked for its place
APART = 1 / 6  # of the side, between two objects whose places are compared

_TEMPLATES = {
    "existence": (
        "Is there {a} {name} in the picture?",
        "Do you see {a} {name} here?",
        "Does this picture show {a} {name}?",
    ),
    "attribute": (
        "What color is the plate of the {name}?",
        "On which color of plate is the {name}?",
        "Tell me the color of the plate behind the {name}.",
    ),
    "reading": (
        "What word is under the {name}?",
        "Which word is written below the {name}?",
        "Read the word under the {name}.",
    ),
    "counting": (
        "How many pictures of {a} {name} are there?",
        "Count the objects that are {a} {name}.",
        "How often is {a} {name} shown?",
    ),
    "location": (
        "Where is the {name}?",
        "In which part of the picture is the {name}?",
        "Where can I find the {name} in this picture?",
    ),
    "relation": (
        "Is the {name} {relation} the {other}?",
        "Tell me yes or no: the {name} is {relation} the {other}.",
    ),
}
_CHOICE_OBJECT = ("Which of these is in the picture?", "Which one of these objects do you see?")
_CHOICE_COLOR = ("What color is the plate of the {name}?", "Which color has the plate of the {name}?")
_OPTION_TEXT = " A. {} B. {} C. {} D. {} Answer with the letter."


@dataclass
class Turn:
    """One question and its answer, and the classes of the objects that it names."""

    kind: str
    question: str
    answer: str
    classes: tuple[int, ...]


def _fill(kind: str, class_index: int, rng: random.Random, **more: str) -> str:
    name = CLASSES[class_index]
    return rng.choice(_TEMPLATES[kind]).format(name=name, a=ARTICLE[name], **more)


def _pick(candidates: list[SceneObject], rng: random.Random, prefer_held_out: bool) -> SceneObject | None:
    if prefer_held_out:
        candidates = [item for item in candidates if held_out(item.class_index, item.color)]
    return rng.choice(candidates) if candidates else None


def _absent(scene: Scene, number: int, rng: random.Random) -> list[int]:
    present = set(scene.counts())
    return rng.sample([index for index in range(len(CLASSES)) if index not in present], number)


def _existence(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    if rng.random() < 0.5:
        item = _pick(scene.objects, rng, prefer)
        if item is None:
            return None
        return Turn("existence", _fill("existence", item.class_index, rng), "yes", (item.class_index,))
    class_index = _absent(scene, 1, rng)[0]
    return Turn("existence", _fill("existence", class_index, rng), "no", (class_index,))


def _attribute(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    item = _pick(scene.named(), rng, prefer)
    if item is None:
        return None
    question = _fill("attribute", item.class_index, rng)
    return Turn("attribute", question, COLOR_NAMES[item.color], (item.class_index,))


def _reading(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    item = _pick([item for item in scene.named() if item.word >= 0 and not scene.is_cut(item)], rng, prefer)
    if item is None:
        return None
    return Turn("reading", _fill("reading", item.class_index, rng), WORDS[item.word], (item.class_index,))


def _counting(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    counts = scene.counts()
    if rng.random() < 0.06 and not prefer:
        class_index = _absent(scene, 1, rng)[0]
    else:
        if prefer:
            shown = {item.class_index for item in scene.objects if held_out(item.class_index, item.color)}
            counts = {index: count for index, count in counts.items() if index in shown}
        if not counts:
            return None
        wanted = rng.choice(sorted(set(counts.values())))
        class_index = rng.choice([index for index, count in counts.items() if count == wanted])
    return Turn("counting", _fill("counting", class_index, rng), str(counts.get(class_index, 0)), (class_index,))


def _location(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    def clear(value: float, side: int) -> bool:
        return min(abs(value - side / 3), abs(value - 2 * (side / 3))) >= BORDER * side

    clearly = [
        item for item in scene.named() if clear(item.center[0], scene.width) and clear(item.center[1], scene.height)
    ]
    item = _pick(clearly, rng, prefer)
    if item is None:
        return None
    row, column = scene.coarse_place(item)
    return Turn(
        "location", _fill("location", item.class_index, rng), f"{ROWS[row]} {COLUMNS[column]}", (item.class_index,)
    )


def _relation(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    item = _pick(scene.named(), rng, prefer)
    if item is None:
        return None
    relation, axis, sign = rng.choice((("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1)))
    apart = APART * (scene.width, scene.height)[axis]
    answer = rng.random() < 0.5
    fitting = []
    for other in scene.named():
        distance = sign * (item.center[axis] - other.center[axis])
        if other is not item and abs(distance) >= apart and (distance > 0) == answer:
            fitting.append(other)
    if not fitting:
        return None
    other = rng.choice(fitting)
    question = _fill("relation", item.class_index, rng, relation=relation, other=CLASSES[other.class_index])
    return Turn("relation", question, "yes" if answer else "no", (item.class_index, other.class_index))


def _choice(scene: Scene, rng: random.Random, prefer: bool) -> Turn | None:
    right = rng.randrange(len(OPTIONS))
    if rng.random() < 0.5:
        item = _pick(scene.objects, rng, prefer)
        if item is None:
            return None
        options = [CLASSES[index] for index in _absent(scene, len(OPTIONS), rng)]
        options[right] = CLASSES[item.class_index]
        question = rng.choice(_CHOICE_OBJECT)
        named = tuple(CLASSES.index(option) for option in options)
    else:
        item = _pick(scene.named(), rng, prefer)
        if item is None:
            return None
        others = [color for index, color in enumerate(COLOR_NAMES) if index != item.color]
        options = rng.sample(others, len(OPTIONS))
        options[right] = COLOR_NAMES[item.color]
        question = rng.choice(_CHOICE_COLOR).format(name=CLASSES[item.class_index])
        named = (item.class_index,)
    return Turn("choice", question + _OPTION_TEXT.format(*options), OPTIONS[right], named)


_ASK = dict(zip(KINDS, (_existence, _attribute, _reading, _counting, _location, _relation, _choice), strict=True))


def ask(scene: Scene, kind: str, rng: random.Random, prefer_held_out: bool = False) -> Turn | None:
    """A question of one kind, or None where the scene allows none (no word, no class shown that often, ...).

    Args:
        prefer_held_out: ask about an object in a held-out pair of class and color only.
    """
    if kind not in _ASK:
        raise ValueError(f"kind={kind!r} is not one of {KINDS}")
    return _ASK[kind](scene, rng, prefer_held_out)


def conversation(scene: Scene, rng: random.Random, turns: int) -> list[Turn]:
    """Up to `turns` different questions about one scene, kinds in equal parts, in random order."""
    result: list[Turn] = []
    asked: set[str] = set()
    for _ in range(3 * turns):
        turn = ask(scene, rng.choice(KINDS), rng)
        if turn is not None and turn.question not in asked:
            asked.add(turn.question)
            result.append(turn)
            if len(result) == turns:
                break
    return result


PAIR_FACTS = len(CLASSES)
WORD_FACTS = PAIR_FACTS + len(CLASSES) * len(COLORS)
FACTS = WORD_FACTS + len(WORDS)
"""A fact is a class, a class on a color, or a word; a caption fits every image that has all of its facts."""


def scene_facts(scene: Scene) -> set[int]:
    """The facts that hold in a scene."""
    facts = set()
    for item in scene.objects:
        facts.add(item.class_index)
        facts.add(PAIR_FACTS + item.class_index * len(COLORS) + item.color)
        if item.word >= 0:
            facts.add(WORD_FACTS + item.word)
    return facts


def _describe(item: SceneObject, rng: random.Random, color: bool, word: bool) -> tuple[str, set[int]]:
    name = CLASSES[item.class_index]
    text, facts = f"{ARTICLE[name]} {name}", {item.class_index}
    if color:
        text += " on an" if COLOR_NAMES[item.color] == "orange" else " on a"
        text += f" {COLOR_NAMES[item.color]} plate"
        facts.add(PAIR_FACTS + item.class_index * len(COLORS) + item.color)
    if word and item.word >= 0:
        text += f" with the word {WORDS[item.word]}"
        facts.add(WORD_FACTS + item.word)
    return text, facts


def long_caption(scene: Scene, rng: random.Random) -> tuple[str, set[int]]:
    """A caption of up to six objects with their colors, some with their word, and its facts."""
    items = rng.sample(scene.objects, min(len(scene.objects), rng.randint(3, 6)))
    described = [_describe(item, rng, rng.random() < 0.8, rng.random() < 0.3) for item in items]
    return "a picture of " + ", ".join(text for text, _ in described), set().union(*(facts for _, facts in described))


def short_caption(scene: Scene, rng: random.Random) -> tuple[str, set[int]]:
    """A caption of one or two objects ("a photo of a fox"), and its facts."""
    items = rng.sample(scene.objects, min(len(scene.objects), rng.choice((1, 1, 2))))
    described = [_describe(item, rng, rng.random() < 0.3, rng.random() < 0.15) for item in items]
    start = rng.choice(("a photo of ", "a picture of ", "", "there is "))
    return start + " and ".join(text for text, _ in described), set().union(*(facts for _, facts in described))
