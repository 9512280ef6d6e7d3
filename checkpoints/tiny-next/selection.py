"""What a selection is: which patches of an image become visual tokens. Shared by every way of choosing them.

B images, N patches.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(frozen=True)
class Selection:
    """Which patches stay, and what stands for the rest. The masks are disjoint; a row has at least one True."""

    chosen_by_vision: torch.Tensor  # [B, N] bool
    chosen_by_text: torch.Tensor  # [B, N] bool
    centres: torch.Tensor | None  # [B, N] bool, of merged tokens; None where the rule has no centres
    merges_remaining: torch.Tensor  # [B] bool: one more token stands for the patches that no centre absorbs

    @property
    def chosen(self) -> torch.Tensor:
        """[B, N] bool: patches that become tokens as they are."""
        return self.chosen_by_vision | self.chosen_by_text

    @property
    def num_visual(self) -> torch.Tensor:
        """[B] long."""
        return self.chosen_by_vision.sum(1)

    @property
    def num_text(self) -> torch.Tensor:
        """[B] long."""
        return self.chosen_by_text.sum(1)

    @property
    def num_merged(self) -> torch.Tensor:
        """[B] long, the remaining token included."""
        remaining = self.merges_remaining.long()
        return remaining if self.centres is None else self.centres.sum(1) + remaining

    @property
    def num_tokens(self) -> torch.Tensor:
        """[B] long: all visual tokens of an image but its class token."""
        num_tokens = self.chosen.sum(1) + self.merges_remaining
        return num_tokens if self.centres is None else num_tokens + self.centres.sum(1)


def join(selections: list[Selection]) -> Selection:
    """The selections of several batches of images as one."""

    def joined(name: str) -> Any:
        values = [getattr(each, name) for each in selections]
        return None if values[0] is None else torch.cat(values)

    return Selection(**{field.name: joined(field.name) for field in fields(Selection)})


def check_scores(
    visual_scores: torch.Tensor,
    text_scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    max_visual_tokens: int | None,
    visual_token_budget: int | None,
) -> None:
    """Raise a ValueError where shapes disagree, or a budget or a bound does not fit into N."""
    for name, scores in {"text_scores": text_scores, "valid": valid}.items():
        if scores is not None and scores.shape != visual_scores.shape:
            raise ValueError(
                f"{name} has shape {tuple(scores.shape)}, but visual_scores {tuple(visual_scores.shape)}: pass one "
                "value per patch of each image."
            )
    for name, limit in {"visual_token_budget": visual_token_budget, "max_visual_tokens": max_visual_tokens}.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}.")
    num_patches = visual_scores.shape[1]
    if visual_token_budget is not None and visual_token_budget > num_patches:
        raise ValueError(
            f"visual_token_budget ({visual_token_budget}) is larger than the number of patches of an image "
            f"({num_patches}): lower it, or switch compression off."
        )


def number_of_valid(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B] long: patches of each image that hold a picture, of scores [B, N]."""
    if valid is None:
        return torch.full_like(scores[:, 0], scores.shape[1], dtype=torch.long)
    return valid.sum(1)


def lowest(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, kinds, 1] lowest valid score of each row of [B, kinds, N]; infinity if there is none."""
    scores = scores if valid is None else scores.masked_fill(~valid[:, None], torch.inf)
    return scores.amin(2, keepdim=True)


def finite(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Scores [B, kinds, N] in float32 with the row's lowest valid score (0 if there is none) for NaN and infinity."""
    scores = scores.float().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
    return torch.where(scores < torch.inf, scores, lowest(scores, valid).nan_to_num(posinf=0.0))


def last_where_not(mask: torch.Tensor | None, priority: torch.Tensor) -> torch.Tensor:
    """The priority [B, N], below everything where the mask is False."""
    return priority if mask is None else priority.masked_fill(~mask, -torch.inf)


def descending(scores: torch.Tensor) -> torch.Tensor:
    """[B, N] indices of the scores from the highest to the lowest; the first of equal ones first."""
    return scores.argsort(dim=1, descending=True, stable=True)


def first(order: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """[B, N] mask of the first `count` ([B], or one for all) patches in the order `order` [B, N] of indices."""
    count = count[:, None] if isinstance(count, torch.Tensor) else count
    is_first = (torch.arange(order.shape[1], device=order.device) < count).expand_as(order)
    return torch.empty_like(order, dtype=torch.bool).scatter_(1, order, is_first)


def highest(priority: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """[B, N] mask of the `count` patches of highest priority [B, N]; the first of equal ones first."""
    return first(descending(priority), count)
