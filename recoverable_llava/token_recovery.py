"""Recoverable compression: which patches of an image become visual tokens. The whole method, top to bottom.

Source: Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information"
(arXiv 2409.01179, AAAI 2025), section "Method". Training-free:

    1. visual filter          as many patches as the class attention has outliers stay, by class attention;
    2. text-guided recovery   patches that the question needs come back, by relevance to the question;
    3. merging                the rest is merged into a few tokens, by nearest neighbours;
    4. assembly               all of them in raster order, merged tokens last.

Every step is a pure function of tensors for a whole batch: ragged results are boolean masks [B, N], no step loops over
images, patches or centres, and nothing is copied to the host. The one number that a caller in adaptive mode needs on
the host, the longest image's token count, is part of the result.

Where this parts from the paper's released code: docs/deviations.md.

B images, N patches, C channels, K kept tokens, M merged tokens.
"""

from dataclasses import dataclass

import torch

from .local_outlier_factor import local_outlier_factor


# Chosen on validation data (docs/ablations.md). How fast likeness falls with distance, as a share of the image's mean
# distance between patches:
LIKENESS_WIDTH = 0.03
# The power of each kind of score, counted from the image's lowest. Class attention, a softmax, falls off steeply and is
# flattened; relevance, a cosine, hardly tells patches apart and is sharpened.
ATTENTION_POWER = 0.5
RELEVANCE_POWER = 1.5
OWN_RELEVANCE = 1e-3  # of a patch, added to what is lent to it
SMALLEST = 1e-6  # an added score, where all are equal; a mean distance, where there is none


@dataclass(frozen=True)
class Selection:
    """Which patches stay, which come back, and which become centres of merged tokens.

    The three masks are disjoint. `num_tokens` is their sum plus one for the remaining token, where there is one.
    """

    kept_by_vision: torch.Tensor  # [B, N] bool
    recovered_by_text: torch.Tensor  # [B, N] bool
    merge_centres: torch.Tensor  # [B, N] bool
    merges_remaining: torch.Tensor  # [B] bool: one more token stands for the patches that no centre absorbs
    num_visual: torch.Tensor  # [B] long
    num_text: torch.Tensor  # [B] long
    num_merged: torch.Tensor  # [B] long, the remaining token included
    num_tokens: torch.Tensor  # [B] long


@dataclass(frozen=True)
class Assembly:
    """How the kept tokens are made of patches: `tokens = gather([patches, merge_weights @ patches], token_index)`."""

    merge_weights: torch.Tensor  # [B, M, N] float32, each row a weighted mean over patches (or zero where unused)
    token_index: torch.Tensor  # [B, K] long into the N patches followed by the M merged tokens
    token_mask: torch.Tensor  # [B, K] bool: False where an image has fewer than K tokens


