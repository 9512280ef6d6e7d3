"""What upstream's mixins run over, of each family: stock, and ours with compression off, on, and with a fixed budget.

A mixin wants to be part of a test case that has the classes under test, a `model_tester` that makes configurations and
inputs, and the parts of a processor.
"""

import unittest
from typing import Any

import tiny
import torch
from mixins import ConfigTester, GenerationTesterMixin, ModelTesterMixin, ProcessorTesterMixin
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.auto import modeling_auto
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from recoverable_llava import (
    RecoverableLlavaConfig,
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    RecoverableLlavaNextConfig,
    RecoverableLlavaNextForConditionalGeneration,
    RecoverableLlavaNextModel,
    RecoverableLlavaNextProcessor,
    RecoverableLlavaProcessor,
)


IMAGE_SIZE, PATCH_SIZE = 12, 2
GRID_WIDTH = IMAGE_SIZE // PATCH_SIZE  # 6
NUM_PATCHES = GRID_WIDTH**2  # of a tile
PINPOINTS = [[IMAGE_SIZE, 2 * IMAGE_SIZE]]  # LLaVA-NeXT's pictures are that large: two tiles, and the base tile
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "projection_dim": 16,
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
QUESTION = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 6,
    "projection_dim": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
}
IMAGE_TOKEN = 4

# The mixins know a base model by its entry here.
for config, model in (
    (RecoverableLlavaConfig, RecoverableLlavaModel),
    (RecoverableLlavaNextConfig, RecoverableLlavaNextModel),
):
    modeling_auto.MODEL_MAPPING_NAMES[config.model_type] = model.__name__


def is_tiled(config_class: type) -> bool:
    return issubclass(config_class, LlavaNextConfig)


class ModelTester:
    """Two prompts with an image each. Upstream's mixins ask for these names."""

    batch_size, num_text_tokens = 2, 7
    vision_config, text_config = VISION, TEXT
    hidden_size, num_hidden_layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    num_attention_heads = TEXT["num_attention_heads"]
    is_training = True

    def __init__(self, config_class: type, settings: dict[str, Any]):
        self.config_class, self.settings = config_class, settings
        # Both tiles' patches besides the base tile's, and a new line for each row of them.
        self.num_placeholders = NUM_PATCHES + (GRID_WIDTH * (2 * GRID_WIDTH + 1) if is_tiled(config_class) else 0)
        self.seq_length = self.encoder_seq_length = self.num_placeholders + self.num_text_tokens

    def get_config(self) -> Any:
        return self.config_class(
            vision_config=dict(VISION),
            text_config=dict(TEXT),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=NUM_PATCHES,
            vision_feature_layer=-1,  # of two layers the one before leaves the last without gradient
            **({"image_grid_pinpoints": PINPOINTS} if is_tiled(self.config_class) else {}),
            **self.settings,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config = self.get_config()
        text = torch.randint(IMAGE_TOKEN + 1, TEXT["vocab_size"], (self.batch_size, self.num_text_tokens))
        image = torch.full((self.batch_size, self.num_placeholders), IMAGE_TOKEN)
        input_ids = torch.cat([text[:, :1], image, text[:, 1:]], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE),
        }
        if is_tiled(self.config_class):
            inputs["pixel_values"] = torch.rand(self.batch_size, 3, 3, IMAGE_SIZE, IMAGE_SIZE)
            inputs["image_sizes"] = torch.tensor(PINPOINTS * self.batch_size)
        if hasattr(config, "question_config"):
            start, end = QUESTION["bos_token_id"], QUESTION["eos_token_id"]
            question = torch.randint(0, start, (self.batch_size, QUESTION["max_position_embeddings"]))
            question[:, 0], question[:, -1] = start, end
            inputs |= {"question_input_ids": question, "question_attention_mask": torch.ones_like(question)}
        return config, inputs


def model_case(config_class: type, model_classes: tuple[type, ...], settings: dict[str, Any]) -> type:
    class ModelCase(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
        all_model_classes = model_classes
        _is_composite = True
        test_can_init_all_missing_weights_before_2023 = True
        # LLaVA reads one layer of the tower, so what follows that layer has none.
        test_all_params_have_gradient = False
        # LLaVA-NeXT's tower sees tiles, as upstream's own test of it says.
        skip_test_image_features_output_shape = is_tiled(config_class)

        def setUp(self) -> None:
            self.model_tester = ModelTester(config_class, settings)

    return ModelCase


def configuration_case(config_class: type, settings: dict[str, Any]) -> type:
    """Upstream runs these checks as one test; here each is a test."""

    class ConfigurationCase(unittest.TestCase):
        def setUp(self) -> None:
            self.model_tester = ModelTester(config_class, settings)
            given = {name: value for name, value in settings.items() if name != "question_config"}
            self.config_tester = ConfigTester(
                self,
                config_class=config_class,
                has_text_modality=False,
                common_properties=["image_token_index", "vision_feature_layer", "image_seq_length"],
                **given,
            )

    for name in dir(ConfigTester):
        if name.startswith(("create_and_test_", "check_")):
            setattr(ConfigurationCase, f"test_{name}", lambda case, name=name: getattr(case.config_tester, name)())
    return ConfigurationCase


def processor_case(processor: type, settings: dict[str, Any]) -> type:
    class ProcessorCase(ProcessorTesterMixin, unittest.TestCase):
        processor_class = processor

        @classmethod
        def _setup_tokenizer(cls) -> Any:
            return tiny.llava_tokenizer()

        @classmethod
        def _setup_question_tokenizer(cls) -> Any:
            return tiny.clip_tokenizer()

        @classmethod
        def _setup_image_processor(cls) -> Any:
            size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
            if issubclass(processor, LlavaNextProcessor):
                return LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS)
            return CLIPImageProcessorPil(**size)

        @staticmethod
        def prepare_processor_dict() -> dict[str, Any]:
            return {
                "patch_size": PATCH_SIZE,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
                "chat_template": tiny.CHAT_TEMPLATE,
                **settings,
            }

    return ProcessorCase


def cases(
    config_class: type, model_classes: tuple[type, ...], processor: type, budget: int | None = None, **settings: Any
) -> dict[str, type]:
    fixed = {} if budget is None else {"visual_token_budget": budget}
    return {
        "configuration": configuration_case(config_class, settings | fixed),
        "model": model_case(config_class, model_classes, settings | fixed),
        "processor": processor_case(processor, fixed),
    }


RECOVERY = {**tiny.RECOVERY, "question_config": QUESTION}
OURS = {
    "llava": (
        RecoverableLlavaConfig,
        (RecoverableLlavaModel, RecoverableLlavaForConditionalGeneration),
        RecoverableLlavaProcessor,
    ),
    "llava_next": (
        RecoverableLlavaNextConfig,
        (RecoverableLlavaNextModel, RecoverableLlavaNextForConditionalGeneration),
        RecoverableLlavaNextProcessor,
    ),
}
CONTROLS = {
    "llava": cases(LlavaConfig, (LlavaModel, LlavaForConditionalGeneration), LlavaProcessor),
    "llava_next": cases(LlavaNextConfig, (LlavaNextModel, LlavaNextForConditionalGeneration), LlavaNextProcessor),
}
SUBJECTS = {
    family: {
        "off": cases(*ours, compress=False, **RECOVERY),
        "adaptive": cases(*ours, **RECOVERY),
        "budget": cases(*ours, budget=8, **RECOVERY),
    }
    for family, ours in OURS.items()
}
# What the families share with compression off, LLaVA-1.5 shows.
del SUBJECTS["llava_next"]["off"]
