"""LLaVA with recoverable compression, natively in transformers.

Importing the package registers its classes with transformers, so that `AutoModelForImageTextToText` and `pipeline` load
them without `trust_remote_code`; from a Hub repo, remote code does the same without this package.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from .configuration_recoverable_llava import RecoverableLlavaConfig
from .modeling_recoverable_llava import (
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    RecoverableLlavaVisionModel,
    Recovery,
    VisionFeatures,
)
from .processing_recoverable_llava import RecoverableLlavaProcessor


AutoConfig.register(RecoverableLlavaConfig.model_type, RecoverableLlavaConfig)
AutoModel.register(RecoverableLlavaConfig, RecoverableLlavaModel)
AutoModelForImageTextToText.register(RecoverableLlavaConfig, RecoverableLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(RecoverableLlavaConfig, RecoverableLlavaForConditionalGeneration)
AutoProcessor.register(RecoverableLlavaConfig, RecoverableLlavaProcessor)
# `save_pretrained` and `push_to_hub` of these classes write their code next to the weights.
RecoverableLlavaConfig.register_for_auto_class()
RecoverableLlavaModel.register_for_auto_class("AutoModel")
RecoverableLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
RecoverableLlavaProcessor.register_for_auto_class()

__version__ = "0.1.0"

__all__ = [
    "RecoverableLlavaConfig",
    "RecoverableLlavaForConditionalGeneration",
    "RecoverableLlavaModel",
    "RecoverableLlavaProcessor",
    "RecoverableLlavaVisionModel",
    "Recovery",
    "VisionFeatures",
]
