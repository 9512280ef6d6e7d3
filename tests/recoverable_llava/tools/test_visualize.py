"""The overlay: colours and marks say what the masks say."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from recoverable_llava.tools.visualize import (
    MERGED_COLOR,
    TEXT_COLOR,
    VISION_COLOR,
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
    marks = {"chosen_by_vision": VISION_COLOR, "chosen_by_text": TEXT_COLOR, "merge_centres": MERGED_COLOR}
    for name, color in marks.items():
        mask = getattr(selection, name)[index].reshape(drawn.shape[:2]).numpy()
        place = (middle, middle) if name == "merge_centres" else (-1, middle)
        assert ((drawn[:, :, place[0], place[1]] == color).all(-1) == mask).all(), name
        corner = (drawn[:, :, 4, 4] == TEXT_COLOR).all(-1)
        assert (corner == selection.chosen_by_text[index].reshape(drawn.shape[:2]).numpy()).all()


def test_kept_patches_show_the_image_and_others_are_faded(recovery, pictures):
    white = Image.new("RGB", (84, 84))  # black, in fact, so that fading shows
    drawn = cells(draw_recovery(white, recovery, size=240))
    inside = drawn[:, :, drawn.shape[2] * 3 // 4, drawn.shape[2] * 3 // 4].max(-1)
    selection = recovery.selection
    kept = (selection.chosen_by_vision | selection.chosen_by_text)[0].reshape(inside.shape).numpy()
    assert (inside[kept] == 0).all()
    centres = selection.merge_centres[0].reshape(inside.shape).numpy()
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
