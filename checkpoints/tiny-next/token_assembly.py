"""From a selection to visual tokens: what each merged token is made of, and the order of all of them.

Source: steps 3 and 4 of Chen et al. (arXiv 2409.01179). Chosen patches keep their raster order, merged tokens follow.
Merged tokens are weighted means, so that they stay on the scale of a real one.

B images, N patches, C channels, K kept tokens, M merged tokens.
"""

from dataclasses import dataclass

import torch

from .selection import Selection, finite


SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Assembly:
    """How the kept tokens are made of patches: `tokens = gather([patches, merge_weights @ patches], token_index)`."""

    merge_weights: torch.Tensor  # [B, M, N] float32, each row a weighted mean over patches (or zero where unused)
    token_index: torch.Tensor  # [B, K] long into the N patches followed by the M merged tokens
    token_mask: torch.Tensor  # [B, K] bool: False where an image has fewer than K tokens


def first_true(mask: torch.Tensor, count: int) -> torch.Tensor:
    """[B, count] indices of the True entries of each row, in order; rows with fewer go on with indices of False."""
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def absorbed_by_centres(
    centres: torch.Tensor,
    absorbable: torch.Tensor,
    keys: torch.Tensor,
    text_scores: torch.Tensor | None,
    num_merged: int,
    merge_neighbors: int,
    text_merge_weight: float,
) -> torch.Tensor:
    """[B, M, N] bool: what each centre, in raster order, merges: itself and the left-over patches nearest to it.

        affinity_ij = cos(key_i, key_j) - text_merge_weight * |relevance_i - relevance_j|

    A patch may be absorbed by several centres. Rows behind an image's last centre are False.
    """
    num_patches = keys.shape[1]
    slot = torch.arange(num_merged, device=keys.device)
    is_centre = (slot < centres.sum(1, keepdim=True))[:, :, None]
    centre = first_true(centres, num_merged)  # [B, M]
    keys = torch.nn.functional.normalize(keys.float(), dim=-1)
    affinity = keys.gather(1, centre[:, :, None].expand(-1, -1, keys.shape[-1])) @ keys.transpose(1, 2)  # [B, M, N]
    if text_scores is not None:
        difference = (text_scores.gather(1, centre)[:, :, None] - text_scores[:, None, :]).abs()
        affinity = affinity - text_merge_weight * difference
    affinity = affinity.masked_fill(~absorbable[:, None, :], -torch.inf)
    nearest = affinity.topk(min(merge_neighbors, num_patches)).indices
    absorbed = torch.zeros_like(affinity, dtype=torch.bool).scatter_(2, nearest, True)
    absorbed = absorbed & absorbable[:, None, :] & is_centre
    return absorbed.scatter_(2, centre[:, :, None], is_centre)


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
    merge_neighbors: int = 32,
    text_merge_weight: float = 50.0,
) -> Assembly:
    """What each of an image's tokens is made of.

    A centre and what it absorbs become their mean, weighted by class attention. What no centre absorbs becomes the
    remaining token (all left-over patches, in case the centres absorb every one).

    Args:
        selection: of the same images.
        visual_scores, text_scores, has_question, valid: as the selection was made from.
        keys: [B, N, C] attention keys of the patches.
        num_tokens, num_merged: K and M, at least the largest `selection.num_tokens` and `selection.num_merged`.
        merge_neighbors: how many patches a centre absorbs.
        text_merge_weight: weight of the difference in relevance.
    """
    chosen, centres = selection.chosen, selection.centres
    absorbable = ~chosen if centres is None else ~(chosen | centres)
    if valid is not None:
        absorbable = absorbable & valid

    slot = torch.arange(num_merged, device=keys.device)
    if centres is None:
        is_merged = (slot == 0) & selection.merges_remaining[:, None]  # [B, M]
        members = is_merged[:, :, None] & absorbable[:, None, :]  # [B, M, N]
    else:
        if text_scores is not None:
            text_scores = finite(text_scores[:, None], valid)[:, 0]
            text_scores = text_scores if has_question is None else text_scores * has_question[:, None]
        absorbed = absorbed_by_centres(
            centres, absorbable, keys, text_scores, num_merged, merge_neighbors, text_merge_weight
        )
        unabsorbed = absorbable & ~absorbed.any(1)
        unabsorbed = torch.where(unabsorbed.any(1, keepdim=True), unabsorbed, absorbable)
        num_centres = centres.sum(1, keepdim=True)
        is_remaining = (slot == num_centres) & selection.merges_remaining[:, None]
        members = absorbed | (is_remaining[:, :, None] & unabsorbed[:, None, :])
        is_merged = (slot < num_centres) | is_remaining
    attention = visual_scores.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=SMALLEST)
    weights = members * attention[:, None]
    merge_weights = weights / weights.sum(2, keepdim=True).clamp(min=SMALLEST)

    exists = torch.cat([chosen, is_merged], dim=1)
    return Assembly(
        merge_weights=merge_weights,
        token_index=first_true(exists, num_tokens),
        token_mask=torch.arange(num_tokens, device=keys.device) < exists.sum(1, keepdim=True),
    )


def gather_tokens(patches: torch.Tensor, assembly: Assembly) -> torch.Tensor:
    """The kept tokens [B, K, C] of the patches [B, N, C]; zero where `assembly.token_mask` is False."""
    merged = assembly.merge_weights.to(patches.dtype) @ patches
    index = assembly.token_index[:, :, None].expand(-1, -1, patches.shape[-1])
    tokens = torch.cat([patches, merged], dim=1).gather(1, index)
    return tokens.masked_fill(~assembly.token_mask[:, :, None], 0)
