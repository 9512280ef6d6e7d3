"""From a request to placeholders and inputs of the towers.

vLLM hands a prompt over as token ids and an image as pixels. Two things are added here, both before vLLM names the
image in its caches: the question, found in the decoded prompt, and the number of visual tokens. As options of the
processor they are part of the name (`ProcessorInputs.get_mm_hashes`) under which vLLM keeps processed images, encoded
images and blocks of keys and values, so an image asked two questions is two entries in each of them.
"""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from cachetools import LRUCache
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)
from vllm.multimodal.processing.inputs import ProcessorInputs

from recoverable_llava import RecoverableLlavaConfig, RecoverableLlavaProcessor

from . import check_family


DEFAULT_BUDGET = 64
PIXELS_MIB = 64
# Resizing by the shortest edge blows a picture of 5,000 x 1 pixels up to 1,680,000 x 336 before it is cropped.
MAX_ASPECT_RATIO = 200
# The option of a request, in its `mm_processor_kwargs`, and the one that is added here.
BUDGET, QUESTION = "visual_token_budget", "question"
# Where vLLM sorts the options in that it knows from transformers.
SCOPES = ("text_kwargs", "images_kwargs")


class RecoverableLlavaProcessingInfo(BaseProcessingInfo):
    def get_hf_config(self) -> RecoverableLlavaConfig:
        check_family(self.ctx.get_hf_config())
        return self.ctx.get_hf_config(RecoverableLlavaConfig)

    def get_hf_processor(self, **kwargs: object) -> RecoverableLlavaProcessor:
        # Without the request's options: vLLM would load one processor for each of their values.
        return self.ctx.get_hf_processor(RecoverableLlavaProcessor)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    @cached_property
    def start_token_ids(self) -> list[int]:
        """What the tokenizer puts before every text: its start token, or nothing."""
        tokenizer = self.get_tokenizer()
        return [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id]

    @property
    def max_visual_tokens(self) -> int:
        """The visual tokens of an image that is not compressed, N or with its class token 1 + N."""
        config = self.get_hf_config()
        return config.num_patches + config.num_class_tokens

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.max_visual_tokens}

    def visual_token_budget(self, kwargs: Mapping[str, object]) -> int:
        """How many visual tokens an image has: what the request says, else the server, else the repo, else 64.

        Raises:
            VLLMValidationError: if that is no number of tokens that an image can have; a server answers 400.
        """
        config = self.get_hf_config()
        if not config.compress:
            return self.max_visual_tokens
        budget = kwargs.get(BUDGET)
        if budget is None:
            return config.visual_token_budget or min(DEFAULT_BUDGET, self.max_visual_tokens)
        lowest, highest = 1 + config.num_class_tokens, self.max_visual_tokens
        if not isinstance(budget, int) or isinstance(budget, bool) or not lowest <= budget <= highest:
            raise VLLMValidationError(
                f"{BUDGET} must be a whole number from {lowest} to {highest}, got {budget!r}.", parameter=BUDGET
            )
        return budget


class RecoverableLlavaDummyInputsBuilder(BaseDummyInputsBuilder[RecoverableLlavaProcessingInfo]):
    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        size = self.info.get_hf_config().vision_config.image_size
        overrides: Any = mm_options.get("image")
        images = self._get_dummy_images(
            width=size, height=size, num_images=mm_counts.get("image", 0), overrides=overrides
        )
        return {"image": images}


