"""Larger pictures: what the model is trained on is what LLaVA-NeXT's own processor makes of them."""

import numpy as np
import pytest
import torch
from transformers import LlavaNextConfig, LlavaNextImageProcessor

from training.data import TiledBatchMaker
from training.examples import tiled_examples
from training.language import question_tokenizer
from training.questions import KINDS, long_caption
from training.render import GROUPS, IGNORED, patch_targets, render, renderer_constants
from training.scenes import IMAGE_SIZE, scene_arrays
from training.tiles import (
    MOST_OBJECTS,
    PICTURE_SIZES,
    PINPOINTS,
    SMALL_PLATES,
    make_tiled_scene,
    picture_views,
    tiled_random,
    tiling,
)


@pytest.fixture(scope="module")
def scenes():
    return [make_tiled_scene("train", tiled_random("train", index), size) for index, size in enumerate(PICTURE_SIZES)]


def _tensors(scene):
    return {name: torch.from_numpy(value) for name, value in scene_arrays([scene], MOST_OBJECTS).items()}


def test_examples_repeat_and_have_many_shapes():
    first, again = (list(tiled_examples("test", 21)) for _ in range(2))
    assert [(e.question, e.answer, e.picture_size) for e in first] == [
        (e.question, e.answer, e.picture_size) for e in again
    ]
    assert [e.kind for e in first] == [*KINDS] * 3
    assert [e.question for e in first] != [e.question for e in tiled_examples("validation", 21)]
    assert len({e.picture_size for e in first}) > 8
    height, width = first[0].picture_size
    assert first[0].image().size == (width, height)
    assert np.array_equal(np.asarray(first[0].image()), np.asarray(again[0].image()))


def test_every_resolution_is_used():
    assert {tiling(*size).resolution for size in PICTURE_SIZES} == {tuple(pinpoint) for pinpoint in PINPOINTS}
    assert all(336 <= side <= 1344 for size in PICTURE_SIZES for side in size)


def test_objects_do_not_overlap_and_stay_on_their_canvas(scenes):
    assert max(len(scene.objects) for scene in scenes) > 20
    for scene in scenes:
        canvas = np.zeros((scene.height, scene.width), int)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert left >= 0 and top >= 0 and right <= scene.width and bottom <= scene.height
            canvas[top:bottom, left:right] += 1
        assert canvas.max() == 1
    small = [item.size <= SMALL_PLATES[1] for scene in scenes for item in scene.objects]
    assert 0.6 < np.mean(small) < 1


def test_views_are_those_of_the_processor():
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    processor = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, do_normalize=False, **sizes)
    for example in tiled_examples("test", 8):
        seen = tiling(*example.picture_size)
        canvas = render(_tensors(example.scene), renderer_constants(), *seen.canvas)
        views = picture_views(canvas, seen)[0]
        expected = processor(example.image(), return_tensors="pt")["pixel_values"][0]
        assert views.shape == expected.shape == (seen.views, 3, IMAGE_SIZE, IMAGE_SIZE)
        # Pillow cuts off what overshoots between its two passes; nothing else differs.
        difference = 255 * (views - expected).abs()
        assert difference.max() < 16 and difference.mean() < 0.3


