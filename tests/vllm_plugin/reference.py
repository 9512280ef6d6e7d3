"""What transformers answers at a budget, one request at a time: what vLLM is measured against."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from recoverable_llava.tools.asking import load


REPO = str(Path(__file__).parents[2] / "checkpoints" / "tiny")
MAX_TOKENS = 8


@dataclass(frozen=True)
class Generated:
    """Chosen token ids, the end token with them, and the log-probability of each."""

    token_ids: list[int]
    log_probs: list[float]

    def difference(self, other: "Generated") -> float:
        """The largest difference of log-probabilities; infinite where any token differs."""
        if self.token_ids != other.token_ids:
            return math.inf
        return max((abs(one - two) for one, two in zip(self.log_probs, other.log_probs)), default=0.0)


class Reference:
    """The model of a repo in transformers, in float32."""

    def __init__(self, repo: str = REPO) -> None:
        self.model, self.processor = load(repo, device="cpu", dtype="float32")
        self._features: dict[tuple[int, ...], Any] = {}  # by the images, as the tower takes longest

    @torch.inference_mode()
    def __call__(self, prompt: str, images: list[Image.Image], budget: int | None) -> Generated:
        """Greedy answer to a raw prompt at a budget; None is adaptive."""
        self.model.config.visual_token_budget = self.processor.visual_token_budget = budget
        inputs: Any = self.processor(images=images or None, text=prompt, return_tensors="pt")
        return self._generate(inputs, images)

    @torch.inference_mode()
    def chat(self, messages: list[dict[str, Any]], images: list[Image.Image], budget: int | None) -> Generated:
        """Greedy answer to a chat, whose messages name the images."""
        self.model.config.visual_token_budget = self.processor.visual_token_budget = budget
        inputs: Any = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return self._generate(inputs, images)

    @torch.inference_mode()
    def text(self, prompt: str, **settings: Any) -> Generated:
        """Greedy answer to a prompt without an image, tokenised by `settings`."""
        inputs = self.processor.tokenizer(prompt, return_tensors="pt", **settings)
        return self._generate(inputs, [])

    def _generate(self, inputs: Any, images: list[Image.Image]) -> Generated:
        pixel_values = inputs.pop("pixel_values", None)
        if pixel_values is not None:
            key = tuple(map(id, images))
            if key not in self._features:
                self._features[key] = self.model.get_vision_features(pixel_values)
            inputs["vision_features"] = self._features[key]
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        token_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        log_probs = [logits[0].float().log_softmax(-1)[token].item() for logits, token in zip(output.logits, token_ids)]
        return Generated(token_ids, log_probs)


def user_prompt(question: str, num_images: int = 1) -> str:
    return "USER: " + "<image>\n" * num_images + f"{question} ASSISTANT:"
