"""From a prompt with one placeholder per patch to the short prompt that the language model sees, and back.

The processor writes N placeholders per image, as stock LLaVA does; the image then keeps K < N tokens. Here the surplus
placeholders are dropped from the ids, the mask and the positions of a whole batch at once, and what the language model
returns for the short prompt is brought back to the original positions. With 3 patches of which 1 stays:

    original   USER  <i>  <i>  <i>  why  ?        source     0  1  4  5        position of each short token
    short      USER  <i>            why  ?        output_of  0  1  1  1  2  3  short token that speaks for each one

Pure functions of tensors; nothing here knows of the recovery.

B prompts, I images, L tokens of the original prompt, S tokens of the short prompt, N placeholders of an image.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placeholders:
    """Where the images stand in a batch of prompts. Images are numbered in reading order over the batch."""

    mask: torch.Tensor  # [B, L] bool
    image: torch.Tensor  # [B, L] long, the image that a placeholder belongs to (anything elsewhere)
    offset: torch.Tensor  # [B, L] long, the placeholder's number within its image (anything elsewhere)
    row_of_image: torch.Tensor  # [I] long, the prompt that an image begins in
    ends: torch.Tensor  # [I] long, placeholders up to and with an image
    row_ends: torch.Tensor  # [B] long, placeholders up to and with a prompt

    @property
    def last_row_of_image(self) -> torch.Tensor:
        """[I] long, the prompt that an image ends in: the one that it begins in, if prompts and images match."""
        return torch.searchsorted(self.row_ends, self.ends)


@dataclass(frozen=True)
class ShortPrompt:
    """A batch of prompts without the surplus placeholders, padded on the left."""

    input_ids: torch.Tensor  # [B, S]
    attention_mask: torch.Tensor  # [B, S] long
    position_ids: torch.Tensor  # [B, S] long
    source: torch.Tensor  # [B, S] long, the original position of each token (anything where masked)
    output_of: torch.Tensor  # [B, L] long, for each original position the short one whose output stands for it
    may_have_moved: bool  # False where short and original positions are the same

    @classmethod
    def unchanged(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> "ShortPrompt":
        """A prompt of which nothing is dropped."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        counted = (mask.cumsum(1) - 1).clamp(min=0)
        return cls(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=counted if position_ids is None else position_ids.expand_as(input_ids),
            source=places,
            output_of=places,
            may_have_moved=False,
        )

    def of_original(self, values: torch.Tensor) -> torch.Tensor:
        """[B, S, ...] the values [B, L, ...] of the tokens that are left."""
        index = self.source.to(values.device)
        index = index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index)

    def to_original(self, values: torch.Tensor) -> torch.Tensor:
        """[B, L, D] from [B, S, D]: a dropped position repeats the output of the last kept one before it."""
        if not self.may_have_moved:
            return values
        index = self.output_of.to(values.device)[:, :, None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index)


def locate_placeholders(input_ids: torch.Tensor, image_token_id: int, per_image: torch.Tensor) -> Placeholders:
    """Number the placeholders of a batch [B, L] in which image i has `per_image[i]` of them, [I] long."""
    mask = input_ids == image_token_id
    number = mask.flatten().cumsum(0).view_as(mask) - 1
    ends = per_image.cumsum(0)
    starts = ends - per_image
    image = torch.searchsorted(ends, number, right=True).clamp(max=max(len(ends) - 1, 0))
    row_ends = mask.sum(1).cumsum(0)
    return Placeholders(
        mask=mask,
        image=image,
        offset=number - starts[image] if len(ends) else number,
        row_of_image=torch.searchsorted(row_ends, starts, right=True).clamp(max=len(input_ids) - 1),
        ends=ends,
        row_ends=row_ends,
    )


def surviving_positions(
    placeholders: Placeholders, num_tokens: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """[B, L] bool: text, and the first `num_tokens` [I] placeholders of each image, without padding."""
    keep = ~placeholders.mask
    if len(num_tokens):
        keep = keep | (placeholders.offset < num_tokens[placeholders.image])
    return keep if attention_mask is None else keep & attention_mask.bool()


def shorten_prompt(
    input_ids: torch.Tensor,
    keep: torch.Tensor,
    short_length: int,
    padding_id: int,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> ShortPrompt:
    """Gather the kept positions of every prompt to the right end of `short_length` columns.

    Args:
        input_ids: [B, L].
        keep: [B, L] bool, at most `short_length` True per row.
        short_length: S.
        padding_id: id of the columns that a shorter row leaves free.
        attention_mask: [B, L]; None means that nothing is padding.
        position_ids: [B, L] or [1, L]; positions that restart at 0 within a row (packed sequences) keep doing so. None
            counts the tokens of each row.
    """
    length = input_ids.shape[1]
    num_kept = keep.sum(1, keepdim=True)
    # Stable: what is dropped first, then what is kept, each in order.
    source = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, length - short_length :]
    short_mask = torch.arange(short_length, device=keep.device) >= short_length - num_kept
    if position_ids is None:
        short_positions = short_mask.long().cumsum(1) - 1
    else:
        position_ids = position_ids.expand_as(input_ids)
        present = torch.ones_like(keep) if attention_mask is None else attention_mask.bool()
        num_dropped_before = (present & ~keep).long().cumsum(1)
        at_start = torch.where(position_ids == 0, num_dropped_before, 0).cummax(1).values
        short_positions = (position_ids - (num_dropped_before - at_start)).gather(1, source)
    output_of = (keep.long().cumsum(1) - 1 + short_length - num_kept).clamp(min=0)
    return ShortPrompt(
        input_ids=input_ids.gather(1, source).masked_fill(~short_mask, padding_id),
        attention_mask=short_mask.long(),
        position_ids=short_positions.masked_fill(~short_mask, 0),
        source=source,
        output_of=output_of,
        may_have_moved=True,
    )


def place_tokens(tokens: torch.Tensor, placeholders: Placeholders, short: ShortPrompt) -> torch.Tensor:
    """[B, S, D]: each image's tokens [I, K, D] at its placeholders of the short prompt, zero elsewhere."""
    num_per_image = tokens.shape[1]
    image, offset = placeholders.image.gather(1, short.source), placeholders.offset.gather(1, short.source)
    index = (image * num_per_image + offset.clamp(0, num_per_image - 1)).flatten()
    placed = tokens.flatten(0, 1).index_select(0, index).unflatten(0, short.source.shape)
    is_placeholder = placeholders.mask.gather(1, short.source) & short.attention_mask.bool()
    return placed.masked_fill(~is_placeholder[:, :, None], 0)


def attentions_of_original(
    attentions: torch.Tensor, short: ShortPrompt, source: torch.Tensor, is_present: torch.Tensor, length: int
) -> torch.Tensor:
    """[B, H, L, O] from [B, H, S, keys]: a dropped position is attended to by nobody, and attends as its stand-in does.

    Args:
        attentions: weights of S short tokens over all cached ones, which may have free columns behind (static caches).
        source: [B, cached] original position of every cached short token.
        is_present: [B, cached], 0 for padding.
        length: O, original tokens in all.
    """
    num_cached = source.shape[1]
    weights = attentions[..., :num_cached] * is_present.to(attentions)[:, None, None, :]
    index = source.to(weights.device)[:, None, None, :].expand_as(weights)
    over_original = weights.new_zeros(*weights.shape[:3], length).scatter_add(3, index, weights)
    rows = short.output_of.to(weights.device)[:, None, :, None].expand(-1, weights.shape[1], -1, length)
    return over_original.gather(2, rows)
