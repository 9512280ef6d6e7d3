"""Recoverable LLaVA in vLLM: our towers and recovery, vLLM's language model.

The vision half is `RecoverableLlavaVisionModel`, the same code that transformers runs, whole on every rank. The
language model is whatever vLLM has for `config.text_config`. It never sees a surplus placeholder: prompts arrive with
as many of them as each image has tokens.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from cachetools import LRUCache
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from recoverable_llava import RecoverableLlavaVisionModel, VisionFeatures

from . import check_family
from .processing import (
    RecoverableLlavaDummyInputsBuilder,
    RecoverableLlavaMultiModalProcessor,
    RecoverableLlavaProcessingInfo,
)
from .vision_features import join_images, num_bytes, split_images


logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is below its own name

# `--additional-config '{"vision_features_cache_mib": 256}'`. An image of LLaVA-1.5 takes 5 MiB in half precision.
CACHE_OPTION, DEFAULT_CACHE_MIB = "vision_features_cache_mib", 64
# Of the images that vLLM encodes together: the tower's hidden states are of all layers, and outside what vLLM profiles.
IMAGES_PER_PASS = 8


@MULTIMODAL_REGISTRY.register_processor(
    RecoverableLlavaMultiModalProcessor,
    info=RecoverableLlavaProcessingInfo,
    dummy_inputs=RecoverableLlavaDummyInputsBuilder,
)
class RecoverableLlavaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # Weights are named as `save_pretrained` of transformers does it since 4.52, or as LLaVA's first checkpoints are.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "vision.",
            "vision_tower.": "vision.vision_tower.",
            "multi_modal_projector.": "vision.multi_modal_projector.",
        },
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"The only modality is image, got {modality!r}.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config
        check_family(self.config)
        self.configure_mm_token_handling(self.config.text_config.vocab_size, [self.config.image_token_index])
        with self._mark_tower_model(vllm_config, "image"):
            self.vision = RecoverableLlavaVisionModel(self.config).to(model_config.dtype)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        max_bytes = int(vllm_config.additional_config.get(CACHE_OPTION, DEFAULT_CACHE_MIB) * 2**20)
        self.vision_features_cache: LRUCache[bytes, VisionFeatures] = LRUCache(max_bytes, getsizeof=num_bytes)

    def embed_multimodal(self, **inputs: Any) -> MultiModalEmbeddings:
        """[K, D] visual tokens for each image: of pictures, or as the client recovered them."""
        if "image_embeds" in inputs:
            return [embeds.to(self.vision.dtype) for embeds in inputs["image_embeds"]]
        return self._recover(**inputs) if "pixel_values" in inputs else []

    def _recover(
        self,
        pixel_values: torch.Tensor,
        question_input_ids: torch.Tensor,
        question_attention_mask: torch.Tensor,
        visual_token_budget: torch.Tensor,
        image_digest: torch.Tensor,
    ) -> list[torch.Tensor]:
        """[K, D] visual tokens for each image, by the question and the budget of its request.

        Args:
            pixel_values: [I, 3, H, W]
            question_input_ids: [I, T]
            question_attention_mask, visual_token_budget: [I, T] and [I], on the host.
            image_digest: [I, 32] bytes, on the host.
        """
        vision = self._vision_features(pixel_values, image_digest)
        settings = self.vision.config.recovery_settings()
        if not settings.compress:
            return list(self.vision.all_tokens(join_images(vision)))
        # The tower is causal and pools at the end token, so the padding behind the longest question changes nothing.
        longest = max(1, int(question_attention_mask.sum(1).max()))
        question_attention_mask = question_attention_mask.to(question_input_ids.device)
        questions = self.vision.embed_questions(len(vision), question_input_ids[:, :longest], question_attention_mask)
        budgets = visual_token_budget.flatten().tolist()
        tokens: dict[int, torch.Tensor] = {}
        for budget in sorted(set(budgets)):
            settings.visual_token_budget = budget
            images = [image for image, of_image in enumerate(budgets) if of_image == budget]
            of_budget = join_images([vision[image] for image in images])
            tokens |= zip(
                images, self.vision.budget_tokens(of_budget, questions.of_images(torch.tensor(images)), settings)
            )
        return [tokens[image] for image in range(len(budgets))]

    def _vision_features(self, pixel_values: torch.Tensor, image_digest: torch.Tensor) -> list[VisionFeatures]:
        """The features of each image, from the tower only where no earlier question brought them."""
        settings = self.vision.config.recovery_settings()
        digests = [bytes(digest.tolist()) for digest in image_digest]
        features: dict[bytes, VisionFeatures] = {}
        missing: dict[bytes, int] = {}  # and where the picture is; each once
        for image, digest in enumerate(digests):
            known = self.vision_features_cache.get(digest)
            if known is None:
                missing[digest] = image
            else:
                features[digest] = known
        if missing:
            logger.debug("The vision tower encodes %d of %d images.", len(missing), len(digests))
        for start in range(0, len(missing), IMAGES_PER_PASS):
            of_this_pass = list(missing)[start : start + IMAGES_PER_PASS]
            images = pixel_values[[missing[digest] for digest in of_this_pass]]
            vision = self.vision.get_vision_features(images)
            if settings.selection == "novelty":
                vision = self.vision.with_distance(vision)
            features |= zip(of_this_pass, split_images(vision))
        for digest in missing:
            if num_bytes(features[digest]) <= self.vision_features_cache.maxsize:
                self.vision_features_cache[digest] = features[digest]
        return [features[digest] for digest in digests]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        # transformers names the inside of CLIP's tower by its version: here, and where the weights were saved.
        here = "vision_model." if hasattr(self.vision.vision_tower, "vision_model") else ""
        tower = re.compile(r"^vision\.vision_tower\.(vision_model\.)?")
        renamed = (
            (tower.sub(f"vision.vision_tower.{here}", name), weight)
            for name, weight in self.hf_to_vllm_mapper.apply(weights)
        )
        return AutoWeightsLoader(self).load_weights(renamed)

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="vision.multi_modal_projector", tower_model="vision.vision_tower"
        )
