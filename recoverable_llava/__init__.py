"""LLaVA with recoverable compression, natively in transformers.

Importing the package registers its classes with transformers, so that `AutoModelForImageTextToText` and `pipeline` load
them without `trust_remote_code`; from a Hub repo, remote code does the same without this package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_recoverable_llava import RecoverableLlavaConfig
from .configuration_recoverable_llava_next import RecoverableLlavaNextConfig
from .modeling_recoverable_llava import (
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    RecoverableLlavaVisionModel,
    Recovery,
    VisionFeatures,
)
from .modeling_recoverable_llava_next import RecoverableLlavaNextForConditionalGeneration, RecoverableLlavaNextModel
from .processing_recoverable_llava import RecoverableLlavaProcessor
from .processing_recoverable_llava_next import RecoverableLlavaNextProcessor
from .tools.families import FAMILIES


for family in FAMILIES.values():
    config, whole_model, processor = family.config_class, family.model_class, family.processor_class
    model = whole_model.model_class
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForImageTextToText.register(config, whole_model)
    AutoModelForMultimodalLM.register(config, whole_model)
    AutoProcessor.register(config, processor)
    # `save_pretrained` and `push_to_hub` of these classes write their code next to the weights.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
    whole_model.register_for_auto_class("AutoModelForImageTextToText")
    processor.register_for_auto_class()

__version__ = "0.1.0"

__all__ = [
    "RecoverableLlavaConfig",
    "RecoverableLlavaForConditionalGeneration",
    "RecoverableLlavaModel",
    "RecoverableLlavaNextConfig",
    "RecoverableLlavaNextForConditionalGeneration",
    "RecoverableLlavaNextModel",
    "RecoverableLlavaNextProcessor",
    "RecoverableLlavaProcessor",
    "RecoverableLlavaVisionModel",
    "Recovery",
    "VisionFeatures",
]
