"""Processor of LLaVA-NeXT with recoverable compression: stock's, plus the question for the CLIP text tower."""

from typing import Any

import torch
from transformers import BatchFeature, LlavaNextProcessor

from .configuration_recoverable_llava_next import check_strategy
from .question_processor import QuestionProcessorMixin


class RecoverableLlavaNextProcessor(QuestionProcessorMixin, LlavaNextProcessor):
    """A `LlavaNextProcessor` that also returns `question_input_ids` and `question_attention_mask`.

    `QuestionProcessorMixin` describes the arguments, and how the question is found. `pixel_values` has as many tiles as
    an image can have, whatever the images: then batches of different images can be joined, as `pipeline` does it. The
    model leaves empty tiles out.
    """

    def __call__(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> BatchFeature:
        """As in the other families."""
        inputs = super().__call__(images, text, *args, **kwargs)
        pixels = inputs.get("pixel_values")
        if isinstance(pixels, torch.Tensor) and pixels.ndim == 5:
            height, width = pixels.shape[-2:]
            pinpoints = self.image_processor.image_grid_pinpoints
            most_tiles = 1 + max((tall // height) * (wide // width) for tall, wide in pinpoints)
            # A call may name other resolutions, of more tiles.
            missing = max(most_tiles - pixels.shape[1], 0)
            inputs["pixel_values"] = torch.nn.functional.pad(pixels, (0, 0) * 3 + (0, missing))
        return inputs

    def _get_number_of_features(self, *sizes: int) -> int:
        check_strategy(self.vision_feature_select_strategy)
        # Its callers take off a class token, which stock's adds where `num_additional_image_tokens` says so.
        if self.visual_token_budget is not None:
            return self.visual_token_budget + 1
        return super()._get_number_of_features(*sizes) - self.num_additional_image_tokens + 1


__all__ = ["RecoverableLlavaNextProcessor"]
