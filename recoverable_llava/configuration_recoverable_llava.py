"""Configuration of LLaVA with recoverable compression: LlavaConfig plus the hyperparameters of the recovery.

All fields are flat and typed, so that they stand side by side in config.json and can be changed at run time
(`model.config.lof_threshold = 2.0`): the next call uses the new value.
"""

from typing import Any

from transformers import CLIPTextConfig, LlavaConfig
from transformers.models.auto import modeling_auto


TEXT_RELEVANCES = ("projected", "negated", "value")

# What `use_preset` sets. "paper" is the method as published, "default" what docs/evaluation.md found to answer best.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"diversity": True, "text_relevance": "value", "merge_centres": False},
    "paper": {"diversity": False, "text_relevance": "projected", "merge_centres": True},
}

# `save_pretrained` writes one entry per registered class; a repo needs all of them.
AUTO_MAP = {
    "AutoConfig": "configuration_recoverable_llava.RecoverableLlavaConfig",
    "AutoModel": "modeling_recoverable_llava.RecoverableLlavaModel",
    "AutoModelForImageTextToText": "modeling_recoverable_llava.RecoverableLlavaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_recoverable_llava.RecoverableLlavaForConditionalGeneration",
    "AutoProcessor": "processing_recoverable_llava.RecoverableLlavaProcessor",
}


