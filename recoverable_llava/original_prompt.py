"""How a caller of `generate` sees a compressed prompt: as the original one.

The generation loop runs on the short prompt. Everything that leaves it, sequences, the streamer's first value and the
ids that callbacks read, gets the original prompt in front instead.

B prompts, L tokens of the original prompt, S of the short one, D size of an embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from .prompt_shortening import CompressedHistory, unshortened_prompt


@dataclass
class GenerationPrompt:
    """A prompt as the caller gave it, and as the generation loop sees it."""

    given_ids: torch.Tensor  # [B, L]
    loop_ids: torch.Tensor  # [B, S]
    short_attention_mask: torch.Tensor  # [B, cached + new]
    visual_embeds: torch.Tensor | None  # [B, cached + new, D]
    history: CompressedHistory  # all that will be cached once this prompt is

    def restore(self, ids: torch.Tensor) -> torch.Tensor:
        """Sequences of the loop, [B * beams, S + new], with the original prompt in front."""
        given = self.given_ids.repeat_interleave(len(ids) // len(self.given_ids), dim=0).to(ids.device)
        return torch.cat([given, ids[:, self.loop_ids.shape[1] :]], dim=1)

    def remember(self, cache: Cache, sequences: torch.Tensor) -> None:
        """Give the cache the history that it holds: this prompt and the answers."""
        if len(sequences) != self._num_cached_rows(cache):
            return  # beams: the rows of the cache are not those of the sequences, and stock cannot go on from it either
        answer = sequences[:, self.loop_ids.shape[1] :]
        history = self.history.repeated(len(sequences) // len(self.given_ids))
        history = history.extended(answer, torch.ones_like(answer), unshortened_prompt(answer, None, None))
        history.cropped(int(cache.get_seq_length())).attach(cache)

    @staticmethod
    def _num_cached_rows(cache: Cache) -> int:
        return next((len(layer.keys) for layer in cache.layers if getattr(layer, "keys", None) is not None), 0)


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


def see_original_prompt(callbacks: list | None, prompt: GenerationPrompt, list_class: type) -> list | None:
    if callbacks is None:
        return None
    return list_class(OriginalPromptCallback(callback, prompt) for callback in callbacks)
