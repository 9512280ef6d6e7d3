"""What tokens are made of and their order: against a slow version, and properties of any result.

The selections are the paper's, which have centres and a remaining token, and any masks at all without centres.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LargestTensor
from paper_method import (
    assert_selection_equals_slow_version,
    cases,
    indices,
    recover,
    run_case,
    scene,
    slow_tokens,
    sorted_rows,
)

from recoverable_llava.paper_selection import select_by_outliers
from recoverable_llava.selection import Selection
from recoverable_llava.token_assembly import assemble_tokens, gather_tokens


pytestmark = pytest.mark.algorithm


def assert_equals_slow_version(visual, text, keys, has_question=None, valid=None, merging=None, **selection_settings):
    merging = {"merge_neighbors": 4, "text_merge_weight": 2.0, **(merging or {})}
    selection, slow = assert_selection_equals_slow_version(visual, text, has_question, valid, **selection_settings)
    _, _, weights = recover(visual, keys, text, has_question, valid, merging, **selection_settings)
    for row in range(len(visual)):
        asks = text is not None and (has_question is None or bool(has_question[row]))
        relevance = text[row].double().numpy() if asks else None
        expected = slow_tokens(slow[row], keys[row].double().numpy(), relevance, **merging)
        np.testing.assert_allclose(weights[row, : len(expected)].numpy(), expected, atol=1e-5)
        assert (weights[row, len(expected) :] == 0).all()
    return selection


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lof_threshold": 1.1},
        {"lof_threshold": 3.0},
        {"merge_remaining": False},
        {"min_visual_tokens": 12},
        {"max_visual_tokens": 9},
        {"max_visual_tokens": 55},
        {"max_visual_tokens": 9, "merge_remaining": False},
        {"visual_token_budget": 1},
        {"visual_token_budget": 14},
        {"visual_token_budget": 14, "merge_remaining": False},
        {"visual_token_budget": 60},
        {"merging": {"merge_neighbors": 0}},
        {"merging": {"merge_neighbors": 32}},
        {"merging": {"merge_neighbors": 1000}},
        {"merging": {"text_merge_weight": 0.0}},
        {"merging": {"text_merge_weight": 50.0}},
    ],
    ids=str,
)
def test_equals_the_slow_version(settings):
    for seed in range(4):
        visual, text, keys = scene(seed)
        assert_equals_slow_version(visual, text, keys, **settings)
        assert_equals_slow_version(visual, None, keys, **settings)
        has_question = torch.tensor([True, False, True, False])
        assert_equals_slow_version(visual, text, keys, has_question, **settings)
        valid = torch.rand(visual.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
        assert_equals_slow_version(visual, text, keys, has_question, valid, **settings)


def test_default_settings_at_full_size():
    visual, text, keys = scene(7, batch_size=2, num_patches=576, channels=16)
    defaults = {"visual_lof_neighbors": 20, "text_lof_neighbors": 20, "merge_lof_neighbors": 10}
    assert_equals_slow_version(
        visual, text, keys, merging={"merge_neighbors": 32, "text_merge_weight": 50.0}, **defaults
    )


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, derandomize=True)
@given(cases())
def test_any_assembly_is_well_formed(case):
    tensors = (case.visual, case.text, case.keys, case.has_question, case.valid)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    selection, assembly, weights = run_case(case)
    for tensor, copy in zip(tensors, before):
        assert tensor is None or torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)

    valid = torch.ones_like(case.visual, dtype=torch.bool) if case.valid is None else case.valid
    visual, text, centres = selection.chosen_by_vision, selection.chosen_by_text, selection.centres
    # Kept patches in raster order as they are, then means; nothing behind an image's last token.
    assert torch.equal(assembly.token_mask.sum(1), selection.num_tokens)
    assert weights.isfinite().all() and (weights >= 0).all()
    sums = weights.sum(2)
    torch.testing.assert_close(sums, assembly.token_mask.float(), rtol=0, atol=1e-5)
    assert ((weights > 0) <= valid[:, None]).all()
    for row in range(len(weights)):
        kept = indices(visual[row] | text[row])
        assert assembly.token_index[row, : len(kept)].tolist() == kept
        assert torch.equal(weights[row, : len(kept)], torch.eye(weights.shape[2])[kept])
        num_centres = int(centres[row].sum())
        merged = weights[row, len(kept) : int(selection.num_tokens[row])]
        assert (merged[:, kept] == 0).all()
        # A centre is part of its own token and of no other.
        assert torch.equal(merged[:, centres[row]] > 0, torch.eye(len(merged), num_centres, dtype=torch.bool))
        if selection.merges_remaining[row]:  # every patch has a part in some token
            assert torch.equal((weights[row] > 0).any(0), valid[row])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_batch_equals_rows(case):
    selection, assembly, weights = run_case(case)
    for row in range(len(weights)):
        alone, assembly_alone, weights_alone = run_case(case, slice(row, row + 1))
        for name in vars(selection):
            assert torch.equal(getattr(selection, name)[row], getattr(alone, name)[0]), name
        num_tokens = int(alone.num_tokens)
        torch.testing.assert_close(weights[row, :num_tokens], weights_alone[0], rtol=0, atol=1e-6)
        assert not assembly.token_mask[row, num_tokens:].any() and assembly_alone.token_mask.all()


@pytest.mark.parametrize("settings", [{}, {"visual_token_budget": 17}, {"max_visual_tokens": 11}], ids=str)
def test_permuting_patches_permutes_tokens(settings):
    for seed in range(10):
        visual, text, keys = scene(seed)
        order = torch.randperm(visual.shape[1], generator=torch.Generator().manual_seed(seed))
        _, _, weights = recover(visual, keys, text, **settings)
        _, _, moved_weights = recover(visual[:, order], keys[:, order], text[:, order], **settings)
        for row, moved_row in zip(weights[:, :, order], moved_weights):
            # The same tokens, in the new raster order.
            torch.testing.assert_close(sorted_rows(row), sorted_rows(moved_row), atol=1e-6, rtol=0)


def test_only_differences_of_relevance_matter():
    visual, text, keys = scene(3)
    text = (text * 1024).round() / 1024  # so that the shift is exact
    first, _, weights = recover(visual, keys, text)
    second, _, weights_shifted = recover(visual, keys, text + 3)
    assert torch.equal(first.chosen_by_text, second.chosen_by_text)
    torch.testing.assert_close(weights, weights_shifted, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------------------- edges


def test_constant_scores_keep_the_minimum_and_one_token_for_the_rest():
    visual, keys = torch.full((2, 30), 0.1), torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0))
    selection, _, weights = recover(visual, keys, torch.zeros(2, 30), min_visual_tokens=3)
    assert selection.num_visual.tolist() == [3, 3] and selection.num_text.tolist() == [0, 0]
    assert selection.num_merged.tolist() == [1, 1]
    torch.testing.assert_close(weights[:, 3, 3:], torch.full((2, 27), 1 / 27))


def test_relevance_decides_whom_a_centre_absorbs():
    visual, text, keys = scene(6)
    _, _, by_keys = recover(visual, keys, text, merging={"text_merge_weight": 0.0})
    _, _, by_both = recover(visual, keys, text, merging={"text_merge_weight": 50.0})
    assert by_keys.shape == by_both.shape and not torch.allclose(by_keys, by_both)


def test_no_question_is_as_no_relevance():
    visual, text, keys = scene(8)
    alone, _, weights = recover(visual, keys, None)
    has_question = torch.zeros(4, dtype=torch.bool)
    for unread in (text, torch.full_like(text, torch.nan), torch.full_like(text, torch.inf)):
        selection, _, same = recover(visual, keys, unread, has_question)
        assert all(torch.equal(getattr(alone, name), getattr(selection, name)) for name in vars(alone))
        assert torch.equal(weights, same)
    with_question, _, _ = recover(visual, keys, text)
    assert (with_question.num_text > 0).all()


def test_all_patches_kept():
    visual, text, keys = scene(9)
    for limits in ({"min_visual_tokens": 60}, {"min_visual_tokens": 1000}):
        selection, _, weights = recover(visual, keys, text, **limits)
        assert selection.chosen_by_vision.all() and (selection.num_tokens == 60).all()
        assert torch.equal(weights, torch.eye(60).expand(4, -1, -1))
    # A budget of all patches leaves none to merge with: every token is a patch, though not by the same step.
    selection, _, weights = recover(visual, keys, text, visual_token_budget=60)
    assert torch.equal(sorted_rows(weights[0]), sorted_rows(torch.eye(60)))


def test_no_valid_patch_is_no_token():
    visual, text, keys = scene(10)
    valid = torch.ones_like(visual, dtype=torch.bool)
    valid[1] = False
    valid[2, 3:] = False
    for limits in ({}, {"visual_token_budget": 10}, {"min_visual_tokens": 10}, {"max_visual_tokens": 10}):
        selection, assembly, weights = recover(visual, keys, text, valid=valid, **limits)
        assert selection.num_tokens[1] == 0 and not assembly.token_mask[1].any() and not weights[1].any()
        assert 1 <= selection.num_tokens[2] <= 3
        assert not (weights[2, :, 3:] > 0).any()
    selection, _, _ = recover(visual, keys, text, valid=valid, visual_token_budget=10)
    assert selection.num_tokens.tolist() == [10, 0, 3, 10]


def test_scores_that_are_no_numbers_count_as_the_lowest():
    visual, text, keys = scene(11)
    hurt_visual, hurt_text = visual.clone(), text.clone()
    for value, columns in ((torch.nan, slice(0, 5)), (torch.inf, slice(5, 10)), (-torch.inf, slice(10, 15))):
        hurt_visual[:, columns], hurt_text[:, columns] = value, value
    lowest_visual = visual[:, 15:].amin(1, keepdim=True).expand(-1, 15)
    lowest_text = text[:, 15:].amin(1, keepdim=True).expand(-1, 15)
    selection, _, weights = recover(hurt_visual, keys, hurt_text)
    visual = torch.cat([lowest_visual, visual[:, 15:]], 1)
    expected, _, expected_weights = recover(visual, keys, torch.cat([lowest_text, text[:, 15:]], 1))
    assert all(torch.equal(getattr(selection, name), getattr(expected, name)) for name in vars(selection))
    # The same patches are merged, but one without attention has next to no weight in the mean.
    assert torch.equal(weights > 0, expected_weights > 0)
    kept = selection.chosen_by_vision | selection.chosen_by_text
    for row in range(4):
        merged = weights[row, int(kept[row].sum()) :]
        assert (merged[:, :15] < 1e-20).all()


def test_scores_of_zero_still_make_a_mean():
    visual, keys = torch.zeros(1, 30), torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    _, _, weights = recover(visual, keys, min_visual_tokens=1)
    torch.testing.assert_close(weights[0, 1], torch.cat([torch.zeros(1), torch.full((29,), 1 / 29)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_gathered_tokens_equal_a_loop(dtype):
    visual, text, keys = scene(12)
    selection, assembly, _ = recover(visual, keys, text)
    patches = torch.randn(4, 60, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = patches.clone()
    tokens = gather_tokens(patches, assembly)
    assert tokens.dtype == dtype and torch.equal(patches, before)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    for row in range(4):
        kept = indices(selection.chosen_by_vision[row] | selection.chosen_by_text[row])
        for position, patch in enumerate(kept):
            assert torch.equal(tokens[row, position], patches[row, patch])  # to the bit, in every precision
        for number in range(int(selection.num_merged[row])):
            weights = assembly.merge_weights[row, number].tolist()
            mean = sum(weight * patch.double() for weight, patch in zip(weights, patches[row]))
            torch.testing.assert_close(
                tokens[row, len(kept) + number].double(), mean.double(), atol=tolerance, rtol=tolerance
            )
        assert (tokens[row, int(selection.num_tokens[row]) :] == 0).all()


def test_a_merged_token_stays_on_the_scale_of_a_patch():
    """A mean lies between the least and the greatest of its patches; the sums of the paper's release do not."""
    visual, text, keys = scene(13)
    selection, assembly, _ = recover(visual, keys, text)
    patches = torch.rand(4, 60, 10, generator=torch.Generator().manual_seed(2)) + 1
    tokens = gather_tokens(patches, assembly)[assembly.token_mask]
    assert (tokens >= patches.min() - 1e-5).all() and (tokens <= patches.max() + 1e-5).all()