class RecoverableLlavaMultiModalProcessor(BaseMultiModalProcessor[RecoverableLlavaProcessingInfo]):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Of the images seen last: they do not depend on the question, which vLLM's own cache goes by.
        self.pixels: LRUCache[str, torch.Tensor] = LRUCache(PIXELS_MIB * 2**20, getsizeof=lambda each: each.nbytes)
        # With --renderer-num-workers several threads are here; neither that cache nor tokenizers are made for it.
        self.lock = threading.Lock()

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """As stock, with the question and the budget among the options that name each image.

        Raises:
            VLLMValidationError: for an unknown option, an impossible budget, an image too long for its width, or more
                or fewer placeholders than images.
        """
        options = self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs)
        unknown = sorted(set(options) - {BUDGET, "device", *SCOPES})
        if unknown:
            raise VLLMValidationError(
                f"There is no option {unknown[0]!r} of this processor; {BUDGET} is one.",
                parameter="mm_processor_kwargs",
            )
        _check_aspect_ratios(inputs.mm_data_items)
        num_images = inputs.mm_data_items.get_count("image", strict=False)
        num_placeholders = inputs.prompt.count(self.info.get_hf_config().image_token_index)
        if num_placeholders != num_images:
            raise VLLMValidationError(
                f"The prompt has {num_placeholders} image placeholders for {num_images} images: write "
                f"{self.info.get_hf_processor().image_token} once for each image, and nowhere else.",
                parameter="prompt",
            )
        options[BUDGET] = self.info.visual_token_budget(options)
        options[QUESTION] = self._find_question(inputs.prompt) if self.info.get_hf_config().compress else ""
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def _find_question(self, prompt_token_ids: list[int]) -> str:
        processor = self.info.get_hf_processor()
        with self.lock:
            return processor.find_question(processor.tokenizer.decode(prompt_token_ids))

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """With the start token: vLLM adds it to every prompt but a chat, transformers to chats as well."""
        start = self.info.start_token_ids
        return prompt if prompt[: len(start)] == start else [*start, *prompt]

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        """The pixels of each image, and beside each what its tokens depend on; one row per image."""
        options = {name: value for name, value in hf_kwargs.items() if name not in (BUDGET, QUESTION)}
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        digests = [MultiModalHasher.hash_kwargs(algorithm, image=image, **options) for image in hf_data["images"]]
        with self.lock:
            pixels = {digest: self.pixels.get(digest) for digest in digests}
        missing = {digest: image for digest, image in zip(digests, hf_data["images"]) if pixels[digest] is None}
        if missing:
            processed = super()._call_hf_processor({"images": list(missing.values())}, options)["pixel_values"]
            self._check_pixels(processed)
            pixels |= {digest: image.clone() for digest, image in zip(missing, processed)}
        processor = self.info.get_hf_processor()
        with self.lock:
            self.pixels.update((digest, pixels[digest]) for digest in missing)
            questions = processor.question_inputs([hf_kwargs[QUESTION]] * len(digests), return_tensors="pt")
        return BatchFeature(
            {
                "pixel_values": torch.stack([pixels[digest] for digest in digests]),
                **questions,
                BUDGET: torch.tensor([hf_kwargs[BUDGET]] * len(digests)),
                "image_digest": torch.stack([torch.tensor(list(bytes.fromhex(digest))) for digest in digests]),
            }
        )

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        size = self.info.get_hf_config().vision_config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise VLLMValidationError(
                f"images_kwargs lead to images of shape {tuple(pixel_values.shape[1:])}, but the vision tower takes "
                f"{(3, size, size)}.",
                parameter="mm_processor_kwargs",
            )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        on_device = ("pixel_values", "question_input_ids", "image_embeds")
        on_host = ("question_attention_mask", BUDGET, "image_digest")
        return {name: MultiModalFieldConfig.batched("image") for name in on_device} | {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in on_host
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image_token_id = self.info.get_hf_config().image_token_index

        def placeholders(item_idx: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):
                return [image_token_id] * images.get_feature_size(item_idx)
            return [image_token_id] * hf_processor_mm_kwargs[BUDGET]

        return [PromptReplacement(modality="image", target=[image_token_id], replacement=placeholders)]


def _check_aspect_ratios(mm_items: MultiModalDataItems) -> None:
    images = mm_items.get("image")
    if not isinstance(images, ImageProcessorItems):
        return
    for index in range(len(images)):
        if images.get(index) is None:  # vLLM has it in a cache, under the client's name for it
            continue
        width, height = images.get_image_size(index)
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise VLLMValidationError(
                f"An image of {width} x {height} pixels is more than {MAX_ASPECT_RATIO} times as long as it is wide: "
                "crop it first.",
                parameter="image",
            )
