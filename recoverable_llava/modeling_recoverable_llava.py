"""LLaVA with recoverable compression built in: two subclasses of the stock model, nothing patched.

`RecoverableLlavaModel` reads the class attention and keys off the vision tower's own hidden states, asks the CLIP text
tower about the question, lets `token_recovery` choose, and hands the language model a prompt without the surplus
placeholders. What callers see stays in the original numbering: `forward` spreads its outputs over the original
positions, `generate` returns the original prompt, a returned cache remembers what it stands for.

Three roads through the model, told apart per call by the prompt alone:

    N placeholders per image       compressed here, before the language model (adaptive or fixed budget);
    `visual_token_budget` of them  already short: the image yields exactly that many tokens, the rest is stock;
    compression off, or no image   stock LLaVA, untouched.

B prompts, I images, L tokens of the original prompt, S of the short one, N patches, C channels, K kept tokens, D size
of an embedding.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    Cache,
    CLIPTextModelWithProjection,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_recoverable_llava import RecoverableLlavaConfig
from .prompt_shortening import (
    CompressedHistory,
    ShortPrompt,
    locate_placeholders,
    place_tokens,
    shorten_prompt,
    spread_over_original,
    surviving_positions,
)
from .token_recovery import Assembly, Selection, assemble_tokens, gather_tokens, select_tokens


logger = logging.get_logger(__name__)

# Where a cache carries its CompressedHistory.
_HISTORY = "compressed_history"

# Checkpoints of stock LLaVA, in every layout that stock LLaVA reads, load into these classes too.
register_checkpoint_conversion_mapping(
    RecoverableLlavaConfig.model_type, get_checkpoint_conversion_mapping("llava"), overwrite=True
)
register_checkpoint_conversion_mapping(
    "RecoverableLlavaModel", get_checkpoint_conversion_mapping("LlavaModel"), overwrite=True
)


@dataclass(frozen=True)
class VisionFeatures:
    """What one pass of the vision tower yields for compression; reusable for any number of questions."""

    patches: torch.Tensor  # [I, N, C] features that LLaVA's projector takes
    class_tokens: torch.Tensor | None  # [I, 1, C] under the "full" strategy
    visual_scores: torch.Tensor  # [I, N] float32, class attention
    keys: torch.Tensor  # [I, N, C] attention keys
    relevance_embeds: torch.Tensor  # [I, N, D] float32: their dot product with a question's embedding is the relevance


@dataclass(frozen=True)
class Recovery:
    """What became of each image's patches, from `recover_tokens`."""

    selection: Selection
    assembly: Assembly
    visual_scores: torch.Tensor  # [I, N]
    text_scores: torch.Tensor | None  # [I, N]


