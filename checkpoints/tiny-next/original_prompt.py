"""How a caller of `generate` sees a compressed prompt: as the original one.

The generation loop runs on the short prompt. Everything that leaves it, sequences, the streamer's first value and the
ids that callbacks read, gets the original prompt in front instead.

B prompts, L tokens of the original prompt, S of the short one, D size of an embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, LogitsProcessorList, StoppingCriteriaList

from .cache_history import CompressedHistory
from .short_prompt import ShortPrompt
from .transformers_names import num_cached_rows


CALLBACK_LISTS = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}


@dataclass
class GenerationPrompt:
    """A prompt as the caller gave it, and as the generation loop sees it."""

    given_ids: torch.Tensor  # [B, L]
    loop_ids: torch.Tensor  # [B, S]
    short_attention_mask: torch.Tensor  # [B, cached + new]
    visual_embeds: torch.Tensor | None  # [B, cached + new, D]
    inputs_embeds: torch.Tensor | None  # [B, S, D] where the prompt was given as embeddings, visual ones included
    history: CompressedHistory  # all that will be cached once this prompt is

    def __post_init__(self) -> None:
        self.original_length = self.given_ids.shape[1]
        self.num_dropped = self.original_length - self.loop_ids.shape[1]

    def hide_ids(self) -> None:
        """For a prompt that was given as embeddings alone: stock then returns the new tokens without it."""
        self.given_ids, self.loop_ids = self.given_ids[:, :0], self.loop_ids[:, :0]

    def loop_inputs(self) -> dict[str, torch.Tensor]:
        """What stock `generate` gets in place of the caller's prompt."""
        inputs = {
            "input_ids": self.loop_ids if self.loop_ids.shape[1] else None,
            "attention_mask": self.short_attention_mask,
            "visual_embeds": None if self.inputs_embeds is not None else self.visual_embeds,
            "inputs_embeds": self.inputs_embeds,
        }
        return {name: value for name, value in inputs.items() if value is not None}

    def callbacks(self, options: dict[str, Any]) -> dict[str, Any]:
        """The caller's streamer, logits processors and the like, each shown the original prompt."""
        changed = {
            name: list_class(OriginalPromptCallback(callback, self) for callback in options[name])
            for name, list_class in CALLBACK_LISTS.items()
            if options[name] is not None
        }
        if options["streamer"] is not None:
            changed["streamer"] = OriginalPromptStreamer(options["streamer"], self)
        allowed_tokens = options["prefix_allowed_tokens_fn"]
        if allowed_tokens is not None:

            def of_original(row: int, ids: torch.Tensor) -> list[int]:
                return allowed_tokens(row, torch.cat([self.given_ids[row], ids[self.loop_ids.shape[1] :]]))

            changed["prefix_allowed_tokens_fn"] = of_original
        return changed

    def restore(self, ids: torch.Tensor) -> torch.Tensor:
        """Sequences of the loop, [B * beams, S + new], with the original prompt in front."""
        given = self.given_ids.repeat_interleave(len(ids) // len(self.given_ids), dim=0).to(ids.device)
        return torch.cat([given, ids[:, self.loop_ids.shape[1] :]], dim=1)

    def begins(self, sequences: Any) -> bool:
        """Whether these are sequences of the loop: rows [B * beams, S + new] that begin with the short prompt."""
        if not isinstance(sequences, torch.Tensor) or sequences.ndim != 2 or len(sequences) % len(self.loop_ids):
            return False
        loop_ids = self.loop_ids.repeat_interleave(len(sequences) // len(self.loop_ids), dim=0)
        return torch.equal(sequences[:, : loop_ids.shape[1]], loop_ids.to(sequences.device))

    def remember(self, cache: Cache, sequences: torch.Tensor) -> None:
        """Give the cache the history that it holds: this prompt and the answers."""
        if len(sequences) != num_cached_rows(cache):
            return  # beams: the rows of the cache are not those of the sequences, and stock cannot go on from it either
        answer = sequences[:, self.loop_ids.shape[1] :]
        history = self.history.repeated(len(sequences) // len(self.given_ids))
        history = history.extended(answer, torch.ones_like(answer), ShortPrompt.unchanged(answer))
        history.cropped(int(cache.get_seq_length())).attach(cache)


class OriginalPromptStreamer:
    """Shows a streamer the original prompt instead of the short one, which is the first thing that `generate` puts."""

    def __init__(self, streamer: Any, prompt: GenerationPrompt):
        self.streamer, self.prompt, self.is_first = streamer, prompt, True

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(self.prompt.restore(value) if self.is_first else value)
        self.is_first = False

    def end(self) -> None:
        self.streamer.end()


class OriginalPromptCallback:
    """Shows a logits processor or stopping criterion the original prompt; otherwise it is that object."""

    def __init__(self, callback: Any, prompt: GenerationPrompt):
        self.callback, self.prompt = callback, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        return self.callback(self.prompt.restore(input_ids), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)
