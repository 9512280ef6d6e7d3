"""The default selection, this project's own: patches that are important and unlike every more important one.

The paper counts outliers of a score and keeps the highest (paper_selection.py). Two patches of one object then both
stay, and so do ten patches of sky. Here a patch is weighed by what its token would add:

    contrast     scores of both kinds are stretched: class attention flattened, relevance sharpened and lent to the
                 patches around, since an answer often stands beside what the question names;
    importance   a patch's score times the root of what its near copies score together: one token stands for them all;
    novelty      the distance to the nearest patch of higher importance: a near copy of a better patch adds nothing.

Patches that are novel enough count. The question chooses its share of that number, class attention the rest, each by
importance times novelty; one more token is the mean of what is left. Importance and novelty together are the density
peaks of Rodriguez & Laio (Science 2014), found without choosing one by one. Settings: docs/ablations.md.

Pure functions of tensors for a whole batch, no loop over images or patches, nothing is copied to the host.

B images, N patches, C channels; "kinds" are the kinds of scores, class attention and (with a question) relevance.
"""

from collections.abc import Callable

import torch

from .selection import (
    Selection,
    check_scores,
    descending,
    finite,
    first,
    highest,
    last_where_not,
    lowest,
    number_of_valid,
)


# How fast likeness falls with distance, as a share of the image's mean distance between patches.
LIKENESS_WIDTH = 0.03
# The power of each kind of score, counted from the image's lowest. Class attention, a softmax, falls off steeply and is
# flattened; relevance, a cosine, hardly tells patches apart and is sharpened.
ATTENTION_POWER = 0.5
RELEVANCE_POWER = 1.5
OWN_RELEVANCE = 1e-3  # of a patch, added to what is lent to it, so that the patches it lends to are told apart
SMALLEST = 1e-6  # an added score, where all are equal; a mean distance, where there is none


