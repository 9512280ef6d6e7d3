"""What of this code rests on names that transformers may change, in one place: read it when a release breaks us.

Written for transformers 5.12 to 5.24. A repo published today runs this code for years on whatever its users install, so
a newer version is said to be untested, once, instead of being refused.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import Cache, LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto import modeling_auto
from transformers.utils import logging


logger = logging.get_logger(__name__)

NEWEST_TESTED = (5, 24)

# The argument and output of `forward`, `generate` and `prepare_inputs_for_generation` that holds the KV cache: 5.24
# renamed `past_key_values` to `cache`, and warns at every use of the old name.
CACHE = "cache" if "cache" in inspect.signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"


def warn_if_untested() -> None:
    """Say once that this transformers is newer than any that this code was tested with."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2] if part.isdigit())
    if version > NEWEST_TESTED:
        logger.warning_once(
            f"recoverable-llava was tested with transformers up to {'.'.join(map(str, NEWEST_TESTED))}, and this is "
            f"{transformers.__version__}: if something breaks, look for a newer revision of the model's code."
        )


def the_cache(past_key_values: Any, cache: Any) -> Any:
    """The one KV cache that a caller passed, under either of its names.

    Raises:
        ValueError: if both names were used.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "past_key_values and cache are two names of one argument: pass the KV cache under one of them."
        )
    return cache if past_key_values is None else past_key_values


def in_order_of(stock: Callable, ours: Callable) -> Callable:
    """`ours`, with the arguments that `stock` has too in stock's places, which differ between families."""
    places = [*inspect.signature(stock).parameters]

    def place(parameter: inspect.Parameter) -> int:
        is_shared = parameter.name in places and parameter.kind is not parameter.VAR_KEYWORD
        return places.index(parameter.name) if is_shared else len(places)

    signature = inspect.signature(ours)
    signature = signature.replace(parameters=sorted(signature.parameters.values(), key=place))

    @functools.wraps(ours)
    def method(*args: Any, **kwargs: Any) -> Any:
        return ours(**dict(zip(signature.parameters, args)), **kwargs)

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


def is_paged(cache: Any) -> bool:
    """Whether a keyword `cache` is for the attention layers, which continuous batching gives theirs under that name.

    Since 5.24 it is the name of every KV cache.
    """
    return CACHE != "cache" and cache is not None and not isinstance(cache, Cache)


def cache_of(outputs: Any) -> Any:
    """The KV cache in an output of the model or of `generate`; None if there is none."""
    return getattr(outputs, CACHE, None)


def static_cache_of(model: Any) -> Any:
    """The static cache that 5.12 keeps with a model, and fills anew in each `generate` that names no other."""
    return getattr(model, "_cache", None)


def num_cached_rows(cache: Any) -> int:
    """How many sequences a KV cache holds; 0 while it is empty."""
    layers = getattr(cache, "layers", [])
    return next((len(layer.keys) for layer in layers if getattr(layer, "keys", None) is not None), 0)


def encoder_of(vision_tower: Any) -> Any:
    """The CLIP vision transformer, with its `encoder.layers` and `post_layernorm`: some towers nest it."""
    return getattr(vision_tower, "vision_model", vision_tower)


def set_image_features(outputs: Any, last_hidden_state: torch.Tensor, tokens: torch.Tensor, counts: list[int]) -> None:
    """Give the model's outputs the visual tokens of all images, [sum of counts, D], where stock has them.

    `image_hidden_states` up to 5.23, `image_outputs` with one entry per image since.
    """
    if "image_outputs" in type(outputs).__dataclass_fields__:
        outputs.image_outputs = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=list(tokens.split(counts))
        )
    else:
        outputs.image_hidden_states = tokens


def register_checkpoint_layouts(name: str, like: str) -> None:
    """Let `name`, a model type or class, read every checkpoint layout that `like`, one of stock's, reads."""
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping(like), overwrite=True)


def register_architecture(model_type: str, class_name: str) -> None:
    """`transformers serve` and `pipeline` look an architecture up here, and remote code cannot declare it otherwise."""
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = class_name
    modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type] = class_name
