"""Our model with the choice of tokens left open, so that every method runs through the same prompt, cache and loop.

`ComparedLlava` overrides the two steps in which `RecoverableLlavaModel` chooses and assembles tokens, and nothing else.
`gather_evidence` reads what published rules look at off the same towers.

B prompts, I images, N patches, K kept tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recoverable_llava.token_recovery import Assembly, Selection

from evaluation.evidence import Evidence
from evaluation.peers import SelectionRule
from recoverable_llava import (
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    VisionFeatures,
)
from recoverable_llava.tools.settings import configured


# What LLaVA-1.5's prompt starts with, which is what the paper's release guides by.
CONSTANT_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)


class ComparedModel(RecoverableLlavaModel):
    """`rule` chooses the tokens from `evidence` with `budget`; without a rule the model's own method does."""

    rule: SelectionRule | None = None
    evidence: Evidence | None = None
    budget: int | None = None
    selector_seconds: float = 0.0
    num_tokens: torch.Tensor | None = None  # [I] of the last choice
    _assembly: Assembly | None = None

    def _select_tokens(
        self, vision: VisionFeatures, text_scores: torch.Tensor | None, has_question: torch.Tensor | None
    ) -> Selection:
        with self._timed(vision.patches.device):
            if self.rule is None:
                selection = super()._select_tokens(vision, text_scores, has_question)
            else:
                self._assembly = self.rule(self.evidence, self.budget)
                selection = _counts_of(self._assembly, vision.visual_scores)
        self.num_tokens = selection.num_tokens
        return selection

    def _assemble_tokens(self, selection: Selection, vision: VisionFeatures, *args: Any) -> Assembly:
        if self.rule is not None:
            return self._assembly
        with self._timed(vision.patches.device):
            return super()._assemble_tokens(selection, vision, *args)

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        _wait_for(device)
        start = time.perf_counter()
        yield
        _wait_for(device)
        self.selector_seconds += time.perf_counter() - start


class ComparedLlava(RecoverableLlavaForConditionalGeneration):
    """`RecoverableLlavaForConditionalGeneration` around a `ComparedModel`."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> RecoverableLlavaForConditionalGeneration:
        """Loaded as the package's own class, whose inner model then turns into a `ComparedModel`."""
        model = RecoverableLlavaForConditionalGeneration.from_pretrained(*args, **kwargs)
        model.model.__class__ = ComparedModel
        return model


@torch.no_grad()
def gather_evidence(
    model: RecoverableLlavaModel,
    pixel_values: torch.Tensor,
    question_input_ids: torch.Tensor,
    question_attention_mask: torch.Tensor,
    constant_input_ids: torch.Tensor,
    row_of_question: torch.Tensor,
) -> Evidence:
    """What every published rule may look at, one row per question.

    Args:
        pixel_values: [I, 3, H, W], each image once.
        question_input_ids, question_attention_mask: [B, T].
        constant_input_ids: [1, T] the constant prompt, padded to the text tower's full length.
        row_of_question: [B] the image of each question.
    """
    tower = getattr(model.vision_tower, "vision_model", model.vision_tower)
    last, previous = tower.encoder.layers[-1], tower.encoder.layers[-2]
    hidden_states = model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    class_attention, keys = model._class_attention(last, hidden_states[-2])
    previous_class_attention, previous_keys = model._class_attention(previous, hidden_states[-3])
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    patches = torch.cat([hidden_states[index] for index in layers], dim=-1)[:, 1:]
    questions = model.question_tower(input_ids=question_input_ids)
    constant = model.question_tower(input_ids=constant_input_ids).last_hidden_state[:, -1]
    project_text = model.question_tower.text_projection

    embeds = model.get_question_embeds(question_input_ids)
    relevance_embeds = {}
    for name in ("projected", "negated", "value"):
        with configured(model.config, text_relevance=name):
            relevance_embeds[name] = model._relevance_embeds(tower, hidden_states)[row_of_question]
    relevance = {name: (each @ embeds[:, :, None]).squeeze(2) for name, each in relevance_embeds.items()}

    # A question's own tokens stand between its start and its end token.
    mask = question_attention_mask.bool()
    is_end = mask & (mask.long().cumsum(1) == mask.sum(1, keepdim=True))
    mask = mask & ~is_end
    mask[:, 0] = False
    side = round(patches.shape[1] ** 0.5)
    return Evidence(
        grid=(side, side),
        patches=patches[row_of_question],
        projected=model.multi_modal_projector(patches)[row_of_question],
        keys=keys[row_of_question],
        previous_keys=previous_keys[row_of_question],
        class_attention=class_attention[row_of_question],
        previous_class_attention=previous_class_attention[row_of_question],
        undivided_class_attention=_undivided_class_attention(last, hidden_states[-2])[row_of_question],
        patch_embeddings=model.visual_projection(tower.post_layernorm(hidden_states[-2][:, 1:]))[row_of_question],
        bare_patch_embeddings=model.visual_projection(hidden_states[-1][:, 1:])[row_of_question],
        question_embedding=embeds,
        question_token_embeddings=project_text(questions.last_hidden_state),
        question_token_mask=mask,
        constant_guide=project_text(constant).expand(len(embeds), -1),
        relevance_embeds=relevance_embeds,
        relevance=relevance,
    )


def _undivided_class_attention(layer: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """[I, N] attention of the class token over the patches with all heads taken as one, as in PruMerge's release."""
    normed = layer.layer_norm1(hidden_states)
    query, keys = layer.self_attn.q_proj(normed[:, :1]), layer.self_attn.k_proj(normed)
    logits = (query @ keys.transpose(1, 2)).squeeze(1) * keys.shape[-1] ** -0.5
    return logits.softmax(-1, dtype=torch.float32)[:, 1:]


def _counts_of(assembly: Assembly, visual_scores: torch.Tensor) -> Selection:
    """A `Selection` that says no more than how many tokens an assembly has."""
    nothing = torch.zeros_like(visual_scores, dtype=torch.bool)
    num_tokens = assembly.token_mask.sum(1)
    num_merged = torch.full_like(num_tokens, assembly.merge_weights.shape[1])
    return Selection(
        kept_by_vision=nothing,
        recovered_by_text=nothing,
        merge_centres=nothing,
        merges_remaining=nothing[:, 0],
        num_visual=num_tokens,
        num_text=torch.zeros_like(num_tokens),
        num_merged=num_merged,
        num_tokens=num_tokens,
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