class RecoverableLlavaModel(LlavaModel):
    config: RecoverableLlavaConfig

    def __init__(self, config: RecoverableLlavaConfig):
        super().__init__(config)
        self.question_tower = CLIPTextModelWithProjection._from_config(config.question_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.question_config.projection_dim, bias=False
        )
        self.post_init()

    # ------------------------------------------------------------------------------------------------ the two towers

    @torch.no_grad()
    def get_question_embeds(self, question_input_ids: torch.Tensor) -> torch.Tensor:
        """[R, D] float32 unit-norm embeddings of questions [R, T] in CLIP's joint space, pooled at their end token.

        Questions are padded on the right: the tower is causal, so what follows the end token has no influence and no
        mask is needed.
        """
        embeds = self.question_tower(input_ids=question_input_ids).text_embeds
        return nn.functional.normalize(embeds.float(), dim=-1)

    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> VisionFeatures:
        """One pass of the vision tower over [I, 3, H, W]; see `VisionFeatures`."""
        config = self.config
        layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        num_layers = len(tower.encoder.layers)
        attention_layer = config.attention_layer % num_layers
        feature_layers = [layer] if isinstance(layer, int) else list(layer)

        # Only these hidden states are kept in memory, where transformers can select them.
        used = {index % (num_layers + 1) for index in (*feature_layers, attention_layer, num_layers - 1, num_layers)}
        outputs = self.vision_tower(pixel_values, output_hidden_states=sorted(used), return_dict=True)
        hidden_states = outputs.hidden_states
        features = torch.cat([hidden_states[index] for index in feature_layers], dim=-1)
        with torch.no_grad():
            visual_scores, keys = self._class_attention(
                tower.encoder.layers[attention_layer], hidden_states[attention_layer]
            )
            relevance_embeds = self._relevance_embeds(tower, hidden_states)
        return VisionFeatures(
            patches=features[:, 1:],
            class_tokens=features[:, :1] if strategy == "full" else None,
            visual_scores=visual_scores,
            keys=keys,
            relevance_embeds=relevance_embeds,
        )

    @staticmethod
    def _class_attention(layer: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the class token over the patches [I, N], mean over heads, and the patches' keys [I, N, C].

        Recomputed from the layer's input for the class row alone, so the tower itself stays on SDPA or FlashAttention.
        """
        attention = layer.self_attn
        normed = layer.layer_norm1(hidden_states)
        keys = attention.k_proj(normed)
        query = attention.q_proj(normed[:, :1])
        keys_per_head = keys.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        query_per_head = query.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        logits = (query_per_head @ keys_per_head.transpose(2, 3)).squeeze(2) * attention.scale  # [I, heads, 1 + N]
        scores = logits.softmax(-1, dtype=torch.float32).mean(1)
        return scores[:, 1:], keys[:, 1:]

    def _relevance_embeds(self, tower: nn.Module, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[I, N, D] unit-norm patch embeddings in CLIP's joint space, by `config.text_relevance`."""
        last = len(tower.encoder.layers)
        if self.config.text_relevance == "projected":
            states = hidden_states[last][:, 1:]
        elif self.config.text_relevance == "negated":
            states = hidden_states[last - 1][:, 1:]
        else:
            # MaskCLIP (Zhou et al., 2022): the last block with its attention replaced by the identity.
            layer = tower.encoder.layers[-1]
            states = hidden_states[last - 1][:, 1:]
            states = states + layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(states)))
            states = states + layer.mlp(layer.layer_norm2(states))
        embeds = nn.functional.normalize(self.visual_projection(tower.post_layernorm(states)).float(), dim=-1)
        return -embeds if self.config.text_relevance == "negated" else embeds

    # ------------------------------------------------------------------------------------------------ choosing tokens

    def _select_tokens(
        self, vision: VisionFeatures, text_scores: torch.Tensor | None, has_question: torch.Tensor | None
    ) -> Selection:
        """Which patches stay, for each image; one row of `text_scores` and `has_question` per image."""
        config, num_class_tokens = self.config, 0 if vision.class_tokens is None else 1
        budget, limit = config.visual_token_budget, config.max_visual_tokens
        return select_tokens(
            vision.visual_scores,
            text_scores,
            has_question,
            visual_lof_neighbors=config.visual_lof_neighbors,
            text_lof_neighbors=config.text_lof_neighbors,
            merge_lof_neighbors=config.merge_lof_neighbors,
            lof_threshold=config.lof_threshold,
            merge_remaining=config.merge_remaining,
            min_visual_tokens=config.min_visual_tokens,
            max_visual_tokens=limit,
            visual_token_budget=None if budget is None else budget - num_class_tokens,
        )

    def _assemble_tokens(
        self,
        selection: Selection,
        vision: VisionFeatures,
        text_scores: torch.Tensor | None,
        has_question: torch.Tensor | None,
        num_tokens: int,
        num_merged: int,
    ) -> Assembly:
        """How each image's `num_tokens` tokens are made of its patches."""
        return assemble_tokens(
            selection,
            vision.visual_scores,
            vision.keys,
            text_scores,
            has_question,
            num_tokens=num_tokens,
            num_merged=num_merged,
            merge_neighbors=self.config.merge_neighbors,
            text_merge_weight=self.config.text_merge_weight,
        )

    def _project_tokens(self, vision: VisionFeatures, assembly: Assembly) -> torch.Tensor:
        """[I, K, D] visual tokens in the language model's space; the projector runs on these alone."""
        tokens = gather_tokens(vision.patches, assembly)
        if vision.class_tokens is not None:
            tokens = torch.cat([vision.class_tokens, tokens], dim=1)
        return self.multi_modal_projector(tokens)

    def _text_scores(
        self, vision: VisionFeatures, question: "_Question | None", row_of_image: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Relevance of every patch to its prompt's question [I, N], and whether there is one [I]."""
        if question is None:
            logger.warning_once(
                "No question was given (question_input_ids or question_embeds): visual tokens are chosen by class "
                "attention alone. RecoverableLlavaProcessor adds the question to the inputs."
            )
            return None, None
        device = vision.relevance_embeds.device
        embeds, present = question.embeds.to(device), question.present.to(device)
        if row_of_image is not None:
            row_of_image = row_of_image.to(device)
            embeds, present = embeds[row_of_image], present[row_of_image]
        return (vision.relevance_embeds @ embeds[:, :, None]).squeeze(2), present

    def _read_question(
        self,
        num_rows: int,
        question_input_ids: torch.Tensor | None,
        question_attention_mask: torch.Tensor | None,
        question_embeds: torch.Tensor | None,
    ) -> "_Question | None":
        rows = question_embeds if question_embeds is not None else question_input_ids
        if rows is None:
            return None
        if len(rows) != num_rows:
            name = "question_embeds" if question_embeds is not None else "question_input_ids"
            raise ValueError(
                f"{name} has {len(rows)} rows, but there are {num_rows} rows to guide: pass one question per prompt "
                "(get_image_features: one per image)."
            )
        if question_embeds is None:
            question_embeds = self.get_question_embeds(question_input_ids)
        if question_attention_mask is None:
            present = question_embeds.new_ones(len(rows), dtype=torch.bool)
        else:
            present = question_attention_mask.bool().any(1)
        return _Question(nn.functional.normalize(question_embeds.float(), dim=-1), present)

    def _num_patch_tokens(self, budget: int, vision: VisionFeatures) -> int:
        return budget - (0 if vision.class_tokens is None else 1)

    def _placeholders_per_image(self, vision_feature_select_strategy: str | None = None) -> int:
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        return self.config.num_patches + (1 if strategy == "full" else 0)

    def _is_short(self, input_ids: torch.Tensor, num_images: int, per_image: int) -> bool:
        """Whether the prompt carries `visual_token_budget` placeholders per image, not one per patch.

        Decided without looking at the ids where the prompt's length allows it: a host that waits for the device would
        spoil the fixed budget's purpose.
        """
        budget = self.config.visual_token_budget
        if budget is None or budget == per_image or torch.compiler.is_compiling():
            return budget is not None
        if input_ids.device.type != "cpu" and input_ids.shape[1] < per_image:
            return True
        count = int((input_ids == self.config.image_token_id).sum())
        if count == num_images * budget:
            return True
        if count == num_images * per_image:
            return False
        raise self._placeholder_error(count, num_images, per_image)

    def _placeholder_error(self, count: int, num_images: int, per_image: int) -> ValueError:
        budget = self.config.visual_token_budget
        short = "" if budget is None else f" (or visual_token_budget = {budget} each, {num_images * budget} in all)"
        return ValueError(
            f"The prompts have {count} image placeholders, but {num_images} images need {per_image} each, "
            f"{num_images * per_image} in all{short}, and an image's placeholders stand in one prompt. Prepare prompts "
            "and images together with the repo's processor."
        )

    def _budget_tokens(
        self, vision: VisionFeatures, question: "_Question | None", row_of_image: torch.Tensor | None
    ) -> torch.Tensor:
        """[I, visual_token_budget, D] visual tokens of a fixed budget: static shapes, nothing leaves the device."""
        budget = self.config.visual_token_budget
        with torch.no_grad():
            text_scores, has_question = self._text_scores(vision, question, row_of_image)
            num_tokens = self._num_patch_tokens(budget, vision)
            selection = self._select_tokens(vision, text_scores, has_question)
            assembly = self._assemble_tokens(selection, vision, text_scores, has_question, num_tokens, num_tokens)
        return self._project_tokens(vision, assembly)

    def compress_prompt(
        self,
        input_ids: torch.Tensor,
        vision: VisionFeatures,
        question: "_Question | None",
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> tuple[ShortPrompt, torch.Tensor]:
        """The short prompt of a batch, and its visual tokens [B, S, D], zero where there is text.

        Raises:
            ValueError: if the placeholders do not match the images.
        """
        num_images = len(vision.patches)
        per_image = vision.patches.shape[1] + (0 if vision.class_tokens is None else 1)
        num_class_tokens = per_image - vision.patches.shape[1]
        if self._is_short(input_ids, num_images, per_image):
            placeholders = locate_placeholders(
                input_ids, self.config.image_token_id, self.config.visual_token_budget, num_images
            )
            tokens = self._budget_tokens(vision, question, placeholders.row_of_image)
            short = _unshortened(input_ids, attention_mask, position_ids)
            return short, place_tokens(tokens.to(input_ids.device), placeholders, short)

        placeholders = locate_placeholders(input_ids, self.config.image_token_id, per_image, num_images)
        with torch.no_grad():
            if self.config.compress:
                text_scores, has_question = self._text_scores(vision, question, placeholders.row_of_image)
                selection = self._select_tokens(vision, text_scores, has_question)
                num_tokens, num_merged = selection.num_tokens, selection.num_merged
            else:
                num_tokens = torch.full((num_images,), vision.patches.shape[1], device=input_ids.device)
                num_merged = torch.zeros_like(num_tokens)
            keep = surviving_positions(
                placeholders, num_tokens.to(input_ids.device) + num_class_tokens, attention_mask
            )
            # The one copy to the host: everything that a shape or a check depends on.
            per_row = placeholders.mask.sum(1)
            facts = [num_tokens.max(), num_merged.max(), keep.sum(1).max(), per_row.sum(), (per_row % per_image).max()]
            longest, most_merged, short_length, count, uneven = torch.stack(
                [fact.to(input_ids.device) for fact in facts]
            ).tolist()
            if count != num_images * per_image or uneven:
                raise self._placeholder_error(count, num_images, per_image)
            short = shorten_prompt(
                input_ids, keep, short_length, self.config.image_token_id, attention_mask, position_ids
            )
            if self.config.compress:
                assembly = self._assemble_tokens(
                    selection, vision, text_scores, has_question, longest, most_merged
                )
        if self.config.compress:
            tokens = self._project_tokens(vision, assembly)
        else:
            features = vision.patches if vision.class_tokens is None else torch.cat(
                [vision.class_tokens, vision.patches], dim=1
            )
            tokens = self.multi_modal_projector(features)
        return short, place_tokens(tokens.to(input_ids.device), placeholders, short)

    # ------------------------------------------------------------------------------------------------ stock's interface

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple | BaseModelOutputWithPooling:
        """As stock; with `visual_token_budget`, `pooler_output` has exactly that many tokens for each image.

        Args:
            question_input_ids, question_attention_mask, question_embeds: one row per *image* here, as there is no prompt
                that could tell which image belongs to which question. Without them class attention chooses alone.
        """
        if not self.config.compress or self.config.visual_token_budget is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **kwargs,
            )
        self.config.validate_recovery()
        question = self._read_question(
            len(pixel_values), question_input_ids, question_attention_mask, question_embeds
        )
        vision = self.get_vision_features(pixel_values, vision_feature_layer, vision_feature_select_strategy)
        outputs = BaseModelOutputWithPooling(
            last_hidden_state=vision.patches, pooler_output=list(self._budget_tokens(vision, question, None))
        )
        return outputs if kwargs.get("return_dict", True) else outputs.to_tuple()

    @torch.no_grad()
    def recover_tokens(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        **unused_inputs: Any,
    ) -> Recovery:
        """Which patches stay, come back or are merged, for each image, without running the language model.

        Takes what the processor returns: `model.recover_tokens(**inputs)`.
        """
        self.config.validate_recovery()
        vision = self.get_vision_features(pixel_values) if vision_features is None else vision_features
        question = self._read_question(len(input_ids), question_input_ids, question_attention_mask, question_embeds)
        per_image = self._placeholders_per_image()
        if self._is_short(input_ids, len(vision.patches), per_image):
            per_image = self.config.visual_token_budget
        placeholders = locate_placeholders(input_ids, self.config.image_token_id, per_image, len(vision.patches))
        count = int(placeholders.mask.sum())
        if count != len(vision.patches) * per_image:
            raise self._placeholder_error(count, len(vision.patches), self._placeholders_per_image())
        text_scores, has_question = self._text_scores(vision, question, placeholders.row_of_image)
        selection = self._select_tokens(vision, text_scores, has_question)
        longest, most_merged = torch.stack([selection.num_tokens.max(), selection.num_merged.max()]).tolist()
        assembly = self._assemble_tokens(selection, vision, text_scores, has_question, longest, most_merged)
        return Recovery(selection, assembly, vision.visual_scores, text_scores)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        **kwargs: Any,
    ) -> Any:
        """As stock, with the surplus placeholders dropped before the language model.

        Outputs have the original length: a dropped position repeats the output of the last kept one before it.
        Attentions stay in the short numbering, which is the one that the language model ran in.

        Args:
            question_input_ids: [B, T] the question of each prompt for the CLIP text tower, padded on the right.
            question_attention_mask: [B, T]; a row without any 1 has no question.
            question_embeds: [B, D] embeddings from `get_question_embeds`, instead of ids: for one question, many images.
            visual_embeds: [B, S, D] visual tokens aligned with `input_ids`, which are then short already. Used by
                `generate`.
            vision_features: from `get_vision_features`, instead of `pixel_values`: for one image, many questions.

        Raises:
            ValueError: if placeholders, images, questions, mask or cache do not belong together.
        """
        history = getattr(past_key_values, _HISTORY, None)
        has_images = pixel_values is not None or vision_features is not None
        if visual_embeds is not None:
            text_embeds = self.get_input_embeddings()(input_ids)
            is_visual = (input_ids == self.config.image_token_id)[:, :, None]
            return super().forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=torch.where(is_visual, visual_embeds.to(text_embeds), text_embeds),
                **kwargs,
            )
        if history is None and (
            not has_images or not self.config.compress or input_ids is None or kwargs.get("mm_encoder_outputs")
        ):
            return super().forward(
                input_ids=input_ids,
                pixel_values=pixel_values,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **kwargs,
            )

        self.config.validate_recovery()
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError(
                "attention_mask must have shape [batch, length] where visual tokens are dropped, as a mask over pairs "
                "of positions cannot follow. Pass a mask of that shape, or set config.compress = False."
            )
        cached_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        tokens = input_ids if input_ids is not None else inputs_embeds
        if cached_length and history is None:
            history = _uncompressed_history(tokens, cached_length, attention_mask)
        if history is not None:
            history = history.cropped(cached_length)
        new_mask = _mask_of_new_tokens(tokens, attention_mask, history)
        if has_images:
            question = self._read_question(len(input_ids), question_input_ids, question_attention_mask, question_embeds)
            if vision_features is None:
                vision_features = self.get_vision_features(
                    pixel_values, vision_feature_layer, vision_feature_select_strategy
                )
            short, visual_embeds = self.compress_prompt(input_ids, vision_features, question, new_mask, position_ids)
        else:
            ids = input_ids if input_ids is not None else tokens.new_full(tokens.shape[:2], -1, dtype=torch.long)
            short, visual_embeds = _unshortened(ids, new_mask, position_ids), None
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(short.input_ids)
        if visual_embeds is not None:
            is_visual = (short.input_ids == self.config.image_token_id)[:, :, None]
            inputs_embeds = torch.where(is_visual, visual_embeds.to(inputs_embeds), inputs_embeds)

        short_mask, short_positions = short.attention_mask, short.position_ids
        if history is not None:
            short_mask = torch.cat([history.short_attention_mask, short_mask], dim=1)
            if position_ids is None:
                short_positions = (short_mask.cumsum(1) - 1).clamp(min=0)[:, -short.input_ids.shape[1] :]
            else:
                num_dropped = history.attention_mask.sum(1) - history.short_attention_mask.sum(1)
                short_positions = short_positions - num_dropped[:, None]
        # Without a mask a single row has no padding, and packed sequences are recognised by their positions.
        is_dense = attention_mask is None and history is None and len(tokens) == 1
        outputs = super().forward(
            attention_mask=None if is_dense else short_mask,
            position_ids=short_positions,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if outputs.past_key_values is not None:
            original_mask = torch.ones_like(short.spread) if new_mask is None else new_mask.long()
            empty = _empty_history(original_mask)
            ids = input_ids if input_ids is not None else short.input_ids
            extended = (history or empty).extended(ids, original_mask, short.input_ids, short.attention_mask)
            setattr(outputs.past_key_values, _HISTORY, extended)
        if short.input_ids.shape[1] != tokens.shape[1]:
            outputs.last_hidden_state = spread_over_original(outputs.last_hidden_state, short)
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(spread_over_original(states, short) for states in outputs.hidden_states)
        return outputs


@dataclass(frozen=True)
class _Question:
    embeds: torch.Tensor  # [R, D] float32 unit norm
    present: torch.Tensor  # [R] bool


def _unshortened(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
) -> ShortPrompt:
    """A prompt that is short already, in the form of a shortened one."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    return ShortPrompt(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=counted if position_ids is None else position_ids.expand_as(input_ids),
        source=positions,
        spread=positions,
    )


def _empty_history(like: torch.Tensor) -> CompressedHistory:
    nothing = like.new_zeros(len(like), 0)
    return CompressedHistory(nothing, nothing, nothing, nothing, 0)


def _uncompressed_history(
    tokens: torch.Tensor, cached_length: int, attention_mask: torch.Tensor | None
) -> CompressedHistory:
    """The history of a cache from an uncompressed prefill, whose ids are not known."""
    ids = torch.full((len(tokens), cached_length), -1, dtype=torch.long, device=tokens.device)
    if attention_mask is not None and attention_mask.shape[1] >= cached_length + tokens.shape[1]:
        mask = attention_mask[:, :cached_length].long()
    else:
        mask = torch.ones_like(ids)
    return CompressedHistory(ids, mask, ids, mask, 0)


def _mask_of_new_tokens(
    tokens: torch.Tensor, attention_mask: torch.Tensor | None, history: CompressedHistory | None
) -> torch.Tensor | None:
    """The last columns [B, L] of a mask that may also cover what is cached, in either numbering."""
    if attention_mask is None:
        return None
    length = tokens.shape[1]
    allowed = {length}
    if history is not None:
        allowed |= {history.input_ids.shape[1] + length, history.short_input_ids.shape[1] + length}
    if attention_mask.shape[1] not in allowed:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {length} new tokens, but must cover the new "
            f"tokens, or these and what past_key_values stands for: one of {sorted(allowed)} columns."
        )
    return attention_mask[:, -length:]


class RecoverableLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config: RecoverableLlavaConfig

    def __init__(self, config: RecoverableLlavaConfig):
        # LlavaForConditionalGeneration's own __init__ would build a second language model.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = RecoverableLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_question_embeds(self, question_input_ids: torch.Tensor) -> torch.Tensor:
        """See `RecoverableLlavaModel.get_question_embeds`."""
        return self.model.get_question_embeds(question_input_ids)

    def get_vision_features(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """See `RecoverableLlavaModel.get_vision_features`."""
        return self.model.get_vision_features(pixel_values)

    def recover_tokens(self, **inputs: Any) -> Recovery:
        """See `RecoverableLlavaModel.recover_tokens`."""
        return self.model.recover_tokens(**inputs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        **kwargs: Any,
    ) -> Any:
        """As stock, with the arguments of `RecoverableLlavaModel.forward`.

        Where tokens are dropped, a label on an image placeholder, or behind padding, is ignored: neither has a prediction
        of its own.
        """
        has_images = pixel_values is not None or vision_features is not None
        if labels is not None and has_images and self.config.compress and input_ids is not None:
            ignored = input_ids == self.config.image_token_id
            if attention_mask is not None and attention_mask.shape == input_ids.shape:
                behind_padding = torch.nn.functional.pad(attention_mask[:, :-1] == 0, (1, 0), value=False)
                ignored = ignored | behind_padding
            labels = labels.masked_fill(ignored, -100)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            question_embeds=question_embeds,
            visual_embeds=visual_embeds,
            vision_features=vision_features,
            **kwargs,
        )

    # ------------------------------------------------------------------------------------------------ generation

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As stock; `visual_embeds` [B, S, D] is cut to the tokens of this step, and left out once they are cached."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if visual_embeds is not None and model_inputs.get("input_ids") is not None:
            length = model_inputs["input_ids"].shape[1]
            # A decode step reads one token; asking a static cache for its length then would wait for the device.
            if is_first_iteration or length > 1:
                start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
                if start < visual_embeds.shape[1]:
                    part = visual_embeds[:, start : start + length]
                    model_inputs["visual_embeds"] = nn.functional.pad(part, (0, 0, 0, length - part.shape[1]))
        return model_inputs

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: dict[str, Any], assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        # An assistant gets the keyword arguments of this model; only one of the same kind and width can read the
        # visual tokens, any other drafts from the text.
        visual_embeds = model_kwargs.get("visual_embeds")
        if assistant_model is not None and visual_embeds is not None:
            width = assistant_model.get_input_embeddings().weight.shape[-1]
            if not isinstance(assistant_model, type(self)) or width != visual_embeds.shape[-1]:
                model_kwargs = {name: value for name, value in model_kwargs.items() if name != "visual_embeds"}
        return super()._get_candidate_generator(
            *args, model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As stock `generate`, over a prompt that is compressed once, before the loop.

        The loop runs on the short prompt. Returned sequences, the streamer and every callback of the caller see the
        original one, and `max_length` / `min_length` count it. Scores are as ever; attentions and hidden states of the
        prompt have the short length. A returned cache can be continued with the full history or with new tokens alone.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        cache, history = kwargs.get("past_key_values"), getattr(kwargs.get("past_key_values"), _HISTORY, None)
        has_images = kwargs.get("pixel_values") is not None or kwargs.get("vision_features") is not None
        has_embeds = any(
            kwargs.get(name) is not None for name in ("inputs_embeds", "visual_embeds", "mm_encoder_outputs")
        )
        if input_ids is None or has_embeds or (history is None and not (has_images and self.config.compress)):
            if self.config.compress and not (has_images or has_embeds or input_ids is None or cache is not None):
                count = int((input_ids == self.config.image_token_id).sum())
                if count:
                    raise ValueError(
                        f"The prompts have {count} image placeholders, but no images were passed: add pixel_values."
                    )
            return super().generate(
                inputs,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                **kwargs,
            )

        kwargs.pop("input_ids", None)
        self.config.validate_recovery()
        prompt = self._compress_for_generation(input_ids, cache, history, kwargs)
        generation_config, kwargs = self._count_original_length(prompt, generation_config, kwargs)
        if streamer is not None:
            streamer = _OriginalPromptStreamer(streamer, prompt)
        if prefix_allowed_tokens_fn is not None:
            allowed_tokens = prefix_allowed_tokens_fn

            def prefix_allowed_tokens_fn(row: int, ids: torch.Tensor) -> list[int]:
                return allowed_tokens(row, torch.cat([prompt.given_ids[row], ids[prompt.loop_ids.shape[1] :]]))

        if cache is not None and hasattr(cache, _HISTORY):
            delattr(cache, _HISTORY)  # inside the loop it is an ordinary cache of the short prompt
        try:
            result = super().generate(
                prompt.loop_ids,
                generation_config=generation_config,
                logits_processor=_see_original_prompt(logits_processor, prompt, LogitsProcessorList),
                stopping_criteria=_see_original_prompt(stopping_criteria, prompt, StoppingCriteriaList),
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                attention_mask=prompt.short_attention_mask,
                visual_embeds=prompt.visual_embeds,
                **kwargs,
            )
        except BaseException:
            if history is not None:
                setattr(cache, _HISTORY, history)
            raise
        is_tensor = isinstance(result, torch.Tensor)
        short_sequences = result if is_tensor else result.sequences
        cache = cache if is_tensor else result.past_key_values
        if cache is not None:
            prompt.remember(cache, short_sequences)
        if is_tensor:
            return prompt.restore(short_sequences)
        result.sequences = prompt.restore(short_sequences)
        return result

    def _compress_for_generation(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None,
        history: CompressedHistory | None,
        kwargs: dict[str, Any],
    ) -> "_GenerationPrompt":
        """The short prompt for the loop. Takes what it uses out of `kwargs`."""
        attention_mask = kwargs.pop("attention_mask", None)
        position_ids = kwargs.pop("position_ids", None)
        pixel_values, vision = kwargs.pop("pixel_values", None), kwargs.pop("vision_features", None)
        layer, strategy = kwargs.pop("vision_feature_layer", None), kwargs.pop("vision_feature_select_strategy", None)
        question_names = ("question_input_ids", "question_attention_mask", "question_embeds")
        question_inputs = {name: kwargs.pop(name, None) for name in question_names}

        cached_length = 0 if cache is None else int(cache.get_seq_length())
        is_full = True
        if cached_length:
            history = history or _uncompressed_history(input_ids[:, :0], cached_length, attention_mask)
            history = history.cropped(cached_length)
            is_full = _is_full_history(input_ids, attention_mask, history)
        else:
            history = _empty_history(input_ids)
        num_past = history.input_ids.shape[1] if is_full else 0
        new_ids = input_ids[:, num_past:]
        if new_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, and past_key_values holds as many: there is no new token "
                "to go on from. Pass at least one token that is not cached."
            )
        if attention_mask is not None:
            new_mask = attention_mask[:, -new_ids.shape[1] :]
        else:
            new_mask = torch.ones_like(new_ids)

        per_image = self.model._placeholders_per_image(strategy)
        if pixel_values is not None and num_past:
            pixel_values = self._images_of_new_tokens(pixel_values, input_ids, new_ids, per_image)
        if pixel_values is None and vision is None:
            short, visual_embeds = _unshortened(new_ids, new_mask, None), None
        else:
            question = self.model._read_question(len(input_ids), **question_inputs)
            if vision is None:
                vision = self.model.get_vision_features(pixel_values, layer, strategy)
            new_positions = None if position_ids is None else position_ids[:, -new_ids.shape[1] :]
            short, visual_embeds = self.model.compress_prompt(new_ids, vision, question, new_mask, new_positions)
            visual_embeds = nn.functional.pad(visual_embeds, (0, 0, cached_length, 0))
        if position_ids is not None and not cached_length:
            kwargs["position_ids"] = short.position_ids
        extended = history.extended(new_ids, new_mask.long(), short.input_ids, short.attention_mask)
        return _GenerationPrompt(
            given_ids=input_ids,
            loop_ids=extended.short_input_ids if is_full else short.input_ids,
            short_attention_mask=extended.short_attention_mask,
            visual_embeds=visual_embeds,
            history=extended,
        )

    def _images_of_new_tokens(
        self, pixel_values: torch.Tensor, input_ids: torch.Tensor, new_ids: torch.Tensor, per_image: int
    ) -> torch.Tensor | None:
        """Of the images of a full history, those whose placeholders are new; images of the new part alone stay."""
        image_token_id, budget = self.config.image_token_id, self.config.visual_token_budget
        in_all, in_new = ((ids == image_token_id).sum(1) for ids in (input_ids, new_ids))
        counts = torch.stack([in_all, in_new]).tolist()
        for placeholders in {per_image, budget or per_image}:
            num_all, num_new = ([count // placeholders for count in row] for row in counts)
            if sum(num_new) == len(pixel_values):
                return pixel_values
            if sum(num_all) == len(pixel_values):
                is_new = [[False] * (a - n) + [True] * n for a, n in zip(num_all, num_new)]
                index = torch.tensor([new for row in is_new for new in row], device=pixel_values.device)
                return pixel_values[index] if any(num_new) else None
        raise self.model._placeholder_error(sum(counts[1]), len(pixel_values), per_image)

    def _count_original_length(
        self, prompt: "_GenerationPrompt", generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig | None, dict[str, Any]]:
        """Make explicit `max_length` and `min_length` count the original prompt, as they do in stock `generate`."""
        given_length = prompt.given_ids.shape[1]
        surplus = given_length - prompt.loop_ids.shape[1]
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)

        def setting(name: str) -> Any:
            if kwargs.get(name) is not None:
                return kwargs[name]
            in_config = getattr(generation_config, name, None)
            return in_config if in_config is not None else getattr(self.generation_config, name, None)

        max_length, min_length = setting("max_length"), setting("min_length")
        changed = {}
        if max_length is not None and setting("max_new_tokens") is None:
            if max_length <= given_length:
                raise ValueError(
                    f"max_length is {max_length}, but the prompt alone has {given_length} tokens (image placeholders "
                    "included): increase max_length or, better yet, set max_new_tokens."
                )
            changed["max_length"] = max_length - surplus
        if min_length and setting("min_new_tokens") is None:
            changed["min_length"] = max(min_length - surplus, 0)
        for name, value in changed.items():
            if generation_config is not None and kwargs.get(name) is None:
                setattr(generation_config, name, value)
            else:
                kwargs[name] = value
        return generation_config, kwargs


@dataclass
class _GenerationPrompt:
    """A prompt as the caller gave it, and as the generation loop sees it."""

    given_ids: torch.Tensor  # [B, L]
    loop_ids: torch.Tensor  # [B, S]
    short_attention_mask: torch.Tensor  # [B, cached + new]
    visual_embeds: torch.Tensor | None  # [B, cached + new, D]
    history: CompressedHistory  # all that will be cached once this prompt is

    def restore(self, ids: torch.Tensor) -> torch.Tensor:
        """Sequences of the loop, [B * beams, S + new], with the original prompt in front."""
        given = self.given_ids.repeat_interleave(len(ids) // len(self.given_ids), dim=0).to(ids.device)
        return torch.cat([given, ids[:, self.loop_ids.shape[1] :]], dim=1)

    def remember(self, cache: Cache, sequences: torch.Tensor) -> None:
        """Give the cache the history that it holds: this prompt and the answers."""
        repeats = len(sequences) // len(self.given_ids)
        if len(sequences) != self._num_cached_rows(cache):
            return  # beams: the rows of the cache are not those of the sequences, and stock cannot go on from it either
        history = CompressedHistory(
            *(getattr(self.history, name).repeat_interleave(repeats, dim=0) for name in (
                "input_ids", "attention_mask", "short_input_ids", "short_attention_mask"
            )),
            self.history.irreducible_length,
        )
        answer = sequences[:, self.loop_ids.shape[1] :]
        present = torch.ones_like(answer)
        history = history.extended(answer, present, answer, present)
        setattr(cache, _HISTORY, history.cropped(int(cache.get_seq_length())))

    @staticmethod
    def _num_cached_rows(cache: Cache) -> int:
        return next((len(layer.keys) for layer in cache.layers if getattr(layer, "keys", None) is not None), 0)


def _is_full_history(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, history: CompressedHistory
) -> bool:
    """Whether `input_ids` repeats what the cache stands for, or is new altogether.

    Raises:
        ValueError: if it is neither.
    """
    num_past, length = history.input_ids.shape[1], input_ids.shape[1]
    past = history.input_ids.to(input_ids.device)
    if len(past) != len(input_ids):
        raise ValueError(f"input_ids has {len(input_ids)} rows, but past_key_values stands for {len(past)}.")
    if attention_mask is not None and attention_mask.shape[1] != length:
        allowed = {num_past + length, history.short_input_ids.shape[1] + length}
        if attention_mask.shape[1] not in allowed:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but must cover input_ids ({length}), or these "
                f"and what past_key_values stands for: one of {sorted({length, *allowed})} columns."
            )
        return False
    if length > num_past:
        is_same = (past == input_ids[:, :num_past]) | (past == -1) | (history.attention_mask.to(past.device) == 0)
        if bool(is_same.all()):
            return True
        raise ValueError(
            "past_key_values does not belong to a prefix of input_ids: they differ within the first "
            f"{num_past} tokens that it stands for. Start without past_key_values, or, to pass new tokens alone, give "
            f"an attention_mask of {num_past + length} columns."
        )
    return False


class _OriginalPromptStreamer:
    """Shows a streamer the original prompt instead of the short one, which is the first thing that `generate` puts."""

    def __init__(self, streamer: Any, prompt: _GenerationPrompt):
        self.streamer, self.prompt, self.is_first = streamer, prompt, True

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(self.prompt.restore(value) if self.is_first else value)
        self.is_first = False

    def end(self) -> None:
        self.streamer.end()


class _OriginalPromptCallback:
    """Shows a logits processor or stopping criterion the original prompt; otherwise it is that object."""

    def __init__(self, callback: Any, prompt: _GenerationPrompt):
        self.callback, self.prompt = callback, prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        return self.callback(self.prompt.restore(input_ids), scores)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.callback, name)


def _see_original_prompt(callbacks: list | None, prompt: _GenerationPrompt, list_class: type) -> list | None:
    if callbacks is None:
        return None
    return list_class(_OriginalPromptCallback(callback, prompt) for callback in callbacks)


__all__ = ["RecoverableLlavaForConditionalGeneration", "RecoverableLlavaModel"]
