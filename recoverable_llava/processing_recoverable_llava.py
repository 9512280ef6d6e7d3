"""Processor of LLaVA with recoverable compression: stock LLaVA's, plus the question for the CLIP text tower."""

from typing import Any

from transformers import LlavaProcessor

from .centre_crop import resize_what_is_seen
from .question_processor import QuestionProcessorMixin


class RecoverableLlavaProcessor(QuestionProcessorMixin, LlavaProcessor):
    """A `LlavaProcessor` that also returns `question_input_ids` and `question_attention_mask`.

    `QuestionProcessorMixin` describes the arguments, and how the question is found.
    """

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        if self.visual_token_budget is not None:
            return self.image_token * self.visual_token_budget
        return super().replace_image_token(image_inputs, image_idx, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        """As stock, which would enlarge all of a long picture to crop its middle."""
        return super()._process_images(resize_what_is_seen(images, self.image_processor, **kwargs), **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> Any:
        """As stock; engines such as vLLM ask this for the number of placeholders before an image is encoded."""
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if self.visual_token_budget is not None and image_sizes is not None:
            data.num_image_tokens = [self.visual_token_budget] * len(image_sizes)
        return data


__all__ = ["RecoverableLlavaProcessor"]
