"""Configuration of LLaVA-1.5 with recoverable compression: LlavaConfig plus the hyperparameters of the recovery."""

from typing import Any

from transformers import CLIPTextConfig, LlavaConfig

from .recovery_settings import RecoverySettingsMixin
from .transformers_names import register_architecture


# `save_pretrained` writes one entry per registered class; a repo needs all of them.
AUTO_MAP = {
    "AutoConfig": "configuration_recoverable_llava.RecoverableLlavaConfig",
    "AutoModel": "modeling_recoverable_llava.RecoverableLlavaModel",
    "AutoModelForImageTextToText": "modeling_recoverable_llava.RecoverableLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_recoverable_llava.RecoverableLlavaForConditionalGeneration",
    "AutoProcessor": "processing_recoverable_llava.RecoverableLlavaProcessor",
}


class RecoverableLlavaConfig(RecoverySettingsMixin, LlavaConfig):
    """A `LlavaConfig` with recoverable compression (Chen et al., arXiv 2409.01179).

    The fields that it adds are those of `RecoverySettings` and `RecoverySettingsMixin`.
    """

    model_type = "recoverable_llava"
    sub_configs = {**LlavaConfig.sub_configs, "question_config": CLIPTextConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        # Configurations written before there was `selection` say it in two fields.
        if kwargs.pop("diversity", True) is False:
            self.selection = "paper"
        kwargs.pop("merge_centres", None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return self.grid_width**2


register_architecture(RecoverableLlavaConfig.model_type, "RecoverableLlavaForConditionalGeneration")

__all__ = ["RecoverableLlavaConfig"]