def highest_around(grid_width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives each patch of [B, kinds, N] the highest value among itself and the eight around it."""

    def of(values: torch.Tensor) -> torch.Tensor:
        if grid_width < 1 or values.shape[2] % grid_width:
            raise ValueError(f"grid_width must divide the number of patches ({values.shape[2]}), got {grid_width}.")
        grid = values.unflatten(2, (-1, grid_width))
        return torch.nn.functional.max_pool2d(grid, 3, stride=1, padding=1).flatten(2)

    return of


def contrast(
    scores: torch.Tensor,
    valid: torch.Tensor | None,
    around: Callable[[torch.Tensor], torch.Tensor] | None,
    text_reach: float,
    attention_power: float = ATTENTION_POWER,
    relevance_power: float = RELEVANCE_POWER,
) -> torch.Tensor:
    """[B, kinds, N] non-negative scores of which differences count.

    attention_i = (a_i - min a) ** attention_power
    own_i       = (r_i - min r) ** relevance_power
    relevance_i = max(own_i, text_reach * max of own around i) + 0.001 own_i
    """
    scores = scores - lowest(scores, valid)
    outside = None if valid is None else ~valid[:, None]
    scores = scores if outside is None else scores.masked_fill(outside, 0)
    contrasted = scores[:, :1] ** attention_power
    if scores.shape[1] > 1:
        text = scores[:, 1:] ** relevance_power
        if around is not None:
            text = torch.maximum(text, text_reach * around(text)).add(text, alpha=OWN_RELEVANCE)
        contrasted = torch.cat([contrasted, text], dim=1)
    contrasted = contrasted + SMALLEST
    return contrasted if outside is None else contrasted.masked_fill(outside, 0)


def cosine_distance(features: torch.Tensor) -> torch.Tensor:
    """[B, N, N] float32, one minus the cosine between the features [B, N, C] of every two patches.

    The product of all pairs is most of the selector's work. For features in half precision it is taken in float16, on
    tensor cores where there are some: unit vectors do not overflow, and bfloat16's 8 bits would blur near copies.
    """
    is_half = features.dtype.itemsize == 2
    features = features.nan_to_num(0, 0, 0)
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True, dtype=torch.float32 if is_half else None)
    directions = features / length.clamp(min=torch.finfo(torch.float32).tiny)
    directions = directions.to(torch.float16 if is_half else torch.float32)
    return 1 - (directions @ directions.transpose(1, 2)).float()


def mean_distance(distance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B] mean of the distances [B, N, N] between valid patches; never 0, so that it can be divided by."""
    if valid is None:
        return distance.mean((1, 2)).clamp(min=SMALLEST)
    weight = valid.to(distance.dtype)
    total = (distance @ weight[:, :, None]).squeeze(2).mul(weight).sum(1)
    return (total / weight.sum(1).square().clamp(min=1)).clamp(min=SMALLEST)


def importance(
    scores: torch.Tensor, distance: torch.Tensor, mean: torch.Tensor, likeness_width: float = LIKENESS_WIDTH
) -> torch.Tensor:
    """[B, kinds, N] each score times the root of what the patch's near copies score together.

        likeness_ij  = exp(-distance_ij / (likeness_width * mean))
        importance_i = score_i * sqrt(sum_j likeness_ij * score_j)

    Args:
        scores: [B, kinds, N].
        distance: [B, N, N].
        mean: [B] its mean.
    """
    likeness = torch.exp(distance / (-likeness_width * mean)[:, None, None])
    return scores * (scores @ likeness).sqrt()


def novelty(importances: torch.Tensor, distance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, N] distance of each patch to the nearest valid one of higher importance; 2, the largest, for the first."""
    order = descending(last_where_not(valid, importances))
    place = torch.arange(importances.shape[1], device=importances.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    # No invalid patch ranks before a valid one.
    return distance.masked_fill(rank[:, None, :] >= rank[:, :, None], 2.0).amin(2)


def select_by_novelty(
    visual_scores: torch.Tensor,
    distance: torch.Tensor,
    text_scores: torch.Tensor | None = None,
    has_question: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    *,
    around: Callable[[torch.Tensor], torch.Tensor] | None = None,
    novelty_threshold: float = 0.175,
    text_share: float = 0.9,
    text_reach: float = 0.8,
    merge_remaining: bool = True,
    min_visual_tokens: int = 1,
    max_visual_tokens: int | None = None,
    visual_token_budget: int | None = None,
    contrast: Callable[..., torch.Tensor] = contrast,
    importance: Callable[..., torch.Tensor] = importance,
    novelty: Callable[..., torch.Tensor] = novelty,
) -> Selection:
    """As many patches as are novel enough (or the budget says), by importance times novelty.

    Args:
        visual_scores: [B, N] class attention of each patch. Scores that are NaN or infinite count as the lowest.
        distance: [B, N, N] how much every two patches differ, from `cosine_distance`.
        text_scores: [B, N] relevance of each patch to the question; None leaves all to class attention.
        has_question: [B] bool; False leaves that image to class attention. None means all True.
        valid: [B, N] bool; False for patches that hold no picture (padding of tiled models). None means all True.
        around: the highest value around each patch, see `highest_around`; None for patches without neighbours.
        novelty_threshold: a patch counts when its novelty is above this share of the mean distance.
        text_share: share of the counted patches that the question chooses.
        text_reach: share of its relevance that a patch lends those around it.
        merge_remaining: one more token, the weighted mean of the patches that are left.
        min_visual_tokens: at least this many patches stay (or all valid ones, if fewer).
        max_visual_tokens: upper bound of an image's tokens.
        visual_token_budget: exact number of an image's tokens. Every image must have at least as many valid patches.
        contrast, importance, novelty: the three measures above; ablations put others in their places.

    Raises:
        ValueError: if shapes disagree, or a budget, a bound or the width of a row does not fit into N.
    """
    check_scores(visual_scores, text_scores, valid, max_visual_tokens, visual_token_budget)
    num_valid = number_of_valid(visual_scores, valid)
    scores = visual_scores[:, None] if text_scores is None else torch.stack([visual_scores, text_scores], dim=1)
    mean = mean_distance(distance, valid)
    scores = importance(contrast(finite(scores, valid), valid, around, text_reach), distance, mean)
    by_attention = scores[:, 0]
    visual_novelty = novelty(by_attention, distance, valid)

    # How many patches stay, and whether one more token stands for the rest.
    if visual_token_budget is not None:
        merges_remaining = (num_valid > visual_token_budget) & (merge_remaining and visual_token_budget > 1)
        num_chosen = visual_token_budget - merges_remaining.long()
    else:
        is_novel = last_where_not(valid, visual_novelty) > novelty_threshold * mean[:, None]
        num_chosen = is_novel.sum(1).clamp(min=min_visual_tokens).minimum(num_valid)
        merges = merge_remaining and max_visual_tokens != 1
        if max_visual_tokens is not None:  # one of them for the rest, where not all patches can stay
            is_bounded = num_valid > max_visual_tokens
            num_chosen = num_chosen.minimum(max_visual_tokens - (is_bounded & merges).long())
        merges_remaining = (num_chosen < num_valid) & merges

    # The question's share of them; class attention chooses first, the question among what is left.
    if text_scores is None:
        by_vision = highest(last_where_not(valid, by_attention * visual_novelty), num_chosen)
        return Selection(by_vision, torch.zeros_like(by_vision), None, merges_remaining)
    num_text = (text_share * num_chosen).long()
    num_text = num_text if has_question is None else num_text * has_question
    by_vision = highest(last_where_not(valid, by_attention * visual_novelty), num_chosen - num_text)
    left = ~by_vision if valid is None else valid & ~by_vision
    by_relevance = scores[:, 1]
    text_novelty = novelty(by_relevance.masked_fill(by_vision, torch.inf), distance, valid)
    by_text = first(descending(last_where_not(left, by_relevance * text_novelty)), num_text)
    return Selection(by_vision, by_text, None, merges_remaining)
