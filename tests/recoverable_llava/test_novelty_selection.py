"""Selection weighed by novelty, against a slow version, and its properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recoverable_llava.novelty_selection import (
    ATTENTION_POWER,
    LIKENESS_WIDTH,
    OWN_RELEVANCE,
    RELEVANCE_POWER,
    SMALLEST,
    cosine_distance,
    highest_around,
)
from recoverable_llava.novelty_selection import select_by_novelty as select_by_distance
from recoverable_llava.paper_selection import select_by_outliers


pytestmark = pytest.mark.algorithm


def select_by_novelty(visual_scores, features, *given, **settings):
    return select_by_distance(visual_scores, cosine_distance(features), *given, **settings)


def slow_novelty(scores, features, valid):
    """Distance to the nearest valid patch with a higher score (an earlier one, if equal); 2 for the best."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    novelty = torch.full((len(scores),), 2.0, dtype=torch.double)
    for i in range(len(scores)):
        for j in range(len(scores)):
            is_better = scores[j] > scores[i] or (scores[j] == scores[i] and j < i)
            if valid[j] and is_better:
                novelty[i] = min(novelty[i], 1 - unit[i] @ unit[j])
    return novelty


def slow_contrast(scores, valid, power, width=None, reach=0.0):
    """Scores above the lowest, to a power, lent to the patches around."""
    low = scores[valid].min()
    given = [(scores[i] - low).item() ** power if valid[i] else 0.0 for i in range(len(scores))]
    result = list(given)
    for i in range(len(scores)):
        for j in range(len(scores)):
            is_beside = width and abs(i // width - j // width) <= 1 and abs(i % width - j % width) <= 1
            if is_beside and valid[i]:
                result[i] = max(result[i], reach * given[j])
    own = OWN_RELEVANCE if width else 0.0
    return torch.tensor([r + own * g for r, g in zip(result, given)], dtype=torch.double)


def slow_importance(scores, features, valid):
    """Score, times the root of the sum of scores over patches, each by its likeness."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    width = LIKENESS_WIDTH * slow_mean_distance(features, valid)
    above = scores + SMALLEST
    importance = torch.zeros(len(scores), dtype=torch.double)
    for i in range(len(scores)):
        for j in range(len(scores)):
            if valid[i] and valid[j]:
                importance[i] += above[j] * torch.exp(-(1 - unit[i] @ unit[j]) / width)
    return above * importance.sqrt()


def slow_mean_distance(features, valid):
    unit = torch.nn.functional.normalize(features[valid].double(), dim=-1)
    return sum(1 - a @ b for a in unit for b in unit) / len(unit) ** 2


def highest(priority, count, among):
    allowed = sorted((i for i in range(len(among)) if among[i]), key=lambda i: (-priority[i].item(), i))
    mask = torch.zeros(len(among), dtype=torch.bool)
    mask[allowed[:count]] = True
    return mask


def slow_selection(visual, text, features, valid, threshold, share, budget=None, most=None, width=None, reach=0.0):
    visual = slow_importance(slow_contrast(visual, valid, ATTENTION_POWER), features, valid)
    novelty = slow_novelty(visual, features, valid)
    novel = int((novelty[valid] > threshold * slow_mean_distance(features, valid)).sum())
    if most is not None and novel + int(novel < int(valid.sum())) > most:
        budget = most  # one token too many: as many as a budget of the bound would give
    if budget is not None:  # one of them for the rest, as long as something is left over
        novel = budget - int(1 < budget < int(valid.sum()))
    num_text = 0 if text is None else int(share * novel)
    num_visual = max(novel, 1) - num_text
    kept = highest(visual * novelty, num_visual, valid)
    recovered = torch.zeros_like(kept)
    if text is not None:
        text = slow_importance(slow_contrast(text, valid, RELEVANCE_POWER, width, reach), features, valid)
        novelty = slow_novelty(text.masked_fill(kept, float("inf")), features, valid)
        recovered = highest(text * novelty, num_text, valid & ~kept)
    return kept, recovered


def draw(seed, batch=2, patches=30, channels=6):
    generator = torch.Generator().manual_seed(seed)
    visual = torch.rand(batch, patches, generator=generator) ** 3
    text = torch.randn(batch, patches, generator=generator) * 0.1
    features = torch.randn(batch, patches, channels, generator=generator)
    valid = torch.rand(batch, patches, generator=generator) > 0.2
    return visual, text, features, valid


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limits", [{}, {"budget": 9}, {"most": 1}, {"most": 9}, {"most": 15}, {"most": 30}], ids=str)
def test_against_a_slow_version(seed, limits):
    visual, text, features, valid = draw(seed)
    valid = valid if seed % 2 else torch.ones_like(valid)
    text = text if seed % 3 else None
    threshold, share = 0.2 + 0.1 * (seed % 5), 0.25 * (seed % 4)
    width, reach = (None, 5, 6)[seed % 3], 0.3 * (seed % 4)
    selection = select_by_novelty(
        visual,
        features,
        text,
        valid=valid,
        around=None if width is None else highest_around(width),
        novelty_threshold=threshold,
        text_share=share,
        text_reach=reach,
        visual_token_budget=limits.get("budget"),
        max_visual_tokens=limits.get("most"),
    )
    assert selection.centres is None
    for row in range(len(visual)):
        of_row = visual[row], None if text is None else text[row], features[row], valid[row]
        kept, recovered = slow_selection(*of_row, threshold, share, **limits, width=width, reach=reach)
        assert torch.equal(selection.chosen_by_vision[row], kept)
        assert torch.equal(selection.chosen_by_text[row], recovered)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 4),
    patches=st.integers(12, 40),
    threshold=st.floats(0, 1.5),
    share=st.floats(0, 1),
    budget=st.none() | st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    merge=st.booleans(),
)
def test_properties(seed, batch, patches, threshold, share, budget, dtype, merge):
    visual, text, features, _ = draw(seed, batch, patches)
    visual, text, features = visual.to(dtype), text.to(dtype), features.to(dtype)
    before = visual.clone(), text.clone(), features.clone()
    run = {"novelty_threshold": threshold, "text_share": share, "visual_token_budget": budget}
    run |= {"merge_remaining": merge, "min_visual_tokens": 2 if budget is None else 1}
    selection = select_by_novelty(visual, features, text, **run)
    masks = selection.chosen_by_vision, selection.chosen_by_text
    assert not (masks[0] & masks[1]).any() and selection.centres is None
    assert torch.equal(masks[0].sum(1), selection.num_visual) and torch.equal(masks[1].sum(1), selection.num_text)
    assert torch.equal(selection.merges_remaining.long(), selection.num_merged)
    num_chosen = selection.num_visual + selection.num_text
    assert torch.equal(num_chosen + selection.merges_remaining, selection.num_tokens)
    assert not (selection.merges_remaining & (num_chosen == patches)).any()
    if not merge:
        assert not selection.merges_remaining.any()
    elif budget != 1:  # whatever is left has a part in some token
        assert (selection.merges_remaining | (num_chosen == patches)).all()
    if budget is None:
        assert (num_chosen >= 2).all()
    else:
        assert (selection.num_tokens == budget).all()
    alone = select_by_novelty(visual[:1], features[:1], text[:1], **run)
    assert torch.equal(alone.chosen_by_vision[0], masks[0][0]) and torch.equal(alone.chosen_by_text[0], masks[1][0])
    assert all(torch.equal(a, b) for a, b in zip(before, (visual, text, features)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    patches=st.integers(4, 40),
    threshold=st.sampled_from([0.0, 0.2, 0.5, 1.0]),  # at 0 every patch counts
    share=st.floats(0, 1),
    most=st.integers(1, 45),
    merge=st.booleans(),
)
def test_a_bound_gives_no_more_and_then_what_a_budget_gives(seed, patches, threshold, share, most, merge):
    visual, text, features, valid = draw(seed, 3, patches)
    valid[:, 0] = True
    run = {"valid": valid, "novelty_threshold": threshold, "text_share": share, "merge_remaining": merge}
    unbounded = select_by_novelty(visual, features, text, **run)
    bounded = select_by_novelty(visual, features, text, **run, max_visual_tokens=most)
    exact = None
    if most <= int(valid.sum(1).min()):
        exact = select_by_novelty(visual, features, text, **run, visual_token_budget=most)
    for row in range(3):
        if unbounded.num_tokens[row] <= most:
            expected = unbounded
        elif exact is None:
            continue
        else:
            expected = exact
            assert bounded.num_tokens[row] == most
        for name in ("chosen_by_vision", "chosen_by_text", "merges_remaining"):
            assert torch.equal(getattr(bounded, name)[row], getattr(expected, name)[row]), name


def test_a_copy_of_a_better_patch_is_never_chosen_before_something_new():
    features = torch.eye(12)[None].repeat(1, 2, 1)  # every patch twice
    visual = torch.linspace(1, 0.5, 24)[None]
    selection = select_by_novelty(visual, features, visual_token_budget=13)
    assert selection.chosen_by_vision[0, :12].all() and not selection.chosen_by_vision[0, 12:].any()
    plain = select_by_outliers(visual, min_visual_tokens=13)
    assert plain.chosen_by_vision[0, :13].all()


@pytest.mark.parametrize("budget", [1, 2, 29, 30])
def test_the_rest_is_one_token_whatever_the_budget(budget):
    visual, text, features, _ = draw(2)
    selection = select_by_novelty(visual, features, text, visual_token_budget=budget)
    assert selection.num_tokens.tolist() == [budget, budget]
    assert selection.num_merged.tolist() == [int(1 < budget < 30)] * 2
    assert selection.merges_remaining.tolist() == [1 < budget < 30] * 2


def test_text_recovers_what_vision_did_not_keep():
    """The one patch that answers the question is recovered, though attention ignores it."""
    visual, text, features, _ = draw(3, batch=1)
    visual[0, 7], text[0, 7] = 0.0, 2.0
    selection = select_by_novelty(visual, features, text, visual_token_budget=6)
    assert selection.chosen_by_text[0, 7]
    without = select_by_novelty(visual, features, text, torch.tensor([False]), visual_token_budget=6)
    assert not without.chosen_by_vision[0, 7] and without.num_text.item() == 0


def test_what_stands_beside_a_relevant_patch_comes_with_it():
    """A word under the object that the question names: unlike all else, and no more relevant than the background."""
    _, _, features, _ = draw(4, batch=1, patches=36, channels=64)
    visual, text = torch.rand(1, 36, generator=torch.Generator().manual_seed(0)), torch.full((1, 36), 0.1)
    text[0, 14], text[0, 20] = 1.0, 0.05  # on a grid of 6 x 6, one above the other
    visual[0, 14], visual[0, 20] = 0.0, 0.0
    run = {"features": features, "visual_token_budget": 11, "around": highest_around(6), "text_share": 1.0}
    around = [7, 8, 9, 13, 15, 19, 20, 21]
    assert select_by_novelty(visual, text_scores=text, **run).chosen_by_text[0, [14, *around]].all()
    assert not select_by_novelty(visual, text_scores=text, **run, text_reach=0.0).chosen_by_text[0, 20]
    at_the_edge = select_by_novelty(visual, text_scores=text.roll(-3, 1), **run)  # 14 is now 11, the last of its row
    assert at_the_edge.chosen_by_text[0, [4, 5, 10, 11, 16, 17]].all()
    assert not at_the_edge.chosen_by_text[0, [6, 12, 18]].all()
    with pytest.raises(ValueError, match="grid_width must divide the number of patches .36., got 5"):
        select_by_novelty(visual, text_scores=text, **{**run, "around": highest_around(5)})


def test_patches_around_one_peak_are_told_apart_by_their_own_relevance():
    """Rounding must not decide which of the eight comes first, where none of them has likes."""
    visual, text = torch.full((1, 36), 0.5), torch.zeros(1, 36)
    text[0, 14], text[0, 21], text[0, 9] = 1.0, 0.2, 0.1
    run = {"features": torch.eye(36)[None], "around": highest_around(6), "text_share": 1.0}
    for noise in (0.0, 1e-6, -1e-6):
        noisy = text + noise * torch.rand(1, 36, generator=torch.Generator().manual_seed(0))
        recovered = select_by_novelty(visual, text_scores=noisy, **run, visual_token_budget=4).chosen_by_text[0]
        assert recovered.nonzero().flatten().tolist() == [9, 14, 21]


def test_features_that_are_no_numbers_spoil_nothing_else():
    visual, text, features, _ = draw(5)
    expected = select_by_novelty(visual, features, text)
    spoiled = features.clone()
    spoiled[0] = float("nan")
    selection = select_by_novelty(visual, spoiled, text)
    assert torch.equal(selection.chosen_by_vision[1], expected.chosen_by_vision[1])
    assert selection.num_tokens[0] >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tells_near_copies_apart(dtype):
    """Each of 20 patches has a copy, the i-th turned away by a distance of 0.002 i: as many count as with float32."""
    distance = 0.002 * torch.arange(20)
    base, other = torch.eye(40)[:20], torch.eye(40)[20:]
    copies = (1 - distance)[:, None] * base + (1 - (1 - distance) ** 2).sqrt()[:, None] * other
    features = torch.cat([base, copies])[None].to(dtype)
    visual = torch.linspace(1, 0.5, 40)[None]
    for threshold in torch.linspace(0.003, 0.037, 17).tolist():
        counts = [
            select_by_novelty(visual, given, novelty_threshold=threshold).num_visual.item()
            for given in (features, features.float())
        ]
        assert counts[0] == counts[1]


def test_an_image_without_valid_patches_has_no_token():
    visual, text, features, valid = draw(6, batch=3)
    valid[1] = False
    for limits in ({}, {"min_visual_tokens": 5}, {"max_visual_tokens": 4}):
        selection = select_by_novelty(visual, features, text, valid=valid, **limits)
        assert selection.num_tokens[1] == 0 and (selection.num_tokens[[0, 2]] > 0).all()
        assert not (selection.chosen & ~valid).any()


@pytest.mark.parametrize(
    "limits",
    [{}, *({name: count} for name in ("visual_token_budget", "max_visual_tokens") for count in (1, 7, 29, 30))],
    ids=str,
)
def test_an_image_is_chosen_from_as_alone_beside_a_larger_one(limits):
    """As many patches as a budget asks for are all kept, each as itself, whatever the batch."""
    visual, text, features, _ = draw(8)
    alone = select_by_novelty(visual, features, text, **limits)
    behind = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) * 9
    valid = torch.arange(40).expand(2, -1) < 30
    visual, text = (torch.cat([scores, behind], dim=1) for scores in (visual, text))
    features = torch.cat([features, behind[:, :, None].expand(-1, -1, features.shape[2])], dim=1)
    beside = select_by_novelty(visual, features, text, valid=valid, **limits)
    assert torch.equal(beside.chosen_by_vision[:, :30], alone.chosen_by_vision)
    assert torch.equal(beside.chosen_by_text[:, :30], alone.chosen_by_text)
    assert torch.equal(beside.merges_remaining, alone.merges_remaining)
    assert not beside.chosen[:, 30:].any()


def test_the_highest_around_equals_a_loop():
    values = torch.rand(2, 2, 24, generator=torch.Generator().manual_seed(0))
    found = highest_around(6)(values)
    for i in range(24):
        beside = [j for j in range(24) if abs(i // 6 - j // 6) <= 1 and abs(i % 6 - j % 6) <= 1]
        assert torch.equal(found[:, :, i], values[:, :, beside].amax(2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"visual_token_budget": 31}, r"visual_token_budget \(31\) is larger than .* \(30\)"),
        ({"visual_token_budget": 0}, "visual_token_budget must be at least 1, got 0"),
        ({"max_visual_tokens": 0}, "max_visual_tokens must be at least 1, got 0"),
        ({"text_scores": torch.ones(2, 29)}, r"text_scores has shape \(2, 29\), but visual_scores \(2, 30\)"),
        ({"valid": torch.ones(2, 29).bool()}, r"valid has shape \(2, 29\), but visual_scores \(2, 30\)"),
        ({"around": highest_around(0), "text_scores": torch.ones(2, 30)}, "grid_width must divide .* got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_an_error(settings, message):
    visual, _, features, _ = draw(7)
    with pytest.raises(ValueError, match=message):
        select_by_novelty(visual, features, **settings)