def test_windows_show_the_objects_where_they_are(scenes):
    """The middle of each object, in the base view and in the one tile that has it."""
    for scene, size in zip(scenes, PICTURE_SIZES, strict=True):
        seen = tiling(*size)
        windows = torch.tensor(seen.windows)
        targets, owner = patch_targets(
            _tensors(scene), renderer_constants(), 24, windows, height=scene.height, width=scene.width
        )
        assert targets.shape == (seen.views, 576, len(GROUPS))
        for index, item in enumerate(scene.objects):
            x, y = item.center
            for view, (left, top, width, height) in enumerate(seen.windows):
                column, row = int((x - left) // (width / 24)), int((y - top) // (height / 24))
                if not (0 <= column < 24 and 0 <= row < 24):
                    continue
                middle = targets[view, row * 24 + column]
                assert owner[view, row * 24 + column] == index
                assert middle[0] in (item.class_index, IGNORED) and middle[1] == item.color
                assert (targets[view, owner[view] == index, 6] == 0).sum() == 1
                assert tuple(middle[4:6].tolist()) == scene.coarse_place(item)


def test_words_are_read_where_they_are_legible(scenes):
    """At half of their size they are nothing, in a tile that cuts them they are not asked for."""
    size = (672, 672)
    scene = scenes[PICTURE_SIZES.index(size)]
    targets, owner = patch_targets(
        _tensors(scene), renderer_constants(), 24, torch.tensor(tiling(*size).windows), scene.height, scene.width
    )
    words = {index: item.word for index, item in enumerate(scene.objects) if item.word >= 0}
    assert words
    base, tiles = targets[0], targets[1:]
    assert set(base[:, 2].tolist()) <= {97, IGNORED} and set(base[:, 3].tolist()) <= {26, IGNORED}
    whole = {index for index in words if not scene.is_cut(scene.objects[index])}
    assert {words[index] for index in whole} <= set(tiles[..., 2].flatten().tolist())
    for index in set(words) - whole:
        assert set(tiles[..., 2][owner[1:] == index].tolist()) <= {words[index], 97, IGNORED}


def test_words_that_a_seam_cuts_are_not_asked_for():
    for example in tiled_examples("test", 60, kinds=("reading",)):
        (named,) = [item for item in example.scene.objects if item.class_index == example.classes[0]]
        assert not example.scene.is_cut(named)


def test_answers_are_true_on_every_canvas():
    for example in tiled_examples("test", 60, kinds=("location", "relation")):
        named = [next(o for o in example.scene.objects if o.class_index == index) for index in example.classes]
        x, y = named[0].center
        if example.kind == "location":
            row = ("top", "middle", "bottom")[int(3 * y / example.scene.height)]
            assert example.answer == f"{row} {('left', 'center', 'right')[int(3 * x / example.scene.width)]}"
        else:
            other_x, other_y = named[1].center
            side, distance = (
                (example.scene.width, x - other_x)
                if "left of" in example.question or "right of" in example.question
                else (example.scene.height, y - other_y)
            )
            assert abs(distance) >= side / 6
            smaller = "left of" in example.question or "above" in example.question
            assert example.answer == ("yes" if (distance < 0) == smaller else "no")


def test_batches_have_one_size_and_a_number_of_views():
    maker = TiledBatchMaker("train")
    sizes = set()
    for start in range(0, 400, 10):
        batch = maker(list(range(start, start + 10)))
        seen = tiling(*batch["picture_size"])
        sizes.add(seen.picture)
        assert len(batch["objects"]) == 10 // seen.views
        assert (batch["objects"][..., 3] + batch["objects"][..., 5] <= seen.canvas[1]).all()
    assert len(sizes) > 10


def test_captions_fit_the_question_tower(scenes):
    for index, scene in enumerate(scenes):
        caption, _ = long_caption(scene, tiled_random("train", index))
        assert len(question_tokenizer()(caption)["input_ids"]) <= 77


def test_resolutions_are_stocks_own():
    assert LlavaNextConfig().image_grid_pinpoints == PINPOINTS


def test_a_batch_is_its_scenes_alone():
    """Pictures and targets, also under autocast, in which they are drawn in training."""
    maker, constants = TiledBatchMaker("train"), renderer_constants()
    batch = maker(list(range(15)))
    seen = tiling(*batch["picture_size"])
    windows = torch.tensor(seen.windows)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = render(batch, constants, *seen.canvas)
        targets, _ = patch_targets(batch, constants, 24, windows, *seen.canvas)
    assert len(pictures) == 15 // seen.views > 1
    for row in range(len(pictures)):
        one = _tensors(maker.scene(row)[0])
        assert torch.equal(pictures[row], render(one, constants, *seen.canvas)[0])
        alone, _ = patch_targets(one, constants, 24, windows, *seen.canvas)
        assert torch.equal(targets[row * seen.views : (row + 1) * seen.views], alone)
