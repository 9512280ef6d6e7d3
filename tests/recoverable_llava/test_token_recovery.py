"""The four steps against a slow version of each, one image and one patch at a time, and properties of any result."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LargestTensor

from recoverable_llava.local_outlier_factor import local_outlier_factor
from recoverable_llava.token_recovery import assemble_tokens, gather_tokens, select_tokens


LOF = {"visual_lof_neighbors": 6, "text_lof_neighbors": 5, "merge_lof_neighbors": 4}


# --------------------------------------------------------------------------------------------------- the slow version


def slow_outliers(scores, num_neighbors, threshold):
    """Number of outliers of a list of scores; the Local Outlier Factor has tests of its own."""
    if len(scores) <= num_neighbors:
        return 0
    factors = local_outlier_factor(torch.tensor([scores]), num_neighbors)[0].tolist()
    return sum(factor > threshold for factor in factors)


def slow_highest(scores, count, among):
    """The `count` patches of `among` with the highest scores, the first of equal ones."""
    return sorted(among, key=lambda patch: (-scores[patch], patch))[:count]


def slow_finite(scores, patches):
    lowest = min((scores[patch] for patch in patches if math.isfinite(scores[patch])), default=0.0)
    return [score if math.isfinite(score) else lowest for score in scores]


def slow_shares(asked, total):
    """Largest remainders, in whole numbers."""
    whole = max(sum(asked), 1)
    shares = [number * total // whole for number in asked]
    by_remainder = sorted(range(len(asked)), key=lambda kind: (-(asked[kind] * total % whole), kind))
    for kind in by_remainder[: total - sum(shares)]:
        shares[kind] += 1
    return shares


def slow_selection(
    visual,
    text=None,
    has_question=True,
    valid=None,
    *,
    visual_lof_neighbors=20,
    text_lof_neighbors=20,
    merge_lof_neighbors=10,
    lof_threshold=1.5,
    merge_remaining=True,
    min_visual_tokens=1,
    max_visual_tokens=None,
    visual_token_budget=None,
):
    """Steps 1 to 3 for one image, with lists of scores and of patches."""
    patches = [patch for patch in range(len(visual)) if valid is None or valid[patch]]
    visual = slow_finite(visual, patches)

    # Step 1
    num_visual = slow_outliers([visual[patch] for patch in patches], visual_lof_neighbors, lof_threshold)
    num_visual = min(max(num_visual, min_visual_tokens), len(patches))
    kept = slow_highest(visual, num_visual, patches)

    # Step 2
    num_text = 0
    if text is not None:
        text = slow_finite(text, patches)
        if has_question and patches:
            lowest = min(text[patch] for patch in patches)
            unmet = [lowest if patch in kept else text[patch] for patch in patches]
            outliers = slow_outliers(unmet, text_lof_neighbors, lof_threshold)
            num_text = outliers * (len(patches) - num_visual) // len(patches)
    others = [patch for patch in patches if patch not in kept]
    recovered = slow_highest(text, num_text, others) if num_text else []

    # Step 3
    rest = [patch for patch in others if patch not in recovered]
    num_centres = slow_outliers([visual[patch] for patch in rest], merge_lof_neighbors, lof_threshold)
    num_merged = num_centres + (merge_remaining and num_centres < len(rest))

    # Budget
    total = num_visual + num_text + num_merged
    if visual_token_budget is not None:
        total = min(visual_token_budget, len(patches))
    elif max_visual_tokens is not None:
        total = min(total, max_visual_tokens)
    if visual_token_budget is not None or max_visual_tokens is not None:
        num_visual, num_text, num_merged = slow_shares([num_visual, num_text, num_merged], total)
        kept = slow_highest(visual, num_visual, patches)
        others = [patch for patch in patches if patch not in kept]
        recovered = slow_highest(text, num_text, others) if num_text else []
        rest = [patch for patch in others if patch not in recovered]
    has_remaining_token = merge_remaining and 0 < num_merged < len(rest) if total else False
    if visual_token_budget is None and max_visual_tokens is None:
        has_remaining_token = merge_remaining and num_centres < len(rest)
    centres = slow_highest(visual, num_merged - has_remaining_token, rest)
    return SimpleNamespace(
        kept=sorted(kept),
        recovered=sorted(recovered),
        centres=sorted(centres),
        rest=[patch for patch in rest if patch not in centres],
        merges_remaining=has_remaining_token,
        counts=[num_visual, num_text, num_merged],
        visual=visual,
    )


def slow_tokens(selection, keys, text=None, *, merge_neighbors, text_merge_weight):
    """Steps 3 and 4 for one image: the weights over all patches of each token, in the order of the tokens."""
    num_patches = len(selection.visual)

    def mean_of(patches):
        weights = np.zeros(num_patches)
        for patch in patches:
            weights[patch] = max(selection.visual[patch], 1e-37)
        return weights / weights.sum()

    def affinity(centre, patch):
        cosine = keys[centre] @ keys[patch] / np.linalg.norm(keys[centre]) / np.linalg.norm(keys[patch])
        return cosine if text is None else cosine - text_merge_weight * abs(text[centre] - text[patch])

    tokens = [np.eye(num_patches)[patch] for patch in sorted(selection.kept + selection.recovered)]
    unabsorbed = list(selection.rest)
    for centre in selection.centres:
        nearest = sorted(selection.rest, key=lambda patch: -affinity(centre, patch))[:merge_neighbors]
        tokens.append(mean_of([centre, *nearest]))
        unabsorbed = [patch for patch in unabsorbed if patch not in nearest]
    if selection.merges_remaining:
        tokens.append(mean_of(unabsorbed or selection.rest))
    return np.array(tokens).reshape(len(tokens), num_patches)


# ------------------------------------------------------------------------------------------------------------ helpers


def recover(visual, keys, text=None, has_question=None, valid=None, merging=None, **selection_settings):
    """Selection, assembly and the weights of every token over the patches [B, K, N]."""
    selection = select_tokens(visual, text, has_question, valid, **{**LOF, **selection_settings})
    assembly = assemble_tokens(
        selection,
        visual,
        keys,
        text,
        has_question,
        valid,
        num_tokens=int(selection.num_tokens.max()),
        num_merged=int(selection.num_merged.max()),
        **{"merge_neighbors": 4, "text_merge_weight": 2.0, **(merging or {})},
    )
    num_patches = visual.shape[1]
    weights = gather_tokens(torch.eye(num_patches).expand(len(visual), -1, -1), assembly)
    return selection, assembly, weights


def scene(seed, batch_size=4, num_patches=60, channels=8):
    generator = torch.Generator().manual_seed(seed)
    visual = (2.5 * torch.randn(batch_size, num_patches, generator=generator)).softmax(1)
    # Relevance of most patches is alike, that of a few stands out.
    text = 0.05 * torch.randn(batch_size, num_patches, generator=generator)
    text = text + (torch.rand(batch_size, num_patches, generator=generator) > 0.85) * torch.rand(
        batch_size, num_patches, generator=generator
    )
    keys = torch.randn(batch_size, num_patches, channels, generator=generator)
    return visual, text, keys


def indices(mask):
    return mask.nonzero().flatten().tolist()


def assert_selection_equals_slow_version(visual, text, has_question=None, valid=None, **selection_settings):
    selection_settings = {**LOF, **selection_settings}
    selection = select_tokens(visual, text, has_question, valid, **selection_settings)
    slow_rows = []
    for row in range(len(visual)):
        slow = slow_selection(
            visual[row].tolist(),
            None if text is None else text[row].tolist(),
            has_question is None or bool(has_question[row]),
            None if valid is None else valid[row].tolist(),
            **selection_settings,
        )
        assert indices(selection.chosen_by_vision[row]) == slow.kept
        assert indices(selection.chosen_by_text[row]) == slow.recovered
        assert indices(selection.merge_centres[row]) == slow.centres
        assert bool(selection.merges_remaining[row]) == slow.merges_remaining
        counts = [selection.num_visual[row], selection.num_text[row], selection.num_merged[row]]
        assert [int(count) for count in counts] == slow.counts
        assert int(selection.num_tokens[row]) == sum(slow.counts)
        slow_rows.append(slow)
    return selection, slow_rows


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


# -------------------------------------------------------------------------------------------- against the slow version


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


def test_every_step_has_something_to_do():
    """The comparison above would be empty on inputs that keep, recover or merge nothing."""
    visual, text, keys = scene(0)
    selection, _, _ = recover(visual, keys, text)
    for count in (selection.num_visual, selection.num_text, selection.num_merged - selection.merges_remaining.long()):
        assert (count >= 1).all() and (count < 30).all()
    assert selection.merges_remaining.all()
    assert (selection.num_tokens < 40).all()


def test_default_settings_at_full_size():
    visual, text, keys = scene(7, batch_size=2, num_patches=576, channels=16)
    defaults = {"visual_lof_neighbors": 20, "text_lof_neighbors": 20, "merge_lof_neighbors": 10}
    selection = assert_equals_slow_version(
        visual, text, keys, merging={"merge_neighbors": 32, "text_merge_weight": 50.0}, **defaults
    )
    same = select_tokens(visual, text)
    for name in ("chosen_by_vision", "chosen_by_text", "merge_centres"):
        assert torch.equal(getattr(same, name), getattr(selection, name))


# --------------------------------------------------------------------------------------------------------- properties


# Ties, constants and values that are no numbers are the rule here, not the exception.
score_kinds = ("normal", "softmax", "grid", "constant", "one", "zeros and ones", "nan", "infinite", "all nan")


@st.composite
def cases(draw):
    batch_size, num_patches = draw(st.integers(1, 8)), draw(st.integers(8, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def scores(kind):
        normal = torch.randn(batch_size, num_patches, generator=generator)
        uniform = torch.rand(batch_size, num_patches, generator=generator)
        return {
            "normal": normal,
            "softmax": (4 * normal).softmax(1),
            "grid": (2 * normal).round() / 4,
            "constant": torch.full_like(normal, 0.5),
            "one": (uniform == uniform.amax(1, keepdim=True)).float(),
            "zeros and ones": (uniform > 0.8).float(),
            "nan": torch.where(uniform > 0.8, torch.nan, normal),
            "infinite": torch.where(uniform > 0.9, torch.inf, torch.where(uniform < 0.1, -torch.inf, normal)),
            "all nan": torch.full_like(normal, torch.nan),
        }[kind]

    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    valid = None
    if draw(st.booleans()):
        valid = torch.rand(batch_size, num_patches, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    has_question = None
    if draw(st.booleans()):
        has_question = torch.rand(batch_size, generator=generator) < 0.5
    minimum = draw(st.integers(1, num_patches))
    limits = {
        "adaptive": {"min_visual_tokens": minimum},
        "limited": {"min_visual_tokens": minimum, "max_visual_tokens": draw(st.integers(minimum, num_patches + 5))},
        "fixed": {"visual_token_budget": draw(st.integers(1, num_patches))},
    }[draw(st.sampled_from(["adaptive", "limited", "fixed"]))]
    neighbors = st.integers(1, num_patches - 1)
    return SimpleNamespace(
        visual=scores(draw(st.sampled_from(score_kinds))).to(dtype),
        text=scores(draw(st.sampled_from(score_kinds))).to(dtype) if draw(st.booleans()) else None,
        keys=torch.randn(batch_size, num_patches, 4, generator=generator).to(dtype),
        has_question=has_question,
        valid=valid,
        settings={
            **limits,
            "visual_lof_neighbors": draw(neighbors),
            "text_lof_neighbors": draw(neighbors),
            "merge_lof_neighbors": draw(neighbors),
            "lof_threshold": draw(st.sampled_from([1.0, 1.5, 2.5])),
            "merge_remaining": draw(st.booleans()),
        },
        merging={
            "merge_neighbors": draw(st.sampled_from([0, 1, 4, 100])),
            "text_merge_weight": draw(st.sampled_from([0.0, 1.0, 50.0])),
        },
    )


def run_case(case, rows=slice(None)):
    def of(tensor):
        return None if tensor is None else tensor[rows]

    return recover(
        of(case.visual),
        of(case.keys),
        of(case.text),
        of(case.has_question),
        of(case.valid),
        merging=case.merging,
        **case.settings,
    )


@settings(max_examples=4000, deadline=None, derandomize=True)
@given(cases())
def test_any_result_is_well_formed(case):
    tensors = (case.visual, case.text, case.keys, case.has_question, case.valid)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    selection, assembly, weights = run_case(case)
    for tensor, copy in zip(tensors, before):
        assert tensor is None or torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True)

    valid = torch.ones_like(case.visual, dtype=torch.bool) if case.valid is None else case.valid
    num_valid = valid.sum(1)
    visual, text, centres = selection.chosen_by_vision, selection.chosen_by_text, selection.merge_centres
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

    # Tokens: kept patches in raster order as they are, then means; nothing behind an image's last token.
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


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(cases())
def test_any_selection_equals_the_slow_version(case):
    text = None if case.text is None else case.text.float()
    assert_selection_equals_slow_version(case.visual.float(), text, case.has_question, case.valid, **case.settings)


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
def test_permuting_patches_permutes_masks_and_tokens(settings):
    for seed in range(10):
        visual, text, keys = scene(seed)
        order = torch.randperm(visual.shape[1], generator=torch.Generator().manual_seed(seed))
        selection, _, weights = recover(visual, keys, text, **settings)
        moved, _, moved_weights = recover(visual[:, order], keys[:, order], text[:, order], **settings)
        for name in ("chosen_by_vision", "chosen_by_text", "merge_centres"):
            assert torch.equal(getattr(selection, name)[:, order], getattr(moved, name)), name
        for row, moved_row in zip(weights[:, :, order], moved_weights):
            # The same tokens, in the new raster order.
            torch.testing.assert_close(_sorted_rows(row), _sorted_rows(moved_row), atol=1e-6, rtol=0)


def _sorted_rows(matrix):
    code = matrix.double() @ torch.arange(1, matrix.shape[1] + 1, dtype=torch.float64).sqrt()
    return matrix[code.argsort()]


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


def test_a_patch_that_stands_out_by_relevance_is_recovered():
    """What the method is for: class attention passes it over, the question asks for it."""
    visual, text, keys = scene(5)
    passed_over = visual.argsort(1)[:, 20:24]
    text = torch.zeros_like(text) + 1e-3 * torch.arange(60) / 60
    text = text.scatter(1, passed_over, 1.0 + torch.arange(4).expand(4, -1) / 7)
    selection, _, _ = recover(visual, keys, text)
    without, _, _ = recover(visual, keys)
    assert not without.chosen_by_vision.gather(1, passed_over).any()
    assert selection.chosen_by_text.gather(1, passed_over[:, -1:]).all()
    assert torch.equal(selection.chosen_by_vision, without.chosen_by_vision)


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
    assert torch.equal(_sorted_rows(weights[0]), _sorted_rows(torch.eye(60)))


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
        selection = select_tokens(visual, text, visual_token_budget=64)
        assemble_tokens(selection, visual, keys, text, num_tokens=64, num_merged=64)
    assert largest.num_elements <= max(4 * 2880 * 21, 64 * 2880)
    assert largest.num_elements < 2880 * 2880 / 10


# ------------------------------------------------------------------------------------------------------------- errors


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
        select_tokens(visual, text, **{**LOF, **settings})


@pytest.mark.parametrize("name", ["text_scores", "valid"])
def test_shapes_that_disagree_are_errors(name):
    visual, _, _ = scene(17)
    with pytest.raises(ValueError, match=rf"{name} has shape \(4, 59\), but visual_scores \(4, 60\)"):
        select_tokens(visual, **{name: torch.ones(4, 59, dtype=torch.bool)}, **LOF)
