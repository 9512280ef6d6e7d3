"""From a prompt with one placeholder per patch to the short prompt that the language model sees, and back.

The processor writes N placeholders per image, as stock LLaVA does; the image then keeps K < N tokens. Here the surplus
placeholders are dropped from the ids, the mask and the positions of a whole batch at once, and what the language model
returns for the short prompt is spread over the original positions again. Pure functions of tensors; nothing here knows
of images or of the recovery.

B prompts, I images, L tokens of the original prompt, S tokens of the short prompt, N placeholders of an image.
"""

from dataclasses import dataclass
from typing import Any

import torch


# Where a cache carries its CompressedHistory.
HISTORY = "compressed_history"


@dataclass(frozen=True)
class Placeholders:
    """Where the images stand in a batch of prompts. Images are numbered in reading order over the batch."""

    mask: torch.Tensor  # [B, L] bool
    image: torch.Tensor  # [B, L] long, the image that a placeholder belongs to (anything elsewhere)
    offset: torch.Tensor  # [B, L] long, the placeholder's number within its image (anything elsewhere)
    row_of_image: torch.Tensor  # [I] long, the prompt that an image belongs to


@dataclass(frozen=True)
class ShortPrompt:
    """A batch of prompts without the surplus placeholders, padded on the left."""

    input_ids: torch.Tensor  # [B, S]
    attention_mask: torch.Tensor  # [B, S] long
    position_ids: torch.Tensor  # [B, S] long
    source: torch.Tensor  # [B, S] long, the original position of each token (anything where masked)
    spread: torch.Tensor  # [B, L] long, for each original position the short one whose output stands for it
    is_shortened: bool  # False where nothing can have moved; True even if no row lost a token


