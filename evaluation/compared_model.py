"""Our models with the choice of tokens left open, so that every method runs through the same prompt, cache and loop.

`ComparedMixin` overrides the steps in which a model chooses, assembles and projects tokens, and nothing else.
`gather_evidence` reads what published rules look at off the same towers.

B prompts, I images, N patches, K kept tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig

from evaluation.evidence import Evidence, TiledEvidence
from evaluation.peers import SelectionRule
from evaluation.tiled_peers import TiledAssembly, chosen_patches
from recoverable_llava import (
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    RecoverableLlavaNextForConditionalGeneration,
    RecoverableLlavaNextModel,
)
from recoverable_llava.clip_scores import class_attention, read_layer, relevance_embeddings
from recoverable_llava.modeling_recoverable_llava_next import without_empty_tiles
from recoverable_llava.recoverable_vision import RecoverableVisionMixin, ScoredImages, VisionFeatures
from recoverable_llava.recovery_settings import TEXT_RELEVANCES, RecoverySettings
from recoverable_llava.selection import Selection
from recoverable_llava.token_assembly import Assembly
from recoverable_llava.tools.families import family_of
from recoverable_llava.transformers_names import encoder_of


# What LLaVA-1.5's prompt starts with, which is what the paper's release guides by.
CONSTANT_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)


@dataclass(frozen=True)
class RuledSelection(Selection):
    """What a rule chose. Its merged tokens are the assembly's own: they have no centres."""

    assembly: Assembly

    @classmethod
    def of(cls, assembly: Assembly) -> "RuledSelection":
        kept = chosen_patches(assembly)
        return cls(kept, torch.zeros_like(kept), None, torch.zeros_like(kept[:, 0]), assembly)

    @property
    def num_merged(self) -> torch.Tensor:
        return self.num_tokens - self.num_visual

    @property
    def num_tokens(self) -> torch.Tensor:
        return self.assembly.token_mask.sum(1)


class ComparedMixin(RecoverableVisionMixin):
    """`rule` chooses the tokens from `evidence` with `budget`; without a rule the model's own method does."""

    rule: SelectionRule | None = None
    evidence: Evidence | None = None
    budget: int | None = None
    selector_seconds: float = 0.0
    num_tokens: torch.Tensor | None = None  # [I] of the last choice

    def select(self, images: ScoredImages, settings: RecoverySettings) -> Selection:
        with self._timed(images.vision.patches.device):
            if self.rule is None:
                selection = super().select(images, settings)
            else:
                selection = RuledSelection.of(self.rule(self.evidence, self.budget))
        self.num_tokens = selection.num_tokens
        return selection

    def assemble(
        self, selection: Selection, images: ScoredImages, settings: RecoverySettings, num_tokens: int, num_merged: int
    ) -> Assembly:
        if isinstance(selection, RuledSelection):
            return selection.assembly
        with self._timed(images.vision.patches.device):
            return super().assemble(selection, images, settings, num_tokens, num_merged)

    def project(self, vision: VisionFeatures, assembly: Assembly) -> torch.Tensor:
        if not isinstance(assembly, TiledAssembly):
            return super().project(vision, assembly)
        if assembly.patches is not None:
            vision = replace(vision, patches=assembly.patches)
        tokens = super().project(vision, assembly)
        if assembly.is_new_line is None:
            return tokens
        return torch.where(assembly.is_new_line[:, :, None], self.image_newline.to(tokens), tokens)

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        _wait_for(device)
        start = time.perf_counter()
        yield
        _wait_for(device)
        self.selector_seconds += time.perf_counter() - start


class ComparedLlavaModel(ComparedMixin, RecoverableLlavaModel):
    pass


class ComparedLlava(RecoverableLlavaForConditionalGeneration):
    """`RecoverableLlavaForConditionalGeneration` around a `ComparedLlavaModel`."""

    model_class = ComparedLlavaModel


class ComparedLlavaNextModel(ComparedMixin, RecoverableLlavaNextModel):
    pass


class ComparedLlavaNext(RecoverableLlavaNextForConditionalGeneration):
    """`RecoverableLlavaNextForConditionalGeneration` around a `ComparedLlavaNextModel`."""

    model_class = ComparedLlavaNextModel


COMPARED_CLASSES: dict[str, Any] = {"recoverable_llava": ComparedLlava, "recoverable_llava_next": ComparedLlavaNext}


