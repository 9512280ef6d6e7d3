"""LLaVA-1.5 with recoverable compression built in: what this family adds to what all families share.

Two subclasses of the stock model, nothing patched. Everything general stands in the files that this one imports:

    recoverable_vision.py       pixels and question to visual tokens;
    recoverable_model.py        the short prompt in front of the language model, and back;
    recoverable_generation.py   the head, the loss and `generate`.

A family says how many placeholders an image has, what the vision tower makes of it, and which patches are neighbours.

I images, N patches, C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaMultiModalProjector

from .configuration_recoverable_llava import RecoverableLlavaConfig
from .novelty_selection import highest_around
from .recoverable_generation import RecoverableGenerationMixin
from .recoverable_model import FullCounts, ImageInputs, RecoverableModelMixin
from .recoverable_vision import RecoverableVisionMixin, Recovery, VisionFeatures
from .transformers_names import register_checkpoint_layouts


register_checkpoint_layouts(RecoverableLlavaConfig.model_type, like="llava")


class LlavaFamilyMixin(RecoverableVisionMixin):
    """LLaVA-1.5: one square tile, N patches in a grid, a placeholder for each."""

    stock_name = "LlavaModel"
    config: RecoverableLlavaConfig
    vision_tower: Any

    def around(self, vision: VisionFeatures) -> Callable[[torch.Tensor], torch.Tensor]:
        return highest_around(self.config.grid_width)

    def full_counts(self, images: ImageInputs, device: torch.device) -> FullCounts:
        strategy = images.options.get("vision_feature_select_strategy", self.config.vision_feature_select_strategy)
        each = self.config.num_patches + int(strategy == "full")
        return FullCounts(torch.full((len(images),), each, device=device), each, each * len(images))

    def encode_images(
        self, pixel_values: torch.Tensor, text_relevance: str, attention_layer: int, **options: Any
    ) -> tuple[BaseModelOutputWithPooling, VisionFeatures]:
        strategy = options.pop("vision_feature_select_strategy", None) or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f'vision_feature_select_strategy must be "default" or "full", got {strategy!r}.')
        outputs, features, visual_scores, keys, embeds = self.read_images(
            pixel_values, text_relevance, attention_layer, **options
        )
        vision = VisionFeatures(
            patches=features[:, 1:],
            class_tokens=features[:, :1] if strategy == "full" else None,
            visual_scores=visual_scores,
            keys=keys,
            relevance_embeds=embeds,
            last_hidden_state=outputs.last_hidden_state,
        )
        return outputs, vision


class RecoverableLlavaModel(LlavaFamilyMixin, RecoverableModelMixin, LlavaModel):
    config: RecoverableLlavaConfig

    def __init__(self, config: RecoverableLlavaConfig):
        super().__init__(config)
        self.add_recovery()


class RecoverableLlavaForConditionalGeneration(RecoverableGenerationMixin, LlavaForConditionalGeneration):
    config: RecoverableLlavaConfig
    stock_class = LlavaForConditionalGeneration
    model_class = RecoverableLlavaModel
    output_class = LlavaCausalLMOutputWithPast


class StockVisionHalf(LlavaPreTrainedModel):
    """What stock LLaVA does with pixels; it needs no language model for that."""

    get_image_features = LlavaModel.get_image_features


class RecoverableLlavaVisionModel(LlavaFamilyMixin, StockVisionHalf):
    """The vision half alone, without a language model, under the same weight names: for engines that bring their own.

    `from_pretrained` of a whole checkpoint leaves the language model's weights where they are.
    """

    config: RecoverableLlavaConfig
    _keys_to_ignore_on_load_unexpected = [r"language_model\.", r"lm_head\."]

    def __init__(self, config: RecoverableLlavaConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.add_recovery()


__all__ = [
    "RecoverableLlavaForConditionalGeneration",
    "RecoverableLlavaModel",
    "RecoverableLlavaVisionModel",
    "Recovery",
    "VisionFeatures",
]
