"""The families of models that have recoverable compression here, each beside the stock family that it comes from."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

# Not from the package itself, which registers these families as it is imported.
from ..configuration_recoverable_llava import RecoverableLlavaConfig
from ..configuration_recoverable_llava_next import RecoverableLlavaNextConfig
from ..modeling_recoverable_llava import RecoverableLlavaForConditionalGeneration
from ..modeling_recoverable_llava_next import RecoverableLlavaNextForConditionalGeneration
from ..processing_recoverable_llava import RecoverableLlavaProcessor
from ..processing_recoverable_llava_next import RecoverableLlavaNextProcessor


@dataclass(frozen=True)
class Family:
    """Our classes of a family, and stock's."""

    config_class: Any
    model_class: Any
    processor_class: Any
    stock_model_class: Any
    stock_processor_class: Any


# By the model_type of the stock configuration.
FAMILIES = {
    "llava": Family(
        RecoverableLlavaConfig,
        RecoverableLlavaForConditionalGeneration,
        RecoverableLlavaProcessor,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    ),
    "llava_next": Family(
        RecoverableLlavaNextConfig,
        RecoverableLlavaNextForConditionalGeneration,
        RecoverableLlavaNextProcessor,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a checkpoint, by the `model_type` of its configuration, stock's or ours.

    Raises:
        ValueError: if there is none.
    """
    family = FAMILIES.get(model_type.removeprefix("recoverable_"))
    if family is None:
        raise ValueError(f"model_type is {model_type!r}: recoverable compression takes one of {tuple(FAMILIES)}.")
    return family
