"""Configuration of LLaVA-NeXT with recoverable compression: LlavaNextConfig plus the recovery's hyperparameters."""

from typing import Any

from transformers import CLIPTextConfig, LlavaNextConfig

from .recovery_settings import RecoverySettingsMixin
from .transformers_names import register_architecture


# `save_pretrained` writes one entry per registered class; a repo needs all of them.
AUTO_MAP = {
    "AutoConfig": "configuration_recoverable_llava_next.RecoverableLlavaNextConfig",
    "AutoModel": "modeling_recoverable_llava_next.RecoverableLlavaNextModel",
    "AutoModelForImageTextToText": "modeling_recoverable_llava_next.RecoverableLlavaNextForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_recoverable_llava_next.RecoverableLlavaNextForConditionalGeneration",
    "AutoProcessor": "processing_recoverable_llava_next.RecoverableLlavaNextProcessor",
}


class RecoverableLlavaNextConfig(RecoverySettingsMixin, LlavaNextConfig):
    """A `LlavaNextConfig` with recoverable compression (Chen et al., arXiv 2409.01179).

    The fields that it adds are those of `RecoverySettings` and `RecoverySettingsMixin`. A number of tokens counts an
    image's base tile and its other tiles together.
    """

    model_type = "recoverable_llava_next"
    sub_configs = {**LlavaNextConfig.sub_configs, "question_config": CLIPTextConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    def validate_recovery(self) -> None:
        """As in the other families.

        Raises:
            ValueError: also for the `"full"` strategy, whose class tokens stock LLaVA-NeXT cannot join to a picture.
        """
        check_strategy(self.vision_feature_select_strategy)
        super().validate_recovery()

    @property
    def num_patches(self) -> int:
        """N, the most patches that an image can have: those of the base tile and of all others, without padding."""
        tile_size = self.vision_config.image_size
        most = max((height // tile_size) * (width // tile_size) for height, width in self.image_grid_pinpoints)
        return (1 + most) * self.grid_width**2


def check_strategy(strategy: str | None) -> None:
    """Raise a ValueError unless the class token is left out of an image's tokens."""
    if strategy != "default":
        raise ValueError(
            f'vision_feature_select_strategy must be "default" for LLaVA-NeXT, got {strategy!r}: class tokens have no '
            "place in its grid of patches."
        )


register_architecture(RecoverableLlavaNextConfig.model_type, "RecoverableLlavaNextForConditionalGeneration")

__all__ = ["RecoverableLlavaNextConfig"]
