"""Our model with the choice of tokens left open, so that every method runs through the same prompt, cache and loop.

`ComparedModel` overrides the two steps in which `RecoverableLlavaModel` chooses and assembles tokens, and nothing else.
`gather_evidence` reads what published rules look at off the same towers.

B prompts, I images, N patches, K kept tokens.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from evaluation.evidence import Evidence
from evaluation.peers import SelectionRule
from recoverable_llava import RecoverableLlavaForConditionalGeneration, RecoverableLlavaModel
from recoverable_llava.clip_scores import class_attention, read_layer, relevance_embeddings
from recoverable_llava.recoverable_vision import ScoredImages
from recoverable_llava.recovery_settings import TEXT_RELEVANCES, RecoverySettings
from recoverable_llava.selection import Selection
from recoverable_llava.token_assembly import Assembly
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
        num_images, num_merged, num_patches = assembly.merge_weights.shape
        exists = assembly.token_mask.new_zeros(num_images, num_patches + num_merged)
        kept = exists.scatter(1, assembly.token_index, assembly.token_mask)[:, :num_patches]
        return cls(kept, torch.zeros_like(kept), None, torch.zeros_like(kept[:, 0]), assembly)

    @property
    def num_merged(self) -> torch.Tensor:
        return self.num_tokens - self.num_visual

    @property
    def num_tokens(self) -> torch.Tensor:
        return self.assembly.token_mask.sum(1)


class ComparedModel(RecoverableLlavaModel):
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

    @contextmanager
    def _timed(self, device: torch.device) -> Iterator[None]:
        _wait_for(device)
        start = time.perf_counter()
        yield
        _wait_for(device)
        self.selector_seconds += time.perf_counter() - start


class ComparedLlava(RecoverableLlavaForConditionalGeneration):
    """`RecoverableLlavaForConditionalGeneration` around a `ComparedModel`."""

    model_class = ComparedModel


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
    tower = encoder_of(model.vision_tower)
    previous, last = tower.encoder.layers[-2:]
    hidden_states = model.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    attention, keys = read_layer(last, hidden_states[-2], class_attention)
    previous_attention, previous_keys = read_layer(previous, hidden_states[-3], class_attention)
    layer = model.config.vision_feature_layer
    layers = [layer] if isinstance(layer, int) else layer
    patches = torch.cat([hidden_states[index] for index in layers], dim=-1)[:, 1:]
    questions = model.question_tower(input_ids=question_input_ids)
    constant = model.question_tower(input_ids=constant_input_ids).last_hidden_state[:, -1]
    project_text = model.question_tower.text_projection

    embeds = model.get_question_embeds(question_input_ids)
    relevance_embeds = {
        name: relevance_embeddings(tower, model.visual_projection, hidden_states, name)[row_of_question]
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
        patches=patches[row_of_question],
        projected=model.multi_modal_projector(patches)[row_of_question],
        keys=keys[row_of_question],
        previous_keys=previous_keys[row_of_question],
        class_attention=attention[row_of_question],
        previous_class_attention=previous_attention[row_of_question],
        undivided_class_attention=read_layer(last, hidden_states[-2], undivided_class_attention)[row_of_question],
        patch_embeddings=model.visual_projection(tower.post_layernorm(hidden_states[-2][:, 1:]))[row_of_question],
        bare_patch_embeddings=model.visual_projection(hidden_states[-1][:, 1:])[row_of_question],
        question_embedding=embeds,
        question_token_embeddings=project_text(questions.last_hidden_state),
        question_token_mask=mask,
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