def test_gradients_reach_the_patches_of_every_token():
    visual, text, keys = scene(14)
    _, assembly, weights = recover(visual, keys, text)
    patches = torch.randn(4, 60, 3, requires_grad=True)
    gather_tokens(patches, assembly).sum().backward()
    torch.testing.assert_close(patches.grad[..., 0], weights.sum(1), atol=1e-5, rtol=1e-5)


def test_no_tensor_over_pairs_of_patches():
    """Merging works on centres x patches; nothing is patches x patches, which a tiled image could not afford."""
    visual, text, keys = scene(15, batch_size=1, num_patches=2880, channels=4)
    with LargestTensor() as largest:
        selection = select_by_outliers(visual, text, visual_token_budget=64)
        assemble_tokens(selection, visual, keys, text, num_tokens=64, num_merged=64)
    assert largest.num_elements <= max(4 * 2880 * 21, 64 * 2880)
    assert largest.num_elements < 2880 * 2880 / 10


# ----------------------------------------------------------------------------------------------------- without centres


@st.composite
def selections_without_centres(draw):
    """Any disjoint masks, with a remaining token wherever something is left and some images want one."""
    batch_size, num_patches = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = torch.rand(batch_size, num_patches, generator=generator)
    valid = torch.rand(batch_size, num_patches, generator=generator) < draw(st.sampled_from([0.5, 0.9, 1.0]))
    by_vision, by_text = valid & (kind < 0.2), valid & (kind > draw(st.sampled_from([0.3, 0.8, 1.0])))
    is_left = valid & ~by_vision & ~by_text
    wants = torch.rand(batch_size, generator=generator) < 0.7
    selection = Selection(by_vision, by_text, None, is_left.any(1) & wants)
    scores = torch.rand(batch_size, num_patches, generator=generator) * draw(st.sampled_from([0.0, 1.0]))
    return selection, scores, None if valid.all() and draw(st.booleans()) else valid


