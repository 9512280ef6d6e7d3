"""The overlay: colours and marks say what the masks say."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from recoverable_llava.tools.visualize import (
    MERGED_COLOR,
    TEXT_COLOR,
    VISION_COLOR,
    _seen_in_tiles,
    draw_questions,
    draw_recovery,
    seen_square,
)


@pytest.fixture
def recovery(model, processor, pictures):
    model.config.use_preset("paper")  # which also has centres of merged tokens
    prompts = ["USER: <image>\nwhat is the cat? ASSISTANT:"] * 2
    inputs = processor(images=pictures[:2], text=prompts, questions=["cat", "blue"], return_tensors="pt")
    return model.recover_tokens(**inputs)


def cells(drawn: Image.Image) -> np.ndarray:
    """[grid, grid, cell, cell, 3] pixels of each patch."""
    grid = round(tiny.NUM_PATCHES**0.5)
    pixels = np.asarray(drawn)
    cell = pixels.shape[1] // grid
    return pixels[: grid * cell].reshape(grid, cell, grid, cell, 3).swapaxes(1, 2)


@pytest.mark.parametrize("index", [0, 1])
def test_every_patch_has_the_mark_of_its_kind(recovery, pictures, index):
    drawn = cells(draw_recovery(pictures[index], recovery, index, size=240))
    selection = recovery.selection
    assert selection.num_text.sum() > 0
    middle = drawn.shape[2] // 2
    marks = {"chosen_by_vision": VISION_COLOR, "chosen_by_text": TEXT_COLOR, "centres": MERGED_COLOR}
    for name, color in marks.items():
        mask = getattr(selection, name)[index].reshape(drawn.shape[:2]).numpy()
        place = (middle, middle) if name == "centres" else (-1, middle)
        assert ((drawn[:, :, place[0], place[1]] == color).all(-1) == mask).all(), name
        corner = (drawn[:, :, 4, 4] == TEXT_COLOR).all(-1)
        assert (corner == selection.chosen_by_text[index].reshape(drawn.shape[:2]).numpy()).all()


def test_a_selection_without_centres_marks_none(model, processor, pictures):
    inputs = processor(images=pictures[0], text="USER: <image>\nwhat is the cat? ASSISTANT:", return_tensors="pt")
    recovery = model.recover_tokens(**inputs)
    selection = recovery.selection
    assert selection.centres is None and selection.num_merged[0] == 1
    black = Image.new("RGB", (84, 84))
    drawn = cells(draw_recovery(black, recovery, size=240))
    assert not (drawn == MERGED_COLOR).all(-1).any()
    edge = drawn[:, :, -1, drawn.shape[2] // 2]
    for name, color in {"chosen_by_vision": VISION_COLOR, "chosen_by_text": TEXT_COLOR}.items():
        mask = getattr(selection, name)[0].reshape(drawn.shape[:2]).numpy()
        assert mask.any() and ((edge == color).all(-1) == mask).all(), name
    left = ~selection.chosen[0].reshape(drawn.shape[:2]).numpy()
    faded = drawn[left]
    assert (faded == faded[:1, :1, :1]).all() and (faded > 100).all()


def test_kept_patches_show_the_image_and_others_are_faded(recovery, pictures):
    white = Image.new("RGB", (84, 84))  # black, in fact, so that fading shows
    drawn = cells(draw_recovery(white, recovery, size=240))
    inside = drawn[:, :, drawn.shape[2] * 3 // 4, drawn.shape[2] * 3 // 4].max(-1)
    selection = recovery.selection
    kept = (selection.chosen_by_vision | selection.chosen_by_text)[0].reshape(inside.shape).numpy()
    assert (inside[kept] == 0).all()
    centres = selection.centres[0].reshape(inside.shape).numpy()
    assert (inside[~kept & ~centres] > 100).all()


def test_legend_is_optional_and_below(recovery, pictures):
    without = draw_recovery(pictures[0], recovery, size=240, legend=False)
    with_legend = draw_recovery(pictures[0], recovery, size=240)
    assert without.size == (240, 240)
    assert with_legend.height > 240
    assert np.array_equal(np.asarray(with_legend)[:240], np.asarray(without))


def test_centre_square_is_what_the_processor_crops(processor, pictures):
    """The image processor's own result, up to its resampling."""
    gradient = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (84, 1, 3)))
    pixels = processor.image_processor(gradient, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values
    ours = torch.from_numpy(np.asarray(seen_square(gradient)).copy()).permute(2, 0, 1)
    assert (pixels[0] - ours).abs().max() <= 1


def test_questions_side_by_side_with_a_long_one(recovery, pictures):
    long = "what is the colour of the cat that sits to the left of the dog in front of the house? " * 2
    drawn = draw_questions(pictures[0], {"cat?": recovery, long: recovery}, size=120, answers={"cat?": "yes"})
    assert drawn.width > 3 * 120
    assert drawn.height > 120


def test_inputs_stay_untouched(recovery, pictures):
    before = pictures[0].tobytes(), recovery.selection.chosen_by_vision.clone()
    draw_recovery(pictures[0], recovery)
    assert pictures[0].tobytes() == before[0]
    assert torch.equal(recovery.selection.chosen_by_vision, before[1])


def test_errors_name_the_argument(recovery, pictures):
    with pytest.raises(ValueError, match="image_index must be from 0 to 1.*got 2"):
        draw_recovery(pictures[0], recovery, 2)
    with pytest.raises(ValueError, match="size must be at least one pixel per patch .6., got 5"):
        draw_recovery(pictures[0], recovery, size=5)


@pytest.fixture(params=[(120, 100), (90, 150), (200, 60)], ids=["landscape", "portrait", "wide"])
def tiled(request, model_and_processor):
    """A picture that LLaVA-NeXT cuts into tiles, and a recovery with patches of every kind in all of them."""
    model, processor = model_and_processor
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 255, (*request.param[::-1], 3), dtype=np.uint8))
    inputs = processor(images=picture, text="USER: <image>\nwhat is the cat? ASSISTANT:", return_tensors="pt")
    recovery = model.recover_tokens(**inputs)
    kind = torch.from_numpy(generator.integers(0, 5, recovery.visual_scores.shape))
    names = ("chosen_by_vision", "chosen_by_text", "centres")
    masks = {name: kind == number for number, name in enumerate(names)}
    return picture, replace(recovery, selection=replace(recovery.selection, **masks))