def select_tokens(
    visual_scores: torch.Tensor,
    text_scores: torch.Tensor | None = None,
    has_question: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
    *,
    grid_width: int | None = None,
    novelty_threshold: float = 0.175,
    text_share: float = 0.9,
    text_reach: float = 0.8,
    visual_lof_neighbors: int = 20,
    text_lof_neighbors: int = 20,
    merge_lof_neighbors: int = 10,
    lof_threshold: float = 1.5,
    merge_centres: bool = True,
    merge_remaining: bool = True,
    min_visual_tokens: int = 1,
    max_visual_tokens: int | None = None,
    visual_token_budget: int | None = None,
) -> Selection:
    """Steps 1 to 3: how many tokens each step is due, and which patches they are.

    Without `features` this is the paper: outliers of the scores count, and the highest scores stay. With them, a
    patch's importance is its score and that of its near copies, for which its token will stand; and importance is
    weighed by novelty, the distance to the nearest more important patch, so that no second token is spent on a near
    copy. The patches that are novel enough count. What a question asks for often stands beside what it names, so
    relevance reaches the patches around.

    Args:
        visual_scores: [B, N] class attention of each patch. Scores that are NaN or infinite count as the lowest.
        text_scores: [B, N] relevance of each patch to the question; None leaves step 2 out.
        has_question: [B] bool; False leaves step 2 out for that image. None means all True.
        valid: [B, N] bool; False for patches that hold no picture (padding of tiled models). None means all True.
        features: [B, N, C] whose cosine distances tell how much two patches differ; None for the paper's selection.
        grid_width: patches in a row of the image; None for patches without neighbours.
        novelty_threshold: with features, a patch counts when its novelty is above this share of the mean distance.
        text_share: with features, the share of the counted tokens that the question chooses.
        text_reach: with features, the share of its relevance that a patch lends the eight around it.
        visual_lof_neighbors, text_lof_neighbors, merge_lof_neighbors: neighbours of the Local Outlier Factor.
        lof_threshold: a score is an outlier when its Local Outlier Factor is above this.
        merge_centres: merge left-over patches around centres, as many as their class attention has outliers.
        merge_remaining: one more token for the patches that no centre absorbs.
        min_visual_tokens: the visual filter, or with features both steps together, keep at least this many (or all
            valid patches, if fewer).
        max_visual_tokens: upper bound of an image's tokens; the three kinds shrink in proportion.
        visual_token_budget: exact number of an image's tokens, split among the kinds in proportion to what each asks
            for; without centres the rest stays one token. Every image must have at least this many valid patches.

    Raises:
        ValueError: if shapes disagree, or a budget, a bound or the width of a row does not fit into N.
    """
    num_patches = visual_scores.shape[-1]
    if grid_width is not None and (grid_width < 1 or num_patches % grid_width):
        raise ValueError(f"grid_width must divide the number of patches ({num_patches}), got {grid_width}.")
    for name, scores in {"text_scores": text_scores, "valid": valid}.items():
        if scores is not None and scores.shape != visual_scores.shape:
            raise ValueError(
                f"{name} has shape {tuple(scores.shape)}, but visual_scores {tuple(visual_scores.shape)}: pass one "
                "value per patch of each image."
            )
    for name, limit in {"visual_token_budget": visual_token_budget, "max_visual_tokens": max_visual_tokens}.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}.")
    if visual_token_budget is not None and visual_token_budget > num_patches:
        raise ValueError(
            f"visual_token_budget ({visual_token_budget}) is larger than the number of patches of an image "
            f"({num_patches}): lower it, or switch compression off."
        )
    all_patches = torch.full_like(visual_scores[:, 0], num_patches, dtype=torch.long)
    num_valid = all_patches if valid is None else valid.sum(1)
    # Both kinds of scores at once, [B, 1 or 2, N].
    scores = visual_scores[:, None] if text_scores is None else torch.stack([visual_scores, text_scores], dim=1)
    scores = _lowest_where_not_finite(scores, valid)
    if features is not None:
        distance = _cosine_distance(features)  # [B, N, N]
        mean_distance = _mean_distance(distance, valid)  # [B]
        scores = _importance(_contrasted(scores, valid, grid_width, text_reach), distance, mean_distance)
    visual_scores, text_scores = scores[:, 0], None if text_scores is None else scores[:, 1]
    # By novelty, a budget alone says how many patches stay; only centres would have to be counted first.
    is_shared_at_once = features is not None and visual_token_budget is not None and not merge_centres

    # Step 1, visual filter: as many patches as there are outliers (in both tails) of the class attention; by novelty,
    # vision's share of the patches that are novel enough.
    if features is None:
        num_kept = None
        num_visual = _num_outliers(visual_scores, valid, visual_lof_neighbors, lof_threshold)
        num_visual = num_visual.clamp(min=min_visual_tokens).minimum(num_valid)
        by_vision = _descending(_last_where_not(valid, visual_scores))
    else:
        novelty = _novelty(visual_scores, distance, valid)
        if visual_token_budget is not None and is_shared_at_once:
            merge_remaining = merge_remaining and 1 < visual_token_budget < num_patches
            num_kept = torch.full_like(num_valid, visual_token_budget - merge_remaining)
        else:
            is_novel = _last_where_not(valid, novelty) > novelty_threshold * mean_distance[:, None]
            num_kept = is_novel.sum(1).clamp(min=min_visual_tokens).minimum(num_valid)
        num_visual = num_kept
        if text_scores is not None:
            for_text = (text_share * num_kept).long()
            num_visual = num_kept - (for_text if has_question is None else for_text * has_question)
        by_vision = _descending(_last_where_not(valid, visual_scores * novelty))

    # Step 2, text-guided recovery: kept patches drop to the lowest relevance, and the share of outliers of what results
    # is the share of the other patches to recover; or, by novelty, the question's share of the novel patches.
    if text_scores is None:
        num_text = torch.zeros_like(num_visual)
    elif num_kept is None:
        lowest = _lowest(text_scores[:, None], valid)[:, 0]
        unmet = torch.where(_first(by_vision, num_visual), lowest, text_scores)
        outliers = _num_outliers(unmet, valid, text_lof_neighbors, lof_threshold)
        num_text = outliers * (num_valid - num_visual) // num_valid.clamp(min=1)
        num_text = num_text if has_question is None else num_text * has_question
    else:
        num_text = num_kept - num_visual

    def choose(num_visual: torch.Tensor, num_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of what steps 1 and 2 keep and recover, and of what they leave over."""
        kept = _first(by_vision, num_visual)
        others = ~kept if valid is None else valid & ~kept
        if text_scores is None:
            return kept, torch.zeros_like(kept), others
        priority = text_scores
        if features is not None:
            novelty = _novelty(text_scores.masked_fill(kept, torch.inf), distance, valid)
            priority = text_scores * novelty
        recovered = _first(_descending(_last_where_not(others, priority)), num_text)
        return kept, recovered, others & ~recovered

    # Step 3, merging: as many centres as there are outliers among the class attention of the patches left over, if any
    # are wanted, and one token for what they leave.
    if merge_centres:
        chosen = choose(num_visual, num_text)
        num_centres = _num_outliers(visual_scores, chosen[2], merge_lof_neighbors, lof_threshold)
        merges_remaining = (num_centres < num_valid - num_visual - num_text) & merge_remaining
        num_merged = num_centres + merges_remaining
    else:
        merges_remaining = (num_visual + num_text < num_valid) & merge_remaining
        num_merged = merges_remaining.long()

    # Budget: with an exact or a largest number of tokens, the kinds share it in proportion to what was asked for.
    is_shared = (visual_token_budget is not None or max_visual_tokens is not None) and not is_shared_at_once
    if is_shared:
        total = num_valid if visual_token_budget is not None else num_visual + num_text + num_merged
        total = total.clamp(max=max_visual_tokens if visual_token_budget is None else visual_token_budget)
        if not merge_centres:  # the rest is one token, however large the budget
            num_merged = num_merged.minimum(total - 1)
            asked = torch.stack([num_visual, num_text], dim=1)
            num_visual, num_text = _apportion(asked, total - num_merged).unbind(1)
        else:
            asked = torch.stack([num_visual, num_text, num_merged], dim=1)
            num_visual, num_text, num_merged = _apportion(asked, total).unbind(1)
        merges_remaining = (num_merged > 0) & (num_merged < num_valid - num_visual - num_text) & merge_remaining

    # Which patches these are.
    if is_shared or not merge_centres:
        chosen = choose(num_visual, num_text)
    kept_by_vision, recovered_by_text, left_over = chosen
    if merge_centres:
        by_attention = _descending(_last_where_not(left_over, visual_scores))
        centres = _first(by_attention, num_merged - merges_remaining.long())
    else:
        centres = torch.zeros_like(left_over)

    return Selection(
        kept_by_vision=kept_by_vision,
        recovered_by_text=recovered_by_text,
        merge_centres=centres,
        merges_remaining=merges_remaining,
        num_visual=num_visual,
        num_text=num_text,
        num_merged=num_merged,
        num_tokens=num_visual + num_text + num_merged,
    )


def assemble_tokens(
    selection: Selection,
    visual_scores: torch.Tensor,
    keys: torch.Tensor,
    text_scores: torch.Tensor | None = None,
    has_question: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    *,
    num_tokens: int,
    num_merged: int,
    merge_centres: bool = True,
    merge_neighbors: int = 32,
    text_merge_weight: float = 50.0,
) -> Assembly:
    """Steps 3 and 4: what each merged token is made of, and the order of all tokens.

    A centre absorbs the `merge_neighbors` left-over patches that are nearest to it, by cosine similarity of the keys
    less `text_merge_weight` times the difference in relevance to the question. A patch may be absorbed by several
    centres. The merged token is the mean of the centre and what it absorbed, weighted by class attention, so that it
    stays on the scale of a real token. What no centre absorbs becomes the remaining token (all left-over patches, in
    case the centres absorb every one).

    Args:
        selection: of the same images, from `select_tokens`.
        visual_scores, text_scores, has_question, valid: as given to `select_tokens`.
        keys: [B, N, C] attention keys of the patches.
        num_tokens, num_merged: K and M, at least the largest `selection.num_tokens` and `selection.num_merged`.
        merge_centres: False if the selection was made without centres: then there are no neighbours to look for.
        merge_neighbors: how many patches a centre absorbs.
        text_merge_weight: weight of the difference in relevance.
    """
    num_patches = visual_scores.shape[1]
    kept = selection.kept_by_vision | selection.recovered_by_text
    absorbable = ~(kept | selection.merge_centres)
    if valid is not None:
        absorbable = absorbable & valid

    # Step 3: one row of weights per centre, centres in raster order, and then one for what they leave.
    slot = torch.arange(num_merged, device=keys.device)
    num_centres = selection.merge_centres.sum(1, keepdim=True) if merge_centres else 0
    is_remaining = (slot == num_centres) & selection.merges_remaining[:, None]  # [B, M]
    if merge_centres:
        is_centre = slot < num_centres
        centre = _first_true(selection.merge_centres, num_merged)  # [B, M]
        keys = torch.nn.functional.normalize(keys.float(), dim=-1)
        affinity = keys.gather(1, centre[:, :, None].expand(-1, -1, keys.shape[-1])) @ keys.transpose(1, 2)  # [B, M, N]
        if text_scores is not None:
            text_scores = _lowest_where_not_finite(text_scores[:, None], valid)[:, 0]
            if has_question is not None:
                text_scores = text_scores * has_question[:, None]
            difference = (text_scores.gather(1, centre)[:, :, None] - text_scores[:, None, :]).abs()
            affinity = affinity - text_merge_weight * difference
        affinity = affinity.masked_fill(~absorbable[:, None, :], -torch.inf)
        nearest = affinity.topk(min(merge_neighbors, num_patches)).indices
        absorbed = torch.zeros_like(affinity, dtype=torch.bool).scatter_(2, nearest, True)
        absorbed = absorbed & absorbable[:, None, :] & is_centre[:, :, None]
        absorbed = absorbed.scatter_(2, centre[:, :, None], is_centre[:, :, None])  # and itself
        unabsorbed = absorbable & ~absorbed.any(1)
        unabsorbed = torch.where(unabsorbed.any(1, keepdim=True), unabsorbed, absorbable)
        members = absorbed | (is_remaining[:, :, None] & unabsorbed[:, None, :])  # [B, M, N]
        is_merged = is_centre | is_remaining
    else:
        members = is_remaining[:, :, None] & absorbable[:, None, :]
        is_merged = is_remaining
    smallest = torch.finfo(torch.float32).tiny
    attention = visual_scores.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=smallest)
    weights = members * attention[:, None]
    merge_weights = weights / weights.sum(2, keepdim=True).clamp(min=smallest)

    # Step 4: kept patches in raster order, then the merged tokens.
    exists = torch.cat([kept, is_merged], dim=1)
    return Assembly(
        merge_weights=merge_weights,
        token_index=_first_true(exists, num_tokens),
        token_mask=torch.arange(num_tokens, device=keys.device) < selection.num_tokens[:, None],
    )


def gather_tokens(patches: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """The kept tokens [B, K, C] of the patches [B, N, C]; zero where `assembly.token_mask` is False."""
    merged = assembly.merge_weights.to(patches.dtype) @ patches
    index = assembly.token_index[:, :, None].expand(-1, -1, patches.shape[-1])
    tokens = torch.cat([patches, merged], dim=1).gather(1, index)
    return tokens.masked_fill(~assembly.token_mask[:, :, None], 0)


def _lowest_where_not_finite(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Scores [B, kinds, N] with the row's lowest valid score (0 if there is none) for NaN and infinity."""
    scores = scores.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    return torch.where(scores < torch.inf, scores, _lowest(scores, valid).nan_to_num(posinf=0.0))


def _lowest(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, kinds, 1] lowest valid score of each row of [B, kinds, N]; infinity if there is none."""
    scores = scores if valid is None else scores.masked_fill(~valid[:, None], torch.inf)
    return scores.amin(2, keepdim=True)


def _last_where_not(mask: torch.Tensor | None, priority: torch.Tensor) -> torch.Tensor:
    """The priority [B, N], below everything where the mask is False."""
    return priority if mask is None else priority.masked_fill(~mask, -torch.inf)


def _num_outliers(
    scores: torch.Tensor, valid: torch.Tensor | None, num_neighbors: int, threshold: float
) -> torch.Tensor:
    """[B] number of valid scores whose Local Outlier Factor is above the threshold."""
    return (local_outlier_factor(scores, num_neighbors, valid) > threshold).sum(1)


def _cosine_distance(features: torch.Tensor) -> torch.Tensor:
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


def _mean_distance(distance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B] mean of the distances [B, N, N] between valid patches; never 0, so that it can be divided by."""
    if valid is None:
        return distance.mean((1, 2)).clamp(min=SMALLEST)
    weight = valid.to(distance.dtype)
    total = (distance @ weight[:, :, None]).squeeze(2).mul(weight).sum(1)
    return (total / weight.sum(1).square().clamp(min=1)).clamp(min=SMALLEST)


def _contrasted(
    scores: torch.Tensor, valid: torch.Tensor | None, grid_width: int | None, text_reach: float
) -> torch.Tensor:
    """[B, kinds, N] above the lowest: class attention flattened, relevance sharpened and lent to those around."""
    scores = scores - _lowest(scores, valid)
    outside = None if valid is None else ~valid[:, None]
    scores = scores if outside is None else scores.masked_fill(outside, 0)
    contrasted = scores[:, :1] ** ATTENTION_POWER
    if scores.shape[1] > 1:
        text = scores[:, 1:] ** RELEVANCE_POWER
        if grid_width is not None:
            around = torch.nn.functional.max_pool2d(text.unflatten(2, (-1, grid_width)), 3, stride=1, padding=1)
            # Its own relevance tells apart the patches to which the same one lends.
            text = torch.maximum(text, text_reach * around.flatten(2)).add(text, alpha=OWN_RELEVANCE)
        contrasted = torch.cat([contrasted, text], dim=1)
    contrasted = contrasted + SMALLEST
    return contrasted if outside is None else contrasted.masked_fill(outside, 0)


def _importance(scores: torch.Tensor, distance: torch.Tensor, mean_distance: torch.Tensor) -> torch.Tensor:
    """[B, kinds, N] each score times the root of what its patch's likes score in all: one token will stand for them.

    A patch is wholly like its copies, and less with distance [B, N, N], of which `mean_distance` [B] is the mean.
    """
    likeness = torch.exp(distance / (-LIKENESS_WIDTH * mean_distance)[:, None, None])
    return scores * (scores @ likeness).sqrt()


def _novelty(scores: torch.Tensor, distance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, N] distance of each patch to the nearest valid one with a higher score; 2, the largest, for the best.

    With the importance, this finds density peaks (Rodriguez & Laio, Science 2014) without choosing them one by one.
    """
    order = _descending(_last_where_not(valid, scores))
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    # No invalid patch ranks before a valid one.
    return distance.masked_fill(rank[:, None, :] >= rank[:, :, None], 2.0).amin(2)


def _descending(scores: torch.Tensor) -> torch.Tensor:
    """[B, N] indices of the scores from the highest to the lowest; the first of equal ones first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def _first(order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[B, N] mask of the first `count` [B] patches in the order `order` [B, N] of indices."""
    is_first = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.empty_like(is_first).scatter_(1, order, is_first)


def _first_true(mask: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count] indices of the True entries of each row, in order; rows with fewer go on with indices of False."""
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def _apportion(asked: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Split `total` [B] tokens in proportion to `asked` [B, kinds], exactly, by largest remainders."""
    product = asked * total[:, None]
    whole = asked.sum(1, keepdim=True).clamp(min=1)
    shares, remainders = product // whole, product % whole
    left = total[:, None] - shares.sum(1, keepdim=True)
    by_remainder = remainders.argsort(dim=1, descending=True, stable=True)
    extra = (torch.arange(asked.shape[1], device=asked.device) < left).to(shares.dtype)
    return shares + torch.empty_like(shares).scatter_(1, by_remainder, extra)
