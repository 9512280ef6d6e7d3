"""What a cache remembers of a compressed prompt, against lists that grow and are cut token by token."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoverable_llava.cache_history import (
    HISTORY,
    CompressedHistory,
    is_full_history,
    mask_of_new_tokens,
    uncompressed_history,
)
from recoverable_llava.short_prompt import ShortPrompt, shorten_prompt


pytestmark = pytest.mark.algorithm


IMAGE = 900


def history_of(num_short, num_original):
    """The last `num_short` of the original tokens were kept."""
    ids, short = torch.arange(num_original)[None], torch.arange(100, 100 + num_short)[None]
    source = torch.arange(num_original - num_short, num_original)[None]
    return CompressedHistory(ids, torch.ones_like(ids), short, torch.ones_like(short), source, num_short)


def test_history_grows_in_both_numberings():
    history = history_of(4, 9)
    answer = torch.tensor([[7, 8]])
    longer = history.extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
    assert longer.input_ids[0].tolist() == [*range(9), 7, 8]
    assert longer.short_input_ids[0].tolist() == [100, 101, 102, 103, 7, 8]
    assert longer.source[0].tolist() == [5, 6, 7, 8, 9, 10]
    assert longer.irreducible_length == 4
    image = torch.full((1, 5), IMAGE)
    keep = torch.tensor([[True, True, False, False, False]])
    later = longer.extended(image, torch.ones_like(image), shorten_prompt(image, keep, 2, IMAGE))
    assert later.input_ids.shape[1] == 16 and later.short_input_ids.shape[1] == 8
    assert later.source[0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert later.irreducible_length == 8
    assert history.input_ids.shape[1] == 9  # not modified


def test_history_is_cropped_down_to_the_compressed_prompt():
    answer = torch.tensor([[7, 8, 9]])
    history = history_of(4, 9).extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
    assert history.cropped(7) is history
    shorter = history.cropped(5)
    assert shorter.input_ids[0].tolist() == [*range(9), 7] and shorter.short_input_ids.shape[1] == 5
    assert shorter.attention_mask.shape == shorter.input_ids.shape
    assert history.cropped(4).input_ids[0].tolist() == list(range(9))


@pytest.mark.parametrize("cached_length", [3, 0, 8])
def test_history_of_another_length_is_refused(cached_length):
    answer = torch.tensor([[7, 8, 9]])
    history = history_of(4, 9).extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
    with pytest.raises(ValueError, match=f"past_key_values holds {cached_length} tokens, but its compressed prompt 4"):
        history.cropped(cached_length)


@st.composite
def turns(draw):
    """Per turn the ids, mask and kept positions of a batch; some turns are cached as they are (kept is None)."""
    batch_size = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    result = []
    for is_shortened in draw(st.lists(st.booleans(), min_size=1, max_size=4)):
        length = draw(st.integers(1, 6))
        ids = torch.randint(10, 99, (batch_size, length), generator=generator)
        mask = (torch.rand(batch_size, length, generator=generator) < 0.8).long()
        keep = (torch.rand(batch_size, length, generator=generator) < 0.5) & mask.bool() if is_shortened else None
        result.append((ids, mask, keep))
    return result


def cached(turns):
    """The history of the turns, and for each row the list of its cached tokens as (original position, id, mask)."""
    history, slow, num_original = None, [[] for _ in turns[0][0]], 0
    for ids, mask, keep in turns:
        if keep is None:
            short = ShortPrompt.unchanged(ids, mask)
        else:
            short = shorten_prompt(ids, keep, int(keep.sum(1).max()), IMAGE, mask)
        history = (history or CompressedHistory.empty(ids)).extended(ids, mask, short)
        for row, tokens in enumerate(slow):
            kept = [i for i in range(ids.shape[1]) if keep is None or keep[row, i]]
            tokens += [(None, IMAGE, 0)] * (short.input_ids.shape[1] - len(kept))
            present = mask[row].tolist() if keep is None else [1] * ids.shape[1]
            tokens += [(num_original + i, int(ids[row, i]), present[i]) for i in kept]
        num_original += ids.shape[1]
    return history, slow


@settings(max_examples=200, deadline=None, derandomize=True)
@given(turns())
def test_any_history_equals_lists_of_tokens(given_turns):
    history, slow = cached(given_turns)
    assert torch.equal(history.input_ids, torch.cat([ids for ids, _, _ in given_turns], dim=1))
    assert torch.equal(history.attention_mask, torch.cat([mask for _, mask, _ in given_turns], dim=1))
    for row, tokens in enumerate(slow):
        assert history.short_input_ids[row].tolist() == [token for _, token, _ in tokens]
        assert history.short_attention_mask[row].tolist() == [present for _, _, present in tokens]
        for column, (original, token, present) in enumerate(tokens):
            if present:
                assert int(history.source[row, column]) == original
                assert int(history.input_ids[row, original]) == token
    last = max((turn for turn, (_, _, keep) in enumerate(given_turns) if keep is not None), default=None)
    expected = 0 if last is None else cached(given_turns[: last + 1])[0].short_input_ids.shape[1]
    assert history.irreducible_length == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(turns(), st.integers(1, 3))
def test_repeating_and_cropping_change_every_part_alike(given_turns, repeats):
    answer = torch.arange(6).expand(len(given_turns[0][0]), -1)
    history, _ = cached(given_turns)
    longer = history.extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
    repeated = longer.repeated(repeats)
    shorter = longer.cropped(history.short_input_ids.shape[1] + 2)
    names = [name for name, value in vars(longer).items() if isinstance(value, torch.Tensor)]
    assert "source" in names and len(names) == 5
    for name in names:
        rows = getattr(longer, name)
        assert torch.equal(getattr(repeated, name), torch.stack([row for row in rows for _ in range(repeats)]))
        assert torch.equal(getattr(shorter, name), rows[:, :-4])
    assert repeated.irreducible_length == shorter.irreducible_length == history.irreducible_length


@settings(max_examples=100, deadline=None, derandomize=True)
@given(turns())
def test_positions_of_new_tokens(given_turns):
    history, _ = cached(given_turns)
    answer = torch.arange(3).expand(len(given_turns[0][0]), -1)
    short = ShortPrompt.unchanged(answer)
    counted = history.positions_of(short, are_given=False)
    num_present = history.short_attention_mask.sum(1, keepdim=True)
    assert torch.equal(counted, num_present + torch.arange(3))
    # A caller counts the original tokens; each position moves down by what was dropped before it.
    originals = history.attention_mask.sum(1, keepdim=True) + torch.arange(3)
    given_ones = history.positions_of(ShortPrompt.unchanged(answer, None, originals), are_given=True)
    assert torch.equal(given_ones, counted)


class Cache(SimpleNamespace):
    def get_seq_length(self):
        return self.length


def test_a_cache_carries_its_history_only_where_something_was_dropped():
    cache = Cache(length=6)
    assert CompressedHistory.of(cache) is None and CompressedHistory.of(None) is None
    answer = torch.tensor([[7, 8]])
    plain = CompressedHistory.empty(answer).extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
    plain.attach(cache)
    assert not hasattr(cache, HISTORY)
    history = history_of(4, 9).extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
    history.attach(cache)
    assert getattr(cache, HISTORY) is history and CompressedHistory.of(cache) is history
    cache.length = 5
    assert CompressedHistory.of(cache).short_input_ids.shape[1] == 5
    cache.length = 3
    with pytest.raises(ValueError, match="past_key_values holds 3 tokens"):
        CompressedHistory.of(cache)


def test_an_uncompressed_past_is_its_own_numbering():
    tokens = torch.tensor([[7, 8], [9, 10]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    history = uncompressed_history(tokens, 3, mask)
    assert torch.equal(history.attention_mask, mask[:, :3])
    assert torch.equal(history.short_attention_mask, mask[:, :3])
    assert (history.input_ids == -1).all() and history.source.tolist() == [[0, 1, 2]] * 2
    assert history.irreducible_length == 0
    for short_mask in (None, mask[:, 3:]):
        assert uncompressed_history(tokens, 3, short_mask).attention_mask.tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("columns", [2, 11, 6])
def test_a_mask_may_cover_the_past_in_either_numbering(columns):
    history, tokens = history_of(4, 9), torch.tensor([[7, 8]])
    mask = torch.arange(columns)[None]
    assert mask_of_new_tokens(tokens, mask, history).tolist() == [[columns - 2, columns - 1]]
    assert mask_of_new_tokens(tokens, None, history) is None
    with pytest.raises(ValueError, match=r"attention_mask has 7 columns for 2 new tokens.*\[2, 6, 11\]"):
        mask_of_new_tokens(tokens, torch.ones(1, 7), history)


def test_whether_ids_repeat_the_past():
    history = history_of(4, 9)
    full = torch.tensor([[*range(9), 7]])
    assert is_full_history(full, torch.ones_like(full), history)
    assert is_full_history(full, None, history)
    new = torch.tensor([[7, 8]])
    assert not is_full_history(new, None, history)
    assert not is_full_history(new, torch.ones(1, 11), history)
    with pytest.raises(ValueError, match="does not belong to a prefix of input_ids: they differ within the first 9"):
        is_full_history(full + 1, None, history)
    with pytest.raises(ValueError, match="attention_mask has 7 columns"):
        is_full_history(new, torch.ones(1, 7), history)
    with pytest.raises(ValueError, match="input_ids has 2 rows, but past_key_values stands for 1"):
        is_full_history(new.expand(2, -1), None, history)
