"""What a KV cache stands for once its prompt was shortened: the record that lets a later turn continue from it.

The cache holds short tokens; callers count original ones. The record travels as an attribute of the cache object, so a
deep copy of the cache takes it along.

B prompts, L new tokens, O original tokens so far, S short tokens so far.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from .short_prompt import ShortPrompt
from .transformers_names import num_cached_rows


# The attribute of a cache that carries its CompressedHistory.
HISTORY = "compressed_history"


@dataclass(frozen=True)
class CompressedHistory:
    """What a KV cache holds, in both numberings; an id of -1 is a token that was given as an embedding."""

    input_ids: torch.Tensor  # [B, O] original prompt and answer
    attention_mask: torch.Tensor  # [B, O] long
    short_input_ids: torch.Tensor  # [B, S]
    short_attention_mask: torch.Tensor  # [B, S] long
    source: torch.Tensor  # [B, S] long, the original position of each short token
    irreducible_length: int  # short tokens up to and with the last compressed prompt: a crop must not go below

    @classmethod
    def empty(cls, like: torch.Tensor) -> "CompressedHistory":
        """The history of an empty cache, for tokens [B, L]."""
        nothing = like.new_zeros(len(like), 0)
        return cls(nothing, nothing, nothing, nothing, nothing, 0)

    @classmethod
    def of(cls, cache: Any) -> "CompressedHistory | None":
        """The history that a cache carries, cut to what the cache still holds; None if nothing in it was shortened.

        Raises:
            ValueError: if the cache was cropped into a compressed prompt, lost rows, or holds more than its history.
        """
        history = getattr(cache, HISTORY, None)
        if history is None:
            return None
        length = int(cache.get_seq_length())
        if length == 0:  # `cache.reset()`: it may be filled with anything
            delattr(cache, HISTORY)
            return None
        num_rows, num_known = num_cached_rows(cache), len(history.input_ids)
        if num_rows % num_known:
            raise ValueError(
                f"past_key_values holds {num_rows} rows, but its history {num_known}: rows were taken out. "
                "Start from the full prompt without past_key_values."
            )
        if num_rows > num_known:  # `cache.batch_repeat_interleave`: one image, many questions
            history = history.repeated(num_rows // num_known)
        return history.cropped(length)

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
            source=torch.cat([self.source, self.input_ids.shape[1] + short.source], dim=1),
            irreducible_length=short_input_ids.shape[1] if short.may_have_moved else self.irreducible_length,
        )

    def positions_of(self, short: ShortPrompt, are_given: bool) -> torch.Tensor:
        """[B, S'] positions of new short tokens behind this history; given ones counted the original tokens."""
        if not are_given:
            mask = torch.cat([self.short_attention_mask, short.attention_mask], dim=1)
            return (mask.cumsum(1) - 1).clamp(min=0)[:, -short.input_ids.shape[1] :]
        num_dropped = self.attention_mask.sum(1) - self.short_attention_mask.sum(1)
        return short.position_ids - num_dropped[:, None]

    def attach(self, cache: Any) -> None:
        """Let the cache carry this history, if anything was dropped; otherwise both numberings are the cache's own."""
        if self.irreducible_length:
            setattr(cache, HISTORY, self)

    def _with_each(self, change: Any) -> "CompressedHistory":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: change(value) for name, value in tensors.items()})

    def repeated(self, repeats: int) -> "CompressedHistory":
        """The history of a cache in which every row stands `repeats` times in a row."""
        return self._with_each(lambda rows: rows.repeat_interleave(repeats, dim=0))

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
        return self._with_each(lambda rows: rows[:, :-surplus])


def uncompressed_history(
    tokens: torch.Tensor, cached_length: int, attention_mask: torch.Tensor | None
) -> CompressedHistory:
    """The history of a cache from an uncompressed prefill, whose ids are not known."""
    ids = torch.full((len(tokens), cached_length), -1, dtype=torch.long, device=tokens.device)
    if attention_mask is not None and attention_mask.shape[1] >= cached_length + tokens.shape[1]:
        mask = attention_mask[:, :cached_length].long()
    else:
        mask = torch.ones_like(ids)
    places = torch.arange(cached_length, device=ids.device).expand_as(ids)
    return CompressedHistory(ids, mask, ids, mask, places, 0)


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
