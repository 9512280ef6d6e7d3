"""Short prompts and the way back, against lists of tokens that are dropped one by one."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recoverable_llava.prompt_shortening import (
    CompressedHistory,
    locate_placeholders,
    place_tokens,
    shorten_prompt,
    spread_over_original,
    surviving_positions,
    unshortened_prompt,
)


pytestmark = pytest.mark.algorithm

IMAGE, PADDING, PER_IMAGE = 900, 901, 5


@st.composite
def prompts(draw):
    """A padded batch: per row text and images in any order, and how many tokens each image keeps."""
    rows, num_tokens = [], []
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(st.sampled_from(["image", "text", "text"]), min_size=1, max_size=5))
        row = []
        for part in parts:
            if part == "image":
                row += [IMAGE] * PER_IMAGE
                num_tokens.append(draw(st.integers(1, PER_IMAGE)))
            else:
                row += [10 + draw(st.integers(0, 50)) for _ in range(draw(st.integers(1, 4)))]
        rows.append(row)
    length, on_left = max(map(len, rows)), draw(st.booleans())
    ids, mask = [], []
    for row in rows:
        padding = [PADDING] * (length - len(row))
        zeros, ones = [0] * len(padding), [1] * len(row)
        ids.append(padding + row if on_left else row + padding)
        mask.append(zeros + ones if on_left else ones + zeros)
    return SimpleNamespace(
        rows=rows,
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask) if draw(st.booleans()) or len(set(map(len, rows))) > 1 else None,
        num_tokens=torch.tensor(num_tokens, dtype=torch.long),
    )


def shortened(case, position_ids=None):
    placeholders = locate_placeholders(case.input_ids, IMAGE, PER_IMAGE, len(case.num_tokens))
    keep = surviving_positions(placeholders, case.num_tokens, case.attention_mask)
    length = int(keep.sum(1).max())
    short = shorten_prompt(case.input_ids, keep, length, PADDING, case.attention_mask, position_ids)
    return placeholders, short


def slow_row(case, row, first_image):
    """Ids of the short row, the image and offset of each of its placeholders, and its original positions."""
    ids, visual, source = [], [], []
    image, offset = first_image - 1, PER_IMAGE - 1
    mask = case.attention_mask
    for position, token in enumerate(case.input_ids[row].tolist()):
        if token == IMAGE:
            offset += 1
            if offset == PER_IMAGE:
                image, offset = image + 1, 0
        is_surplus = token == IMAGE and offset >= int(case.num_tokens[image])
        if not is_surplus and (mask is None or mask[row, position]):
            ids.append(token)
            visual.append((image, offset) if token == IMAGE else None)
            source.append(position)
    return ids, visual, source, image + 1


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompts())
def test_any_prompt_equals_the_slow_version(case):
    before = case.input_ids.clone(), None if case.attention_mask is None else case.attention_mask.clone()
    placeholders, short = shortened(case)
    assert torch.equal(case.input_ids, before[0])
    assert case.attention_mask is None or torch.equal(case.attention_mask, before[1])

    num_images, length = len(case.num_tokens), short.input_ids.shape[1]
    most_tokens = int(case.num_tokens.max()) if num_images else 1
    # The value of a visual token says which it is.
    tokens = torch.arange(1, num_images * most_tokens + 1).float().view(num_images, most_tokens, 1).expand(-1, -1, 3)
    placed = place_tokens(tokens, placeholders, short) if num_images else None
    outputs = torch.arange(case.input_ids.shape[0] * length).float().view(-1, length, 1)
    spread = spread_over_original(outputs, short)
    first_image = 0
    for row in range(len(case.rows)):
        ids, visual, source, next_image = slow_row(case, row, first_image)
        assert placeholders.row_of_image[first_image:next_image].tolist() == [row] * (next_image - first_image)
        first_image = next_image
        num_padding = length - len(ids)
        assert short.input_ids[row].tolist() == [PADDING] * num_padding + ids
        assert short.attention_mask[row].tolist() == [0] * num_padding + [1] * len(ids)
        assert short.position_ids[row].tolist() == [0] * num_padding + list(range(len(ids)))
        assert short.source[row, num_padding:].tolist() == source
        if placed is not None:
            expected = [0.0] * num_padding
            expected += [0.0 if mark is None else float(mark[0] * most_tokens + mark[1] + 1) for mark in visual]
            assert placed[row, :, 0].tolist() == expected
        for position in range(source[0], case.input_ids.shape[1]):
            last_kept = max(index for index, original in enumerate(source) if original <= position)
            assert spread[row, position, 0] == outputs[row, num_padding + last_kept, 0]


def test_surplus_placeholders_are_dropped():
    """The comparison above would hold for prompts that never lose a token, too."""
    case = SimpleNamespace(
        input_ids=torch.tensor([[1, *[IMAGE] * 5, 2, 3], [1, 2, *[IMAGE] * 5, 3]]),
        attention_mask=None,
        num_tokens=torch.tensor([2, 4]),
    )
    _, short = shortened(case)
    assert short.input_ids.tolist() == [[PADDING, PADDING, 1, IMAGE, IMAGE, 2, 3], [1, 2, *[IMAGE] * 4, 3]]
    assert short.spread[0].tolist() == [2, 3, 4, 4, 4, 4, 5, 6]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompts(), st.integers(0, 7))
def test_given_positions_close_up(case, first_position):
    """Positions that count on are those of the short prompt, from wherever they start."""
    mask = torch.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    _, counted = shortened(case)
    _, given_positions = shortened(case, positions)
    assert torch.equal(counted.position_ids, given_positions.position_ids)
    if first_position and case.attention_mask is None:
        _, shifted = shortened(case, positions + first_position)
        present = counted.attention_mask.bool()
        assert torch.equal(shifted.position_ids[present], counted.position_ids[present] + first_position)


def test_packed_positions_restart():
    ids = torch.tensor([[1, *[IMAGE] * 5, 2, 1, *[IMAGE] * 5, 2, 3]])
    positions = torch.tensor([[*range(7), *range(8)]])
    placeholders = locate_placeholders(ids, IMAGE, PER_IMAGE, 2)
    keep = surviving_positions(placeholders, torch.tensor([2, 3]), None)
    short = shorten_prompt(ids, keep, 10, PADDING, None, positions)
    assert short.input_ids.tolist() == [[1, IMAGE, IMAGE, 2, 1, IMAGE, IMAGE, IMAGE, 2, 3]]
    assert short.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]


def test_one_row_of_positions_serves_a_batch():
    ids = torch.tensor([[1, *[IMAGE] * 5, 2]] * 3)
    placeholders = locate_placeholders(ids, IMAGE, PER_IMAGE, 3)
    keep = surviving_positions(placeholders, torch.tensor([2, 2, 2]), None)
    short = shorten_prompt(ids, keep, 4, PADDING, None, torch.arange(7)[None])
    assert short.position_ids.tolist() == [[0, 1, 2, 3]] * 3


# ------------------------------------------------------------------------------------------------------------- history


def history_of(num_short, num_original):
    ids, short = torch.arange(num_original)[None], torch.arange(100, 100 + num_short)[None]
    return CompressedHistory(ids, torch.ones_like(ids), short, torch.ones_like(short), num_short)


def test_history_grows_in_both_numberings():
    history = history_of(4, 9)
    answer = torch.tensor([[7, 8]])
    longer = history.extended(answer, torch.ones_like(answer), unshortened_prompt(answer, None, None))
    assert longer.input_ids[0].tolist() == [*range(9), 7, 8]
    assert longer.short_input_ids[0].tolist() == [100, 101, 102, 103, 7, 8]
    assert longer.irreducible_length == 4
    image = torch.full((1, 5), IMAGE)
    keep = torch.tensor([[True, True, False, False, False]])
    later = longer.extended(image, torch.ones_like(image), shorten_prompt(image, keep, 2, IMAGE))
    assert later.input_ids.shape[1] == 16 and later.short_input_ids.shape[1] == 8
    assert later.irreducible_length == 8
    assert history.input_ids.shape[1] == 9  # not modified


def test_history_is_cropped_down_to_the_compressed_prompt():
    answer = torch.tensor([[7, 8, 9]])
    history = history_of(4, 9).extended(answer, torch.ones_like(answer), unshortened_prompt(answer, None, None))
    assert history.cropped(7) is history
    shorter = history.cropped(5)
    assert shorter.input_ids[0].tolist() == [*range(9), 7] and shorter.short_input_ids.shape[1] == 5
    assert shorter.attention_mask.shape == shorter.input_ids.shape
    assert history.cropped(4).input_ids[0].tolist() == list(range(9))


@pytest.mark.parametrize("cached_length", [3, 0, 8])
def test_history_of_another_length_is_refused(cached_length):
    answer = torch.tensor([[7, 8, 9]])
    history = history_of(4, 9).extended(answer, torch.ones_like(answer), unshortened_prompt(answer, None, None))
    with pytest.raises(ValueError, match=f"past_key_values holds {cached_length} tokens, but its compressed prompt 4"):
        history.cropped(cached_length)