def load_compared(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """The model of a folder or repo, of either family, and its processor."""
    model_type = AutoConfig.from_pretrained(model).model_type
    processor = family_of(model_type).processor_class.from_pretrained(model)
    return COMPARED_CLASSES[model_type].from_pretrained(model, dtype=dtype).eval(), processor


@torch.no_grad()
def gather_evidence(
    model: Any,
    pixel_values: torch.Tensor,
    question_input_ids: torch.Tensor,
    question_attention_mask: torch.Tensor,
    constant_input_ids: torch.Tensor,
    row_of_question: torch.Tensor,
    image_sizes: torch.Tensor | None = None,
) -> Evidence:
    """What every published rule may look at, one row per question.

    Args:
        model: the inner model.
        pixel_values: [I, 3, H, W], or with tiles [I, tiles, 3, H, W], each image once.
        question_input_ids, question_attention_mask: [B, T].
        constant_input_ids: [1, T] the constant prompt, padded to the text tower's full length.
        row_of_question: [B] the image of each question.
        image_sizes: [I, 2] of a model that cuts images into tiles.
    """
    texts = (question_input_ids, question_attention_mask, constant_input_ids)
    if image_sizes is None:
        return read_towers(model, pixel_values, *texts, row_of_question, torch.arange(len(question_input_ids)))
    tiles = model.tiles_of(pixel_values, image_sizes)
    first, total = [], 0
    for each in tiles:
        first.append(total)
        total += each.num_tiles
    images = row_of_question.tolist()
    pairs = [(first[i] + number, question) for question, i in enumerate(images) for number in range(tiles[i].num_tiles)]
    tile, question = torch.tensor(pairs, device=pixel_values.device).unbind(1)
    of_tiles = read_towers(model, without_empty_tiles(pixel_values, tiles), *texts, tile, question)
    return TiledEvidence.of(replace(of_tiles, image=question), tuple(tiles[i] for i in images))


def read_towers(
    model: Any,
    pixel_values: torch.Tensor,
    question_input_ids: torch.Tensor,
    question_attention_mask: torch.Tensor,
    constant_input_ids: torch.Tensor,
    image: torch.Tensor,
    question: torch.Tensor,
) -> Evidence:
    """The evidence of rows [B], each of an image (or tile) and a question by their numbers."""
    tower = encoder_of(model.vision_tower)
    previous, last = tower.encoder.layers[-2:]
    hidden_states = model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    attention, keys = read_layer(last, hidden_states[-2], class_attention)
    previous_attention, previous_keys = read_layer(previous, hidden_states[-3], class_attention)
    first_attention, _ = read_layer(tower.encoder.layers[0], hidden_states[0], class_attention)
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    patches = torch.cat([hidden_states[index] for index in layers], dim=-1)[:, 1:]
    questions = model.question_tower(input_ids=question_input_ids)
    constant = model.question_tower(input_ids=constant_input_ids).last_hidden_state[:, -1]
    project_text = model.question_tower.text_projection

    image, question = image.to(patches.device), question.to(patches.device)
    embeds = model.get_question_embeds(question_input_ids)[question]
    relevance_embeds = {
        name: relevance_embeddings(tower, model.visual_projection, hidden_states, name)[image]
        for name in TEXT_RELEVANCES
    }
    relevance = {name: (each @ embeds[:, :, None]).squeeze(2) for name, each in relevance_embeds.items()}

    # A question's own tokens stand between its start and its end token.
    mask = question_attention_mask.bool()
    is_end = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    mask = mask & ~is_end
    mask[:, 0] = False
    side = round(patches.shape[1] ** 0.5)
    return Evidence(
        grid=(side, side),
        patches=patches[image],
        projected=model.multi_modal_projector(patches)[image],
        keys=keys[image],
        previous_keys=previous_keys[image],
        class_attention=attention[image],
        previous_class_attention=previous_attention[image],
        first_class_attention=first_attention[image],
        undivided_class_attention=read_layer(last, hidden_states[-2], undivided_class_attention)[image],
        patch_embeddings=model.visual_projection(tower.post_layernorm(hidden_states[-2][:, 1:]))[image],
        bare_patch_embeddings=model.visual_projection(hidden_states[-1][:, 1:])[image],
        question_embedding=embeds,
        question_token_embeddings=project_text(questions.last_hidden_state)[question],
        question_token_mask=mask[question],
        constant_guide=project_text(constant).expand(len(embeds), -1),
        relevance_embeds=relevance_embeds,
        relevance=relevance,
    )


def undivided_class_attention(layer: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """[I, N] attention of the class token over the patches with all heads taken as one, as in PruMerge's release."""
    normed = layer.layer_norm1(hidden_states)
    query, keys = layer.self_attn.q_proj(normed[:, :1]), layer.self_attn.k_proj(normed)
    logits = (query @ keys.transpose(1, 2)).squeeze(1) * keys.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32)[:, 1:]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
