"""The hyperparameters of the recovery: flat, typed fields that every family's configuration has, and their checks.

All stand side by side in config.json and can be changed at run time (`model.config.lof_threshold = 2.0`): the next call
uses the new value. A call reads them once, as a `RecoverySettings`, so that a change meanwhile is for the next one.
"""

from dataclasses import dataclass
from typing import Any

from transformers import CLIPTextConfig


SELECTIONS = ("novelty", "paper")
TEXT_RELEVANCES = ("projected", "negated", "value")

# What `use_preset` sets. "paper" is the method as published, "default" what docs/evaluation.md found to answer best.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"selection": "novelty", "text_relevance": "value"},
    "paper": {"selection": "paper", "text_relevance": "projected"},
}


@dataclass(kw_only=True)
class RecoverySettings:
    """What one call goes by: the fields that every family's configuration has.

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
    """

    compress: bool = True
    selection: str = "novelty"
    attention_layer: int = -1
    text_relevance: str = "value"
    novelty_threshold: float = 0.175
    text_share: float = 0.9
    text_reach: float = 0.8
    visual_lof_neighbors: int = 20
    text_lof_neighbors: int = 20
    merge_lof_neighbors: int = 10
    lof_threshold: float = 1.5
    merge_neighbors: int = 32
    text_merge_weight: float = 50.0
    merge_remaining: bool = True
    min_visual_tokens: int = 1
    max_visual_tokens: int | None = None
    visual_token_budget: int | None = None


@dataclass(kw_only=True)
class RecoverySettingsMixin(RecoverySettings):
    """Fields and checks that a family's configuration adds to its stock one.

    Args:
        question_config (`dict` or `CLIPTextConfig`, *optional*):
            The CLIP text tower that belongs to the vision tower. Its `projection_dim` is the joint embedding's size.
    """

    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    question_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.question_config is None:
            self.question_config = CLIPTextConfig()
        elif isinstance(self.question_config, dict):
            self.question_config = CLIPTextConfig(**self.question_config)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.validate_recovery()

    @property
    def grid_width(self) -> int:
        """Patches in a row of what the vision tower sees, and rows of patches."""
        vision_config = self.vision_config  # type: ignore[attr-defined]
        return vision_config.image_size // vision_config.patch_size

    def use_preset(self, name: str) -> None:
        """Set the fields of the recovery to a named preset, `"default"` or `"paper"`; see `PRESETS`."""
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; choose one of {tuple(PRESETS)}.")
        for field, value in PRESETS[name].items():
            setattr(self, field, value)

    @property
    def num_class_tokens(self) -> int:
        """How many visual tokens besides patches an image has: the class token under the `"full"` strategy."""
        return int(self.vision_feature_select_strategy == "full")  # type: ignore[attr-defined]

    def recovery_settings(self, compress: bool | None = None) -> RecoverySettings:
        """The fields above as they are now, checked: what one call of the model goes by.

        Args:
            compress: in place of the field.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        settings = RecoverySettings(**{name: getattr(self, name) for name in RecoverySettings.__dataclass_fields__})
        settings.compress = settings.compress if compress is None else compress
        if settings.compress is not False:
            check_settings(settings, self)
        return settings

    def validate_recovery(self) -> None:
        """Check every field above, whether compression is on or off.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        check_settings(self, self)


def check_settings(settings: Any, config: Any) -> None:
    """Raise a ValueError for the first of the settings that does not fit the vision tower of `config`."""
    if config.vision_config.model_type != "clip_vision_model":
        raise ValueError(
            "Recoverable compression needs a CLIP vision tower with its class token, but vision_config.model_type is "
            f"{config.vision_config.model_type!r}."
        )
    for name, allowed in {"selection": SELECTIONS, "text_relevance": TEXT_RELEVANCES}.items():
        if getattr(settings, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(settings, name)!r}.")
    for name in ("compress", "merge_remaining"):
        if not isinstance(getattr(settings, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(settings, name)!r}.")

    num_layers, num_patches = config.vision_config.num_hidden_layers, config.num_patches
    num_class_tokens = config.num_class_tokens
    lowest_limit = settings.min_visual_tokens if isinstance(settings.min_visual_tokens, int) else 1
    whole_numbers: dict[str, tuple[float, float]] = {
        "attention_layer": (-num_layers, num_layers - 1),
        "visual_lof_neighbors": (1, num_patches - 1),
        "text_lof_neighbors": (1, num_patches - 1),
        "merge_lof_neighbors": (1, num_patches - 1),
        "merge_neighbors": (0, float("inf")),
        "min_visual_tokens": (1, num_patches),
        "max_visual_tokens": (lowest_limit + num_class_tokens, float("inf")),
        "visual_token_budget": (1 + num_class_tokens, num_patches + num_class_tokens),
    }
    for name, (lowest, highest) in whole_numbers.items():
        value = getattr(settings, name)
        if value is None and name in ("max_visual_tokens", "visual_token_budget"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
            allowed_range = f"of at least {lowest}" if highest == float("inf") else f"from {lowest} to {highest}"
            raise ValueError(
                f"{name} must be a whole number {allowed_range} for this vision tower ({num_patches} patches, "
                f"{num_layers} layers), got {value!r}."
            )
    numbers = {
        "lof_threshold": (1.0, float("inf")),
        "text_merge_weight": (0.0, float("inf")),
        "novelty_threshold": (0.0, float("inf")),
        "text_share": (0.0, 1.0),
        "text_reach": (0.0, 1.0),
    }
    for name, (smallest, largest) in numbers.items():
        value = getattr(settings, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not smallest <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number of at least {smallest}, got {value!r}.")
        if value > largest:
            raise ValueError(f"{name} must be at most {largest}, got {value!r}.")
