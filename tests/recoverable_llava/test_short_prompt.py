"""Short prompts and the way back, against lists of tokens that are dropped one by one."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoverable_llava.short_prompt import (
    ShortPrompt,
    attentions_of_original,
    locate_placeholders,
    place_tokens,
    shorten_prompt,
    surviving_positions,
)


pytestmark = pytest.mark.algorithm


IMAGE, PADDING, PER_IMAGE = 900, 901, 5


@st.composite
def prompts(draw):
    """A padded batch: per row text and images in any order, how many placeholders each has and how many it keeps."""
    rows, per_image, num_tokens = [], [], []
    are_alike = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        parts = draw(st.lists(st.sampled_from(["image", "text", "text"]), min_size=1, max_size=5))
        row = []
        for part in parts:
            if part == "image":
                per_image.append(PER_IMAGE if are_alike else draw(st.integers(1, 8)))
                row += [IMAGE] * per_image[-1]
                num_tokens.append(draw(st.integers(1, per_image[-1])))
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
        per_image=torch.tensor(per_image, dtype=torch.long),
        num_tokens=torch.tensor(num_tokens, dtype=torch.long),
    )


def alike(num_images):
    return torch.full((num_images,), PER_IMAGE)


def shortened(case, position_ids=None):
    placeholders = locate_placeholders(case.input_ids, IMAGE, case.per_image)
    keep = surviving_positions(placeholders, case.num_tokens, case.attention_mask)
    length = int(keep.sum(1).max())
    short = shorten_prompt(case.input_ids, keep, length, PADDING, case.attention_mask, position_ids)
    return placeholders, short


def slow_row(case, row, first_image):
    """Ids of the short row, the image and offset of each of its placeholders, and its original positions."""
    ids, visual, source = [], [], []
    image, offset = first_image - 1, None
    mask = case.attention_mask
    for position, token in enumerate(case.input_ids[row].tolist()):
        if token == IMAGE:
            is_next = offset is None or offset + 1 == int(case.per_image[image])
            image, offset = (image + 1, 0) if is_next else (image, offset + 1)
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

    assert short.may_have_moved
    num_images, length = len(case.num_tokens), short.input_ids.shape[1]
    most_tokens = int(case.num_tokens.max()) if num_images else 1
    # The value of a visual token says which it is.
    tokens = torch.arange(1, num_images * most_tokens + 1).float().view(num_images, most_tokens, 1).expand(-1, -1, 3)
    placed = place_tokens(tokens, placeholders, short) if num_images else None
    outputs = torch.arange(case.input_ids.shape[0] * length).float().view(-1, length, 1)
    spread = short.to_original(outputs)
    values = torch.arange(case.input_ids.numel()).view(*case.input_ids.shape, 1, 1).expand(-1, -1, 2, 1)
    of_short = short.of_original(values)
    first_image = 0
    for row in range(len(case.rows)):
        ids, visual, source, next_image = slow_row(case, row, first_image)
        for rows in (placeholders.row_of_image, placeholders.last_row_of_image):
            assert rows[first_image:next_image].tolist() == [row] * (next_image - first_image)
        first_image = next_image
        num_padding = length - len(ids)
        assert short.input_ids[row].tolist() == [PADDING] * num_padding + ids
        assert short.attention_mask[row].tolist() == [0] * num_padding + [1] * len(ids)
        assert short.position_ids[row].tolist() == [0] * num_padding + list(range(len(ids)))
        assert short.source[row, num_padding:].tolist() == source
        assert of_short.shape == (len(case.rows), length, 2, 1)
        for index, original in enumerate(source):
            assert torch.equal(of_short[row, num_padding + index], values[row, original])
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
        per_image=alike(2),
        num_tokens=torch.tensor([2, 4]),
    )
    _, short = shortened(case)
    assert short.input_ids.tolist() == [[PADDING, PADDING, 1, IMAGE, IMAGE, 2, 3], [1, 2, *[IMAGE] * 4, 3]]
    assert short.output_of[0].tolist() == [2, 3, 4, 4, 4, 4, 5, 6]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(prompts())
def test_any_placeholder_is_numbered_as_in_a_loop(case):
    """Images may have different numbers of placeholders, one directly behind another."""
    placeholders = locate_placeholders(case.input_ids, IMAGE, case.per_image)
    numbers = [(image, offset) for image, count in enumerate(case.per_image.tolist()) for offset in range(count)]
    rows_of_images = [set() for _ in case.per_image]
    for row, ids in enumerate(case.input_ids.tolist()):
        for position, token in enumerate(ids):
            assert bool(placeholders.mask[row, position]) == (token == IMAGE)
            if token == IMAGE:
                image, offset = numbers.pop(0)
                assert int(placeholders.image[row, position]) == image
                assert int(placeholders.offset[row, position]) == offset
                rows_of_images[image].add(row)
    assert not numbers
    assert placeholders.row_of_image.tolist() == [min(rows) for rows in rows_of_images]
    assert placeholders.last_row_of_image.tolist() == [max(rows) for rows in rows_of_images]


def test_an_image_split_over_prompts_shows():
    """5 + 5 placeholders for 3 and 7: the second image begins in the first prompt and ends in the second."""
    ids = torch.tensor([[1, *[IMAGE] * 5, 2], [1, *[IMAGE] * 5, 2]])
    placeholders = locate_placeholders(ids, IMAGE, torch.tensor([3, 7]))
    assert placeholders.row_of_image.tolist() == [0, 0] and placeholders.last_row_of_image.tolist() == [0, 1]
    sound = locate_placeholders(ids, IMAGE, torch.tensor([3, 2, 1, 4]))
    assert sound.row_of_image.tolist() == sound.last_row_of_image.tolist() == [0, 0, 1, 1]


def test_more_or_fewer_placeholders_than_images_need_raise_nothing_here():
    """The caller counts them; numbering alone must not fail before it can say what is wrong."""
    ids = torch.tensor([[1, *[IMAGE] * 5, 2], [1, *[IMAGE] * 5, 2]])
    for counts in ([], [3], [3, 3, 3], [20], [5, 5, 5]):
        placeholders = locate_placeholders(ids, IMAGE, torch.tensor(counts, dtype=torch.long))
        assert int(placeholders.mask.sum()) == 10 and len(placeholders.row_of_image) == len(counts)
        surviving_positions(placeholders, torch.ones(len(counts), dtype=torch.long), None)


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
    placeholders = locate_placeholders(ids, IMAGE, alike(2))
    keep = surviving_positions(placeholders, torch.tensor([2, 3]), None)
    short = shorten_prompt(ids, keep, 10, PADDING, None, positions)
    assert short.input_ids.tolist() == [[1, IMAGE, IMAGE, 2, 1, IMAGE, IMAGE, IMAGE, 2, 3]]
    assert short.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]


def test_one_row_of_positions_serves_a_batch():
    ids = torch.tensor([[1, *[IMAGE] * 5, 2]] * 3)
    placeholders = locate_placeholders(ids, IMAGE, alike(3))
    keep = surviving_positions(placeholders, torch.tensor([2, 2, 2]), None)
    short = shorten_prompt(ids, keep, 4, PADDING, None, torch.arange(7)[None])
    assert short.position_ids.tolist() == [[0, 1, 2, 3]] * 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompts())
def test_an_unchanged_prompt_is_its_own_short_one(case):
    short = ShortPrompt.unchanged(case.input_ids, case.attention_mask)
    mask = torch.ones_like(case.input_ids) if case.attention_mask is None else case.attention_mask
    assert not short.may_have_moved
    assert torch.equal(short.input_ids, case.input_ids) and torch.equal(short.attention_mask, mask)
    for row in range(len(mask)):
        seen = -1
        for position, present in enumerate(mask[row].tolist()):
            seen += present
            assert int(short.position_ids[row, position]) == max(seen, 0)
    values = torch.rand(*mask.shape, 3)
    assert torch.equal(short.of_original(values), values) and torch.equal(short.to_original(values), values)
    given_positions = ShortPrompt.unchanged(case.input_ids, case.attention_mask, torch.arange(mask.shape[1])[None] + 4)
    assert torch.equal(given_positions.position_ids, torch.arange(mask.shape[1]).expand_as(mask) + 4)


# ---------------------------------------------------------------------------------------------------------- attentions


@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompts(), st.integers(0, 3), st.integers(0, 2), st.integers(0, 2))
def test_attentions_equal_the_slow_version(case, num_past, num_unused, num_later):
    """Behind a history of which every second token was dropped, with columns that a static cache has not used yet."""
    _, short = shortened(case)
    batch_size, length = case.input_ids.shape
    past_source = (2 * torch.arange(num_past)).expand(batch_size, -1)
    original_past = 2 * num_past
    source = torch.cat([past_source, original_past + short.source], dim=1)
    present = torch.cat([torch.ones(batch_size, num_past, dtype=torch.long), short.attention_mask], dim=1)
    total = original_past + length + num_later
    num_short = short.input_ids.shape[1]
    weights = torch.rand(batch_size, 2, num_short, source.shape[1] + num_unused)
    before = weights.clone()
    found = attentions_of_original(weights, short, source, present, total)
    assert torch.equal(weights, before) and found.shape == (batch_size, 2, length, total)
    expected = torch.zeros_like(found)
    for row in range(batch_size):
        for position in range(length):
            stand_in = int(short.output_of[row, position])
            for column in range(source.shape[1]):
                if present[row, column]:
                    expected[row, :, position, int(source[row, column])] = weights[row, :, stand_in, column]
    assert torch.equal(found, expected)
    # Every kept token is attended to; a dropped one, or padding, by nobody.
    attended = (found > 0).any(1).any(1)
    for row in range(batch_size):
        kept = [int(source[row, column]) for column in range(source.shape[1]) if present[row, column]]
        assert attended[row].nonzero().flatten().tolist() == sorted(kept)
