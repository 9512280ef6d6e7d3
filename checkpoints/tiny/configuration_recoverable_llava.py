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

    Args:
        compress (`bool`, defaults to `True`):
            False switches compression off: the model is then stock LLaVA, bit for bit.
        selection (`str`, defaults to `"novelty"`):
            How patches are chosen. `"novelty"`, this project's own: by importance (their score and that of their near
            copies) times novelty (the cosine distance, behind LLaVA's projector, to the nearest patch of higher
            importance), as many as are novel enough. `"paper"`: the highest scores stay, as many as the scores have
            outliers, and left-over patches are merged around centres.
        attention_layer (`int`, defaults to -1):
            Layer of the vision tower whose class attention scores the patches and whose keys steer the merging.
        text_relevance (`str`, defaults to `"value"`):
            How a patch's relevance to the question is measured, always as a cosine with the question's CLIP embedding:
            `"projected"` of the last layer's patch (the paper); `"negated"`, minus that of the layer before (as
            published for CLIP ViT-L/14-336 by TRIM and CDPruner); `"value"` of the last layer with its attention
            replaced by the identity (MaskCLIP).
        novelty_threshold (`float`, defaults to 0.175):
            With novelty, a patch counts when its novelty is above this share of the image's mean distance between
            patches. Higher keeps fewer tokens.
        text_share (`float`, defaults to 0.9):
            With novelty, the share of the counted tokens that the question chooses; class attention has the rest.
        text_reach (`float`, defaults to 0.8):
            With novelty, the share of its relevance to the question that a patch lends the eight patches around it:
            the answer often stands beside what the question names. 0 lends nothing.
        visual_lof_neighbors (`int`, defaults to 20):
            Neighbours of the Local Outlier Factor (LOF) in step 1, the visual filter.
        text_lof_neighbors (`int`, defaults to 20):
            Neighbours of the LOF in step 2, the text-guided recovery.
        merge_lof_neighbors (`int`, defaults to 10):
            Neighbours of the LOF in step 3, which counts the centres of merged tokens.
        lof_threshold (`float`, defaults to 1.5):
            A score is an outlier when its LOF is above this. Higher keeps fewer tokens.
        merge_neighbors (`int`, defaults to 32):
            Paper: how many left-over patches a centre absorbs into its merged token.
        text_merge_weight (`float`, defaults to 50.0):
            Weight of the difference in relevance when a centre chooses its neighbours.
        merge_remaining (`bool`, defaults to `True`):
            One more token for what no centre absorbs.
        min_visual_tokens (`int`, defaults to 1):
            Adaptive mode: no image has fewer tokens than this.
        max_visual_tokens (`int`, *optional*):
            Adaptive mode: no image has more tokens than this.
        visual_token_budget (`int`, *optional*):
            Fixed mode: exactly this many tokens for every image. None is adaptive mode, where the image and the
            question decide.
        question_config (`dict` or `CLIPTextConfig`, *optional*):
            The CLIP text tower that belongs to the vision tower. Its `projection_dim` is the joint embedding's size.
    """

    model_type = "recoverable_llava"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    sub_configs = {**LlavaConfig.sub_configs, "question_config": CLIPTextConfig}

    question_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.question_config is None:
            self.question_config = CLIPTextConfig()
        elif isinstance(self.question_config, dict):
            self.question_config = CLIPTextConfig(**self.question_config)
        # Configurations written before there was `selection` say it in two fields.
        if kwargs.pop("diversity", True) is False:
            self.selection = "paper"
        kwargs.pop("merge_centres", None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.validate_recovery()

    @property
    def grid_width(self) -> int:
        """Patches in a row of an image, and rows of patches."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return self.grid_width**2


register_architecture(RecoverableLlavaConfig.model_type, "RecoverableLlavaForConditionalGeneration")

__all__ = ["RecoverableLlavaConfig"]
