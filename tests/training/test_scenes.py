"""Scenes, questions and their patches: deterministic, true to the picture, and without held-out pairs in training."""

import numpy as np
import pytest
import torch

from training.examples import scene_examples, scene_image
from training.language import WORD_END, WordEncoder, dense_words, language_tokenizer, question_tokenizer
from training.questions import KINDS, OPTIONS, long_caption, scene_facts
from training.render import GROUPS, IGNORED, patch_targets, renderer_constants
from training.scenes import IMAGE_SIZE, MAXIMUM_OBJECTS, make_scene, scene_arrays, scene_random
from training.vocabulary import CLASSES, COLORS, COLUMNS, ROWS, WORDS, held_out


def _scenes(split, number):
    return [make_scene(split, scene_random(split, index)) for index in range(number)]


def test_examples_repeat_and_differ_between_splits():
    first, again = (list(scene_examples("test", 14)) for _ in range(2))
    assert [(e.question, e.answer) for e in first] == [(e.question, e.answer) for e in again]
    assert np.array_equal(np.asarray(first[0].image()), np.asarray(again[0].image()))
    other = list(scene_examples("validation", 14))
    assert [e.question for e in first] != [e.question for e in other]
    assert [e.kind for e in first] == [*KINDS, *KINDS]
    with pytest.raises(ValueError, match="split='tests'"):
        next(scene_examples("tests", 1))
    with pytest.raises(ValueError, match="weather"):
        next(scene_examples("test", 1, kinds=("weather",)))


def test_objects_do_not_overlap_and_stay_inside():
    for scene in _scenes("train", 200):
        assert 1 <= len(scene.objects) <= MAXIMUM_OBJECTS
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for item in scene.objects:
            label_left, label_top, width, height = item.label_box
            for left, top, w, h in (
                (item.left, item.top, item.size, item.size),
                (label_left, label_top, width, height),
            ):
                assert left >= 0 and left + w <= IMAGE_SIZE and top >= 0 and top + h <= IMAGE_SIZE
                canvas[top : top + h, left : left + w] += 1
        assert canvas.max() == 1


def test_held_out_pairs_appear_only_in_their_split():
    pairs = {
        split: [held_out(o.class_index, o.color) for s in _scenes(split, 200) for o in s.objects]
        for split in ("train", "test", "combination")
    }
    assert not any(pairs["train"]) and not any(pairs["test"])
    assert 0.4 < np.mean(pairs["combination"]) < 0.6
    assert sum(held_out(c, k) for c in range(len(CLASSES)) for k in range(len(COLORS))) == len(CLASSES)


def test_answers_are_true_and_balanced():
    answers = {kind: [] for kind in KINDS}
    for example in scene_examples("test", 700):
        answers[example.kind].append(example.answer)
        counts = example.scene.counts()
        named = {CLASSES[item.class_index]: item for item in example.scene.objects}
        target = named.get(CLASSES[example.classes[0]])
        match example.kind:
            case "existence":
                assert example.answer == ("yes" if example.classes[0] in counts else "no")
            case "attribute":
                assert example.answer == list(COLORS)[target.color]
            case "reading":
                assert example.answer == WORDS[target.word]
            case "counting":
                assert example.answer == str(counts.get(example.classes[0], 0))
            case "location":
                row, column = example.scene.coarse_place(target)
                assert example.answer == f"{ROWS[row]} {COLUMNS[column]}"
            case "relation":
                other = named[CLASSES[example.classes[1]]]
                truth = {
                    "left of": target.center[0] < other.center[0], "right of": target.center[0] > other.center[0],
                    "above": target.center[1] < other.center[1], "below": target.center[1] > other.center[1],
                }  # fmt: skip
                (relation,) = [name for name in truth if name in example.question]
                assert example.answer == ("yes" if truth[relation] else "no")
            case "choice":
                assert example.answer in OPTIONS
    for kind in ("existence", "relation"):
        assert 0.35 < np.mean([answer == "yes" for answer in answers[kind]]) < 0.65


def test_patches_show_what_the_targets_say():
    scene = next(scene for scene in _scenes("train", 50) if any(item.word >= 0 for item in scene.objects))
    batch = {name: torch.from_numpy(value) for name, value in scene_arrays([scene]).items()}
    targets, owner = patch_targets(batch, renderer_constants(), 24)
    assert targets.shape == (1, 576, len(GROUPS)) and owner.shape == (1, 576)
    item = next(item for item in scene.objects if item.word >= 0)
    index = scene.objects.index(item)
    x, y = item.center
    middle = targets[0, int(y // 14) * 24 + int(x // 14)]
    assert middle[0] == item.class_index and middle[1] == item.color
    label = targets[0, owner[0] == index]
    assert item.word in label[:, 2]
    letters = {int(value) for value in label[:, 3] if value not in (IGNORED, 26)}
    assert letters <= {ord(letter) - ord("A") for letter in WORDS[item.word]} and letters
    background = np.asarray(scene_image(scene))[0, 0]
    assert background.shape == (3,)
    assert ((targets[0, :, 6] == 0).sum() == len(scene.objects)).item()


def test_mask_and_caption_of_an_example():
    for example in scene_examples("test", 20, kinds=("attribute",)):
        mask = example.patch_mask()
        assert mask.shape == (24, 24) and 4 <= mask.sum() <= 60
        assert example.caption_facts <= scene_facts(example.scene)


def test_tokenizers_keep_every_word_whole():
    language, question = language_tokenizer(), question_tokenizer()
    vocabulary = language.get_vocab()
    assert all(word in vocabulary for group in dense_words() for word in group)
    fast, clip = WordEncoder(language), WordEncoder(question)
    for example in scene_examples("train", 70):
        assert fast(example.question) == language.encode(example.question, add_special_tokens=False)
        assert clip(example.question) == question.encode(example.question, add_special_tokens=False)
        assert len(fast(example.answer)) == len(example.answer.split())
        assert language.decode(fast(example.answer)) == example.answer
    for name in (*CLASSES, *WORDS):
        assert name + WORD_END in vocabulary
        assert len(question(name)["input_ids"]) == 3
    assert question.eos_token_id == question.pad_token_id != question.bos_token_id
    assert len(question(long_caption(_scenes("train", 1)[0], scene_random("train", 0))[0])["input_ids"]) <= 77
