"""The selection as published: as many patches as the scores have outliers, by score, and merged tokens for the rest.

Source: Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information"
(arXiv 2409.01179, AAAI 2025), section "Method". Training-free:

    1. visual filter          as many patches as the class attention has outliers stay, by class attention;
    2. text-guided recovery   patches that the question needs come back, by relevance to the question;
    3. merging                the rest is merged around centres, as many as its class attention has outliers;
    4. assembly               all of them in raster order, merged tokens last (token_assembly.py).

Outliers are those of the Local Outlier Factor, in both tails. Where this parts from the paper's released code:
docs/deviations.md. Pure functions of tensors for a whole batch, no loop over images, patches or centres, nothing is
copied to the host.

B images, N patches; "kinds" are the three kinds of tokens: visual, text, merged.
"""

from collections.abc import Callable

import torch

from .local_outlier_factor import local_outlier_factor
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


def number_of_outliers(
    scores: torch.Tensor, valid: torch.Tensor | None, num_neighbors: int, threshold: float
) -> torch.Tensor:
    """[B] number of valid scores whose Local Outlier Factor is above the threshold."""
    return (local_outlier_factor(scores, num_neighbors, valid) > threshold).sum(1)


def apportion(asked: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Split `total` [B] tokens in proportion to `asked` [B, kinds], exactly, by largest remainders."""
    product = asked * total[:, None]
    whole = asked.sum(1, keepdim=True).clamp(min=1)
    shares, remainders = product // whole, product % whole
    left = total[:, None] - shares.sum(1, keepdim=True)
    by_remainder = remainders.argsort(dim=1, descending=True, stable=True)
    extra = (torch.arange(asked.shape[1], device=asked.device) < left).to(shares.dtype)
    return shares + torch.empty_like(shares).scatter_(1, by_remainder, extra)


def select_by_outliers(
    visual_scores: torch.Tensor,
    text_scores: torch.Tensor | None = None,
    has_question: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    *,
    visual_lof_neighbors: int = 20,
    text_lof_neighbors: int = 20,
    merge_lof_neighbors: int = 10,
    lof_threshold: float = 1.5,
    merge_remaining: bool = True,
    min_visual_tokens: int = 1,
    max_visual_tokens: int | None = None,
    visual_token_budget: int | None = None,
    number_of_outliers: Callable[..., torch.Tensor] = number_of_outliers,
) -> Selection:
    """Steps 1 to 3 of the paper: how many tokens each step is due, and which patches they are.

    Args:
        visual_scores: [B, N] class attention of each patch. Scores that are NaN or infinite count as the lowest.
        text_scores: [B, N] relevance of each patch to the question; None leaves step 2 out.
        has_question: [B] bool; False leaves step 2 out for that image. None means all True.
        valid: [B, N] bool; False for patches that hold no picture (padding of tiled models). None means all True.
        visual_lof_neighbors, text_lof_neighbors, merge_lof_neighbors: neighbours of the Local Outlier Factor.
        lof_threshold: a score is an outlier when its Local Outlier Factor is above this.
        merge_remaining: one more token for the patches that no centre absorbs.
        min_visual_tokens: the visual filter keeps at least this many (or all valid patches, if fewer).
        max_visual_tokens: upper bound of an image's tokens; the three kinds shrink in proportion.
        visual_token_budget: exact number of an image's tokens, split among the kinds in proportion to what each asks
            for. Every image must have at least this many valid patches.
        number_of_outliers: the count above; ablations put others in its place.

    Raises:
        ValueError: if shapes disagree, or a budget or a bound does not fit into N.
    """
    check_scores(visual_scores, text_scores, valid, max_visual_tokens, visual_token_budget)
    num_valid = number_of_valid(visual_scores, valid)
    scores = visual_scores[:, None] if text_scores is None else torch.stack([visual_scores, text_scores], dim=1)
    scores = finite(scores, valid)
    visual_scores, text_scores = scores[:, 0], None if text_scores is None else scores[:, 1]
    by_attention = descending(last_where_not(valid, visual_scores))

    def recover(kept: torch.Tensor, num_text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of what step 2 recovers beside what step 1 kept, and of what both leave over."""
        left = ~kept if valid is None else valid & ~kept
        if text_scores is None:
            return torch.zeros_like(kept), left
        recovered = highest(last_where_not(left, text_scores), num_text)
        return recovered, left & ~recovered

    # Step 1: as many as there are outliers of the class attention.
    num_visual = number_of_outliers(visual_scores, valid, visual_lof_neighbors, lof_threshold)
    num_visual = num_visual.clamp(min=min_visual_tokens).minimum(num_valid)
    kept = first(by_attention, num_visual)

    # Step 2: kept patches drop to the lowest relevance; the share of outliers of what results is the share of the
    # other patches to recover.
    num_text = torch.zeros_like(num_visual)
    if text_scores is not None:
        lowest_relevance = lowest(text_scores[:, None], valid)[:, 0]
        unmet = torch.where(kept, lowest_relevance, text_scores)
        outliers = number_of_outliers(unmet, valid, text_lof_neighbors, lof_threshold)
        num_text = outliers * (num_valid - num_visual) // num_valid.clamp(min=1)
        num_text = num_text if has_question is None else num_text * has_question

    # Step 3: as many centres as there are outliers among what is left, and one token for what they leave.
    recovered, left = recover(kept, num_text)
    num_centres = number_of_outliers(visual_scores, left, merge_lof_neighbors, lof_threshold)
    merges_remaining = (num_centres < num_valid - num_visual - num_text) & merge_remaining

    # With an exact or a largest number of tokens, the three kinds share it in proportion to what they asked for.
    if visual_token_budget is not None or max_visual_tokens is not None:
        asked = torch.stack([num_visual, num_text, num_centres + merges_remaining], dim=1)
        if visual_token_budget is not None:
            total = num_valid.clamp(max=visual_token_budget)
        else:
            total = asked.sum(1).clamp(max=max_visual_tokens)
        num_visual, num_text, num_merged = apportion(asked, total).unbind(1)
        merges_remaining = (num_merged > 0) & (num_merged < num_valid - num_visual - num_text) & merge_remaining
        num_centres = num_merged - merges_remaining.long()
        kept = first(by_attention, num_visual)
        recovered, left = recover(kept, num_text)

    centres = highest(last_where_not(left, visual_scores), num_centres)
    return Selection(kept, recovered, centres, merges_remaining)
