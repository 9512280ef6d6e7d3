"""The paper's selection against a slow version, one image and one patch at a time, and properties of any result."""

import pytest
import torch
from hypothesis import given, settings
from paper_method import LOF, assert_selection_equals_slow_version, cases, scene

from recoverable_llava.paper_selection import select_by_outliers


pytestmark = pytest.mark.algorithm


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
    ],
    ids=str,
)
def test_equals_the_slow_version(settings):
    for seed in range(4):
        visual, text, _ = scene(seed)
        assert_selection_equals_slow_version(visual, text, **settings)
        assert_selection_equals_slow_version(visual, None, **settings)
        has_question = torch.tensor([True, False, True, False])
        assert_selection_equals_slow_version(visual, text, has_question, **settings)
        valid = torch.rand(visual.shape, generator=torch.Generator().manual_seed(seed)) > 0.3
        assert_selection_equals_slow_version(visual, text, has_question, valid, **settings)


def test_every_step_has_something_to_do():
    """The comparison above would be empty on inputs that keep, recover or merge nothing."""
    visual, text, _ = scene(0)
    selection = select_by_outliers(visual, text, **LOF)
    for count in (selection.num_visual, selection.num_text, selection.num_merged - selection.merges_remaining.long()):
        assert (count >= 1).all() and (count < 30).all()
    assert selection.merges_remaining.all()
    assert (selection.num_tokens < 40).all()


def test_default_settings_at_full_size():
    visual, text, _ = scene(7, batch_size=2, num_patches=576)
    defaults = {"visual_lof_neighbors": 20, "text_lof_neighbors": 20, "merge_lof_neighbors": 10}
    selection, _ = assert_selection_equals_slow_version(visual, text, **defaults)
    same = select_by_outliers(visual, text)
    for name in ("chosen_by_vision", "chosen_by_text", "centres"):
        assert torch.equal(getattr(same, name), getattr(selection, name))


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, derandomize=True)
@given(cases())
def test_any_selection_is_well_formed(case):
    tensors = (case.visual, case.text, case.has_question, case.valid)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    selection = select_by_outliers(case.visual, case.text, case.has_question, case.valid, **case.settings)
    for tensor, copy in zip(tensors, before):
        assert tensor is None or torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)

    valid = torch.ones_like(case.visual, dtype=torch.bool) if case.valid is None else case.valid
    num_valid = valid.sum(1)
    visual, text, centres = selection.chosen_by_vision, selection.chosen_by_text, selection.centres
    # Counts match the masks, which are disjoint and hold valid patches alone.
    assert torch.equal(visual.sum(1), selection.num_visual)
    assert torch.equal(text.sum(1), selection.num_text)
    assert torch.equal(centres.sum(1) + selection.merges_remaining, selection.num_merged)
    assert torch.equal(selection.num_visual + selection.num_text + selection.num_merged, selection.num_tokens)
    assert (visual.int() + text.int() + centres.int() <= valid.int()).all()
    assert not (selection.merges_remaining.any() and not case.settings["merge_remaining"])
    if case.text is None:
        assert not text.any()
    elif case.has_question is not None:
        assert not text[~case.has_question].any()

    # Bounds
    minimum = case.settings.get("min_visual_tokens", 1)
    assert (selection.num_tokens <= num_valid).all()
    if "visual_token_budget" in case.settings:
        assert torch.equal(selection.num_tokens, num_valid.clamp(max=case.settings["visual_token_budget"]))
    else:
        assert (selection.num_tokens >= num_valid.clamp(max=minimum)).all()
    if "max_visual_tokens" in case.settings:
        assert (selection.num_tokens <= case.settings["max_visual_tokens"]).all()
    else:
        assert "visual_token_budget" in case.settings or (selection.num_visual >= num_valid.clamp(max=minimum)).all()


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(cases())
def test_any_selection_equals_the_slow_version(case):
    text = None if case.text is None else case.text.float()
    assert_selection_equals_slow_version(case.visual.float(), text, case.has_question, case.valid, **case.settings)


@pytest.mark.parametrize("settings", [{}, {"visual_token_budget": 17}, {"max_visual_tokens": 11}], ids=str)
def test_permuting_patches_permutes_masks(settings):
    for seed in range(10):
        visual, text, _ = scene(seed)
        order = torch.randperm(visual.shape[1], generator=torch.Generator().manual_seed(seed))
        selection = select_by_outliers(visual, text, **LOF, **settings)
        moved = select_by_outliers(visual[:, order], text[:, order], **LOF, **settings)
        for name in ("chosen_by_vision", "chosen_by_text", "centres"):
            assert torch.equal(getattr(selection, name)[:, order], getattr(moved, name)), name


# -------------------------------------------------------------------------------------------------------------- edges


def test_a_patch_that_stands_out_by_relevance_is_recovered():
    """What the method is for: class attention passes it over, the question asks for it."""
    visual, text, _ = scene(5)
    passed_over = visual.argsort(1)[:, 20:24]
    text = torch.zeros_like(text) + 1e-3 * torch.arange(60) / 60
    text = text.scatter(1, passed_over, 1.0 + torch.arange(4).expand(4, -1) / 7)
    selection = select_by_outliers(visual, text, **LOF)
    without = select_by_outliers(visual, **LOF)
    assert not without.chosen_by_vision.gather(1, passed_over).any()
    assert selection.chosen_by_text.gather(1, passed_over[:, -1:]).all()
    assert torch.equal(selection.chosen_by_vision, without.chosen_by_vision)


def test_too_few_valid_patches_give_no_more_tokens_than_there_are():
    visual, text, _ = scene(10)
    valid = torch.ones_like(visual, dtype=torch.bool)
    valid[1] = False
    valid[2, 3:] = False
    for limits in ({}, {"visual_token_budget": 10}, {"min_visual_tokens": 10}, {"max_visual_tokens": 10}):
        selection = select_by_outliers(visual, text, valid=valid, **LOF, **limits)
        assert selection.num_tokens[1] == 0
        assert 1 <= selection.num_tokens[2] <= 3
    selection = select_by_outliers(visual, text, valid=valid, visual_token_budget=10, **LOF)
    assert selection.num_tokens.tolist() == [10, 0, 3, 10]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"visual_token_budget": 61}, r"visual_token_budget \(61\) is larger than .* \(60\)"),
        ({"visual_token_budget": 0}, "visual_token_budget must be at least 1, got 0"),
        ({"max_visual_tokens": 0}, "max_visual_tokens must be at least 1, got 0"),
        ({"visual_lof_neighbors": 60}, r"num_neighbors .* \(60\), got 60"),
    ],
)
def test_impossible_limits_are_errors(settings, message):
    visual, text, _ = scene(16)
    with pytest.raises(ValueError, match=message):
        select_by_outliers(visual, text, **{**LOF, **settings})


@pytest.mark.parametrize("name", ["text_scores", "valid"])
def test_shapes_that_disagree_are_errors(name):
    visual, _, _ = scene(17)
    with pytest.raises(ValueError, match=rf"{name} has shape \(4, 59\), but visual_scores \(4, 60\)"):
        select_by_outliers(visual, **{name: torch.ones(4, 59, dtype=torch.bool)}, **LOF)