@settings(max_examples=500, deadline=None, derandomize=True)
@given(selections_without_centres())
def test_without_centres_the_rest_is_one_mean(case):
    selection, scores, valid = case
    num_patches = scores.shape[1]
    num_tokens, num_merged = int(selection.num_tokens.max()), int(selection.num_merged.max())
    keys = torch.full((*scores.shape, 3), torch.nan)  # nothing is looked for among them
    assembly = assemble_tokens(selection, scores, keys, None, None, valid, num_tokens=num_tokens, num_merged=num_merged)
    weights = gather_tokens(torch.eye(num_patches).expand(len(scores), -1, -1), assembly)
    for row in range(len(scores)):
        chosen = [
            i for i in range(num_patches) if selection.chosen_by_vision[row, i] or selection.chosen_by_text[row, i]
        ]
        left = [i for i in range(num_patches) if i not in chosen and (valid is None or valid[row, i])]
        expected = [torch.eye(num_patches)[i] for i in chosen]
        if selection.merges_remaining[row]:
            mean = torch.zeros(num_patches)
            for i in left:
                mean[i] = scores[row, i] if scores.any() else 1.0
            expected.append(mean / mean.sum())
        assert int(selection.num_tokens[row]) == len(expected)
        assert assembly.token_mask[row].tolist() == [True] * len(expected) + [False] * (num_tokens - len(expected))
        found = weights[row]
        assert (found[len(expected) :] == 0).all()
        if expected:
            torch.testing.assert_close(found[: len(expected)], torch.stack(expected), atol=1e-6, rtol=0)


def test_more_room_for_merged_tokens_than_any_image_needs():
    """A fixed budget makes room for as many merged tokens as it has tokens; what is not used changes nothing."""
    visual, text, keys = scene(18)
    selection, _, weights = recover(visual, keys, text)
    roomy = assemble_tokens(
        selection,
        visual,
        keys,
        text,
        num_tokens=int(selection.num_tokens.max()),
        num_merged=30,
        merge_neighbors=4,
        text_merge_weight=2.0,
    )
    assert torch.equal(gather_tokens(torch.eye(60).expand(4, -1, -1), roomy), weights)