def views_of(drawn, picture, tiles, size):
    """Pixels [rows, columns, cell, cell, 3] of what the tiles show, and those of the base tile."""
    pixels, side, scale = np.asarray(drawn), tiles.grid_width, size / max(picture.size)
    cell = round(size / max(tiles.rows, tiles.columns))
    shapes = [(tiles.rows, tiles.columns, cell, cell)]
    shapes.append((side, side, round(picture.height * scale / side), round(picture.width * scale / side)))
    heights, widths = ([shape[axis] * shape[axis + 2] for shape in shapes] for axis in (0, 1))
    if picture.width >= picture.height:
        title = (drawn.height - sum(heights)) // 2
        corners = [(title, 0), (drawn.height - heights[1], 0)]
    else:
        title = drawn.height - max(heights)
        corners = [(title, 0), (title, drawn.width - max(widths[1], size // 2))]
    views = []
    for (top, left), height, width, shape in zip(corners, heights, widths, shapes):
        part = pixels[top : top + height, left : left + width]
        views.append(part.reshape(shape[0], shape[2], shape[1], shape[3], 3).swapaxes(1, 2))
    return views


next_alone = pytest.mark.parametrize("family", ["llava_next"], indirect=True)


@next_alone
def test_every_patch_of_tiles_and_base_has_the_mark_of_its_kind(tiled):
    picture, recovery = tiled
    (tiles,), selection = recovery.tiles, recovery.selection
    grid, base = views_of(draw_recovery(picture, recovery, size=720, legend=False), picture, tiles, 720)
    marks = {"chosen_by_vision": VISION_COLOR, "chosen_by_text": TEXT_COLOR, "centres": MERGED_COLOR}
    for name, color in marks.items():
        mask = getattr(selection, name)[0].numpy()
        for drawn, of_view in ((base, mask[: base.shape[0] ** 2]), (grid, mask[base.shape[0] ** 2 :])):
            middle = drawn.shape[2] // 2, drawn.shape[3] // 2
            place = middle if name == "centres" else (-1, middle[1])
            assert of_view.any(), name
            assert ((drawn[:, :, place[0], place[1]] == color).all(-1) == of_view.reshape(drawn.shape[:2])).all(), name


@next_alone
def test_tiles_are_drawn_as_the_model_sees_them(tiled, processor):
    """The image processor's own tiles, joined and without the padding that the model leaves out, up to resampling."""
    picture, recovery = tiled
    smooth = picture.resize((8, 8)).resize(picture.size, Image.Resampling.BICUBIC)
    (tiles,) = recovery.tiles
    pixels = processor.image_processor(smooth, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values
    rows = pixels[0, 1 : tiles.num_tiles].unflatten(0, (tiles.tile_rows, tiles.tile_columns))
    joined = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    seen = joined[:, 14 * tiles.top :, 14 * tiles.left :][:, : 14 * tiles.rows, : 14 * tiles.columns]
    ours = torch.from_numpy(np.asarray(_seen_in_tiles(smooth, tiles, 14)).copy()).permute(2, 0, 1)
    assert ours.shape == seen.shape
    assert (seen.int() - ours).abs().max() <= 3


@next_alone
def test_numbers_of_a_tiled_picture(tiled, monkeypatch):
    """New lines count among the tokens that an image has without compression."""
    picture, recovery = tiled
    written = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: written.append(a[2]) or text(*a, **k))
    draw_recovery(picture, recovery)
    (tiles,), selection = recovery.tiles, recovery.selection
    in_base, in_tiles = (int(part.sum()) for part in (selection.chosen[0, :36], selection.chosen[0, 36:]))
    total = 36 + tiles.rows * (tiles.columns + 1)
    words = " ".join(written)
    assert f"{int(selection.num_tokens)} of {total} visual tokens" in words
    assert f"{in_base} of 36 patches" in words and f"{in_tiles} of {tiles.rows * tiles.columns} patches" in words


@next_alone
def test_a_picture_of_which_tiles_show_nothing(model, processor):
    inputs = processor(images=Image.new("RGB", (2100, 9)), text="USER: <image>\nwhat? ASSISTANT:", return_tensors="pt")
    recovery = model.recover_tokens(**inputs)
    assert recovery.tiles[0].num_patches == 36
    drawn = draw_recovery(Image.new("RGB", (2100, 9)), recovery)
    assert drawn.width >= 600


@next_alone
def test_questions_side_by_side_about_a_tiled_picture(tiled):
    picture, recovery = tiled
    drawn = draw_questions(picture, {"cat?": recovery, "dog?": recovery}, size=240)
    assert drawn.width > 3 * min(picture.size) / max(picture.size) * 240
    with pytest.raises(ValueError, match="size must be at least one pixel per patch .*, got 5"):
        draw_recovery(picture, recovery, size=5)