def locate_placeholders(input_ids: torch.Tensor, image_token_id: int, per_image: int, num_images: int) -> Placeholders:
    """Number the placeholders of a batch [B, L] that has `per_image` of them for each of `num_images` images."""
    mask = input_ids == image_token_id
    number = mask.flatten().cumsum(0).view_as(mask) - 1
    images_up_to_row = (mask.sum(1) // per_image).cumsum(0)
    images = torch.arange(num_images, device=input_ids.device)
    row_of_image = torch.searchsorted(images_up_to_row, images, right=True).clamp(max=len(input_ids) - 1)
    return Placeholders(
        mask=mask,
        image=(number // per_image).clamp(0, max(num_images - 1, 0)),
        offset=number % per_image,
        row_of_image=row_of_image,
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
    spread = (keep.long().cumsum(1) - 1 + short_length - num_kept).clamp(min=0)
    return ShortPrompt(
        input_ids=input_ids.gather(1, source).masked_fill(~short_mask, padding_id),
        attention_mask=short_mask.long(),
        position_ids=short_positions.masked_fill(~short_mask, 0),
        source=source,
        spread=spread,
        is_shortened=True,
    )


def unshortened_prompt(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> ShortPrompt:
    """A prompt that is short already, in the form of a shortened one."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    return ShortPrompt(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=counted if position_ids is None else position_ids.expand_as(input_ids),
        source=positions,
        spread=positions,
        is_shortened=False,
    )


def place_tokens(tokens: torch.Tensor, placeholders: Placeholders, short: ShortPrompt) -> torch.Tensor:
    """[B, S, D]: each image's tokens [I, K, D] at its placeholders of the short prompt, zero elsewhere."""
    num_per_image = tokens.shape[1]
    image, offset = placeholders.image.gather(1, short.source), placeholders.offset.gather(1, short.source)
    index = (image * num_per_image + offset.clamp(0, num_per_image - 1)).flatten()
    placed = tokens.flatten(0, 1).index_select(0, index).unflatten(0, short.source.shape)
    is_placeholder = placeholders.mask.gather(1, short.source) & short.attention_mask.bool()
    return placed.masked_fill(~is_placeholder[:, :, None], 0)


def spread_over_original(hidden_states: torch.Tensor, short: ShortPrompt) -> torch.Tensor:
    """[B, L, D] from [B, S, D]: a dropped position repeats the output of the last kept one before it."""
    index = short.spread.to(hidden_states.device)[:, :, None].expand(-1, -1, hidden_states.shape[-1])
    return hidden_states.gather(1, index)


@dataclass
class CompressedHistory:
    """What a KV cache holds, in both numberings, so that a later turn or a decode loop can continue from it.

    It travels as an attribute of the cache object, so a deep copy of the cache takes it along. Both histories cover
    exactly what is cached; an id of -1 is a token whose id is not known (it was given as an embedding).
    """

    input_ids: torch.Tensor  # [B, O] original prompt and answer
    attention_mask: torch.Tensor  # [B, O] long
    short_input_ids: torch.Tensor  # [B, S]
    short_attention_mask: torch.Tensor  # [B, S] long
    irreducible_length: int  # short tokens up to and with the last compressed prompt: a crop must not go below

    def extended(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, short: ShortPrompt
    ) -> "CompressedHistory":
        """The history after another prompt [B, L], which was cached in its short form."""
        short_input_ids = torch.cat([self.short_input_ids, short.input_ids], dim=1)
        return CompressedHistory(
            input_ids=torch.cat([self.input_ids, input_ids], dim=1),
            attention_mask=torch.cat([self.attention_mask, attention_mask], dim=1),
            short_input_ids=short_input_ids,
            short_attention_mask=torch.cat([self.short_attention_mask, short.attention_mask], dim=1),
            irreducible_length=short_input_ids.shape[1] if short.is_shortened else self.irreducible_length,
        )

    def attach(self, cache: Any) -> None:
        """Let the cache carry this history, if anything was dropped; otherwise both numberings are the cache's own."""
        if self.irreducible_length:
            setattr(cache, HISTORY, self)

    def repeated(self, repeats: int) -> "CompressedHistory":
        """The history of a cache in which every row stands `repeats` times in a row."""
        return CompressedHistory(
            input_ids=self.input_ids.repeat_interleave(repeats, dim=0),
            attention_mask=self.attention_mask.repeat_interleave(repeats, dim=0),
            short_input_ids=self.short_input_ids.repeat_interleave(repeats, dim=0),
            short_attention_mask=self.short_attention_mask.repeat_interleave(repeats, dim=0),
            irreducible_length=self.irreducible_length,
        )

    def cropped(self, cached_length: int) -> "CompressedHistory":
        """The history of a cache that holds `cached_length` short tokens.

        Raises:
            ValueError: if the cache was cropped into a compressed prompt, or holds more than this history.
        """
        surplus = self.short_input_ids.shape[1] - cached_length
        if surplus == 0:
            return self
        if surplus < 0 or cached_length < self.irreducible_length:
            raise ValueError(
                f"past_key_values holds {cached_length} tokens, but its compressed prompt "
                f"{self.irreducible_length} and its history {self.short_input_ids.shape[1]}: it was cropped or changed "
                "from outside. Start from the full prompt without past_key_values."
            )
        return CompressedHistory(
            input_ids=self.input_ids[:, :-surplus],
            attention_mask=self.attention_mask[:, :-surplus],
            short_input_ids=self.short_input_ids[:, :-surplus],
            short_attention_mask=self.short_attention_mask[:, :-surplus],
            irreducible_length=self.irreducible_length,
        )


def empty_history(like: torch.Tensor) -> CompressedHistory:
    nothing = like.new_zeros(len(like), 0)
    return CompressedHistory(nothing, nothing, nothing, nothing, 0)


def uncompressed_history(
    tokens: torch.Tensor, cached_length: int, attention_mask: torch.Tensor | None
) -> CompressedHistory:
    """The history of a cache from an uncompressed prefill, whose ids are not known."""
    ids = torch.full((len(tokens), cached_length), -1, dtype=torch.long, device=tokens.device)
    if attention_mask is not None and attention_mask.shape[1] >= cached_length + tokens.shape[1]:
        mask = attention_mask[:, :cached_length].long()
    else:
        mask = torch.ones_like(ids)
    return CompressedHistory(ids, mask, ids, mask, 0)


def mask_of_new_tokens(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, history: CompressedHistory | None
) -> torch.Tensor | None:
    """The last columns [B, L] of a mask that may also cover what is cached, in either numbering."""
    if attention_mask is None:
        return None
    length = tokens.shape[1]
    allowed = {length}
    if history is not None:
        allowed |= {history.input_ids.shape[1] + length, history.short_input_ids.shape[1] + length}
    if attention_mask.shape[1] not in allowed:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {length} new tokens, but must cover the new "
            f"tokens, or these and what past_key_values stands for: one of {sorted(allowed)} columns."
        )
    return attention_mask[:, -length:]


def is_full_history(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, history: CompressedHistory) -> bool:
    """Whether `input_ids` repeats what the cache stands for, or is new altogether.

    Raises:
        ValueError: if it is neither.
    """
    num_past, length = history.input_ids.shape[1], input_ids.shape[1]
    past = history.input_ids.to(input_ids.device)
    if len(past) != len(input_ids):
        raise ValueError(f"input_ids has {len(input_ids)} rows, but past_key_values stands for {len(past)}.")
    if attention_mask is not None and attention_mask.shape[1] != length:
        allowed = {num_past + length, history.short_input_ids.shape[1] + length}
        if attention_mask.shape[1] not in allowed:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but must cover input_ids ({length}), or these "
                f"and what past_key_values stands for: one of {sorted({length, *allowed})} columns."
            )
        return False
    if length > num_past:
        is_same = (past == input_ids[:, :num_past]) | (past == -1) | (history.attention_mask.to(past.device) == 0)
        if bool(is_same.all()):
            return True
        raise ValueError(
            "past_key_values does not belong to a prefix of input_ids: they differ within the first "
            f"{num_past} tokens that it stands for. Start without past_key_values, or, to pass new tokens alone, give "
            f"an attention_mask of {num_past + length} columns."
        )
    return False