class RecoverableLlavaConfig(LlavaConfig):
    """A `LlavaConfig` with recoverable compression (Chen et al., arXiv 2409.01179).

    Args:
        question_config (`dict` or `CLIPTextConfig`, *optional*):
            The CLIP text tower that belongs to the vision tower. Its `projection_dim` is the joint embedding's size.
        compress (`bool`, defaults to `True`):
            False switches compression off: the model is then stock LLaVA, bit for bit.
        attention_layer (`int`, defaults to -1):
            Layer of the vision tower whose class attention scores the patches and whose keys steer the merging.
        diversity (`bool`, defaults to `True`):
            Choose patches by importance (their score and that of their near copies) times novelty (the cosine distance,
            behind LLaVA's projector, to the nearest patch of higher importance), as many as are novel enough. False is
            the paper's selection: the highest scores stay, as many as the scores have outliers.
        novelty_threshold (`float`, defaults to 0.175):
            With diversity, a patch counts when its novelty is above this share of the image's mean distance between
            patches. Higher keeps fewer tokens.
        text_share (`float`, defaults to 0.9):
            With diversity, the share of the counted tokens that the question chooses; class attention has the rest.
        text_reach (`float`, defaults to 0.8):
            With diversity, the share of its relevance to the question that a patch lends the eight patches around it:
            the answer often stands beside what the question names. 0 lends nothing.
        visual_lof_neighbors (`int`, defaults to 20):
            Neighbours of the Local Outlier Factor (LOF) in step 1, the visual filter.
        text_lof_neighbors (`int`, defaults to 20):
            Neighbours of the LOF in step 2, the text-guided recovery.
        merge_lof_neighbors (`int`, defaults to 10):
            Neighbours of the LOF in step 3, which counts the centres of merged tokens.
        lof_threshold (`float`, defaults to 1.5):
            A score is an outlier when its LOF is above this. Higher keeps fewer tokens.
        text_relevance (`str`, defaults to `"value"`):
            How a patch's relevance to the question is measured, always as a cosine with the question's CLIP embedding:
            `"projected"` of the last layer's patch (the paper); `"negated"`, minus that of the layer before (as
            published for CLIP ViT-L/14-336 by TRIM and CDPruner); `"value"` of the last layer with its attention
            replaced by the identity (MaskCLIP).
        merge_centres (`bool`, defaults to `False`):
            Merge left-over patches around centres, as many as their class attention has outliers, as the paper does.
        merge_neighbors (`int`, defaults to 32):
            How many left-over patches a centre absorbs into its merged token.
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
    """

    model_type = "recoverable_llava"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {**LlavaConfig.sub_configs, "question_config": CLIPTextConfig}

    question_config: Any = None
    compress: bool = True
    attention_layer: int = -1
    diversity: bool = True
    novelty_threshold: float = 0.175
    text_share: float = 0.9
    text_reach: float = 0.8
    visual_lof_neighbors: int = 20
    text_lof_neighbors: int = 20
    merge_lof_neighbors: int = 10
    lof_threshold: float = 1.5
    text_relevance: str = "value"
    merge_centres: bool = False
    merge_neighbors: int = 32
    text_merge_weight: float = 50.0
    merge_remaining: bool = True
    min_visual_tokens: int = 1
    max_visual_tokens: int | None = None
    visual_token_budget: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.question_config is None:
            self.question_config = CLIPTextConfig()
        elif isinstance(self.question_config, dict):
            self.question_config = CLIPTextConfig(**self.question_config)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.validate_recovery()

    def use_preset(self, name: str) -> None:
        """Set the fields of the recovery to a named preset, `"default"` or `"paper"`; see `PRESETS`."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {tuple(PRESETS)}.")
        for field, value in PRESETS[name].items():
            setattr(self, field, value)

    @property
    def grid_width(self) -> int:
        """Patches in a row of an image, and rows of patches."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return self.grid_width**2

    @property
    def num_class_tokens(self) -> int:
        """How many visual tokens besides patches an image has: the class token under the `"full"` strategy."""
        return int(self.vision_feature_select_strategy == "full")

    def validate_recovery(self) -> None:
        """Check every hyperparameter of the recovery; also called before each use, as all can change at run time.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.vision_config.model_type != "clip_vision_model":
            raise ValueError(
                "Recoverable compression needs a CLIP vision tower with its class token, but vision_config.model_type "
                f"is {self.vision_config.model_type!r}."
            )
        num_layers, num_patches = self.vision_config.num_hidden_layers, self.num_patches
        if self.text_relevance not in TEXT_RELEVANCES:
            raise ValueError(f"text_relevance must be one of {TEXT_RELEVANCES}, got {self.text_relevance!r}.")
        for name in ("compress", "diversity", "merge_centres", "merge_remaining"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        ranges: dict[str, tuple[float, float]] = {
            "attention_layer": (-num_layers, num_layers - 1),
            "visual_lof_neighbors": (1, num_patches - 1),
            "text_lof_neighbors": (1, num_patches - 1),
            "merge_lof_neighbors": (1, num_patches - 1),
            "merge_neighbors": (0, float("inf")),
            "min_visual_tokens": (1, num_patches),
            "max_visual_tokens": (self.min_visual_tokens + self.num_class_tokens, float("inf")),
            "visual_token_budget": (1 + self.num_class_tokens, num_patches + self.num_class_tokens),
        }
        for name, (lowest, highest) in ranges.items():
            value = getattr(self, name)
            if value is None and name in ("max_visual_tokens", "visual_token_budget"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
                allowed = f"of at least {lowest}" if highest == float("inf") else f"from {lowest} to {highest}"
                raise ValueError(
                    f"{name} must be a whole number {allowed} for this vision tower ({num_patches} patches, "
                    f"{num_layers} layers), got {value!r}."
                )
        shares = {"text_share": 0.0, "text_reach": 0.0}
        limits = {"lof_threshold": 1.0, "text_merge_weight": 0.0, "novelty_threshold": 0.0, **shares}
        for name, lowest in limits.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not lowest <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least {lowest}, got {value!r}.")
        for name in shares:
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1.0, got {getattr(self, name)!r}.")


# `transformers serve` and `pipeline` look an architecture up by the name of its model type, which remote code cannot
# declare otherwise.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[RecoverableLlavaConfig.model_type] = (
    "RecoverableLlavaForConditionalGeneration"
)
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[RecoverableLlavaConfig.model_type] = (
    "RecoverableLlavaForConditionalGeneration"
)

__all__ = ["RecoverableLlavaConfig"]
