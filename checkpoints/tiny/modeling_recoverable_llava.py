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
from contextlib import AbstractContextManager, nullcontext
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
from .original_prompt import GenerationPrompt, OriginalPromptStreamer, see_original_prompt
from .prompt_shortening import (
    HISTORY,
    CompressedHistory,
    ShortPrompt,
    empty_history,
    is_full_history,
    locate_placeholders,
    mask_of_new_tokens,
    place_tokens,
    shorten_prompt,
    spread_over_original,
    surviving_positions,
    uncompressed_history,
    unshortened_prompt,
)
from .token_recovery import Assembly, Selection, assemble_tokens, gather_tokens, select_tokens


logger = logging.get_logger(__name__)

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

    @property
    def num_class_tokens(self) -> int:
        return 0 if self.class_tokens is None else 1

    def with_class_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [I, K, C] behind the class token, where the strategy is "full"."""
        return tokens if self.class_tokens is None else torch.cat([self.class_tokens, tokens], dim=1)


@dataclass(frozen=True)
class Recovery:
    """What became of each image's patches, from `recover_tokens`."""

    selection: Selection
    assembly: Assembly
    visual_scores: torch.Tensor  # [I, N]
    text_scores: torch.Tensor | None  # [I, N]


class RecoverableLlavaModel(LlavaModel):
    config: RecoverableLlavaConfig

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # transformers looks the layouts of checkpoints up by the class's name.
        super().__init_subclass__(**kwargs)
        register_checkpoint_conversion_mapping(
            cls.__name__, get_checkpoint_conversion_mapping("LlavaModel"), overwrite=True
        )

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
        tower: Any = getattr(self.vision_tower, "vision_model", self.vision_tower)
        num_layers = len(tower.encoder.layers)
        attention_layer = config.attention_layer % num_layers
        feature_layers = [layer] if isinstance(layer, int) else list(layer)

        # All of them: which states a list of indices selects differs between transformers 5.12, 5.17 and 5.23.
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
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
            relevance_embeds=relevance_embeds.to(features.device),  # a device_map may put the projection elsewhere
        )

    def _vision_of(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: VisionFeatures | None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> VisionFeatures:
        if vision_features is not None:
            return vision_features
        if pixel_values is None:
            raise ValueError("Neither pixel_values nor vision_features was given: pass one of them.")
        return self.get_vision_features(pixel_values, vision_feature_layer, vision_feature_select_strategy)

    @staticmethod
    def _class_attention(layer: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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

    def _relevance_embeds(self, tower: Any, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
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

    @torch.no_grad()
    def _as_the_language_model_sees(self, patches: torch.Tensor) -> torch.Tensor:
        """[I, N, D] projected patches: what is a near copy of what is decided by what reads them."""
        return self.multi_modal_projector(patches).to(patches.device)

    def _select_tokens(
        self, vision: VisionFeatures, text_scores: torch.Tensor | None, has_question: torch.Tensor | None
    ) -> Selection:
        """Which patches stay, for each image; one row of `text_scores` and `has_question` per image."""
        config, budget, limit = self.config, self.config.visual_token_budget, self.config.max_visual_tokens
        features = self._as_the_language_model_sees(vision.patches) if config.diversity else None
        with _full_precision(vision.visual_scores):
            return select_tokens(
                vision.visual_scores,
                text_scores,
                has_question,
                features=features,
                grid_width=config.grid_width,
                novelty_threshold=config.novelty_threshold,
                text_share=config.text_share,
                text_reach=config.text_reach,
                visual_lof_neighbors=config.visual_lof_neighbors,
                text_lof_neighbors=config.text_lof_neighbors,
                merge_lof_neighbors=config.merge_lof_neighbors,
                lof_threshold=config.lof_threshold,
                merge_centres=config.merge_centres,
                merge_remaining=config.merge_remaining,
                min_visual_tokens=config.min_visual_tokens,
                max_visual_tokens=None if limit is None else limit - vision.num_class_tokens,
                visual_token_budget=None if budget is None else budget - vision.num_class_tokens,
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
        with _full_precision(vision.visual_scores):
            return assemble_tokens(
                selection,
                vision.visual_scores,
                vision.keys,
                text_scores,
                has_question,
                num_tokens=num_tokens,
                num_merged=num_merged,
                merge_centres=self.config.merge_centres,
                merge_neighbors=self.config.merge_neighbors,
                text_merge_weight=self.config.text_merge_weight,
            )

    def _project_tokens(self, vision: VisionFeatures, assembly: Assembly) -> torch.Tensor:
        """[I, K, D] visual tokens in the language model's space; gradients flow through these alone."""
        return self.multi_modal_projector(vision.with_class_token(gather_tokens(vision.patches, assembly)))

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
        with _full_precision(embeds):
            return (vision.relevance_embeds @ embeds[:, :, None]).squeeze(2), present

    def _read_question(
        self,
        num_rows: int,
        question_input_ids: torch.Tensor | None,
        question_attention_mask: torch.Tensor | None,
        question_embeds: torch.Tensor | None,
    ) -> "_Question | None":
        """The question of each row, if there are questions.

        Called behind the vision tower: while the GPU is busy with that, the host launches the text tower's many small
        kernels.
        """
        self._check_question_rows(
            num_rows,
            question_input_ids=question_input_ids,
            question_attention_mask=question_attention_mask,
            question_embeds=question_embeds,
        )
        rows = question_embeds if question_embeds is not None else question_input_ids
        if rows is None:
            return None
        if question_embeds is None:
            question_embeds = self.get_question_embeds(rows)
        if question_attention_mask is None:
            present = question_embeds.new_ones(len(rows), dtype=torch.bool)
        else:
            present = question_attention_mask.bool().any(1)
        return _Question(nn.functional.normalize(question_embeds.float(), dim=-1), present)

    @staticmethod
    def _check_question_rows(num_rows: int, **question_inputs: torch.Tensor | None) -> None:
        for name, rows in question_inputs.items():
            if rows is not None and len(rows) != num_rows:
                raise ValueError(
                    f"{name} has {len(rows)} rows, but there are {num_rows} rows to guide: pass one question per "
                    "prompt (get_image_features: one per image)."
                )

    def _placeholders_per_image(self, vision_feature_select_strategy: str | None = None) -> int:
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        return self.config.num_patches + (1 if strategy == "full" else 0)

    def _num_placeholders(self, input_ids: torch.Tensor, num_images: int, per_image: int) -> int:
        """How many placeholders each image has: `per_image`, or `visual_token_budget` where the prompt is short.

        Decided without looking at the ids where the prompt's length allows it: a host that waits for the device would
        spoil the fixed budget's purpose.
        """
        budget = self.config.visual_token_budget
        if budget is None or not self.config.compress:
            return per_image
        has_room = input_ids.shape[1] >= per_image and input_ids.numel() >= num_images * per_image
        is_too_short = input_ids.device.type != "cpu" and not has_room
        if budget == per_image or is_too_short or torch.compiler.is_compiling():
            return budget
        count = int((input_ids == self.config.image_token_id).sum())
        if count == num_images * budget:
            return budget
        self._check_placeholders(count, num_images, per_image)
        return per_image

    def _check_placeholders(self, count: int, num_images: int, per_image: int, is_uneven: bool = False) -> None:
        if count == num_images * per_image and not is_uneven:
            return
        budget = self.config.visual_token_budget
        short = "" if budget is None else f" (or visual_token_budget = {budget} each, {num_images * budget} in all)"
        raise ValueError(
            f"The prompts have {count} image placeholders, but {num_images} images need {per_image} each, "
            f"{num_images * per_image} in all{short}, and an image's placeholders stand in one prompt. Prepare prompts "
            "and images together with the repo's processor."
        )

    def _budget_tokens(
        self, vision: VisionFeatures, question: "_Question | None", row_of_image: torch.Tensor | None
    ) -> torch.Tensor:
        """[I, visual_token_budget, D] visual tokens of a fixed budget: static shapes, nothing leaves the device."""
        num_tokens = (self.config.visual_token_budget or 0) - vision.num_class_tokens
        most_merged = num_tokens if self.config.merge_centres else int(self.config.merge_remaining)
        with torch.no_grad():
            text_scores, has_question = self._text_scores(vision, question, row_of_image)
            selection = self._select_tokens(vision, text_scores, has_question)
            assembly = self._assemble_tokens(selection, vision, text_scores, has_question, num_tokens, most_merged)
        return self._project_tokens(vision, assembly)

    def is_short_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        vision_features: VisionFeatures | None,
        vision_feature_select_strategy: str | None = None,
    ) -> bool:
        """Whether the prompts carry `visual_token_budget` placeholders per image, so that nothing is left to drop."""
        images = vision_features.patches if vision_features is not None else pixel_values
        if images is None or not self.config.compress or self.config.visual_token_budget is None:
            return False
        per_image = self._placeholders_per_image(vision_feature_select_strategy)
        return self._num_placeholders(input_ids, len(images), per_image) == self.config.visual_token_budget

    def embed_short_prompt(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        vision_features: VisionFeatures | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **question_inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, L, D] visual tokens at the placeholders of a prompt that is short already, zero where there is text.

        Static shapes from end to end, nothing is copied to the host. The towers, the recovery and the projector run as
        one call of `get_image_features`, which may be a compiled one.
        """
        images: Any = vision_features.patches if vision_features is not None else pixel_values
        budget: Any = self.config.visual_token_budget
        placeholders = locate_placeholders(input_ids, self.config.image_token_id, budget, len(images))
        self._check_question_rows(len(input_ids), **question_inputs)
        if vision_features is None:
            of_image = {
                name: None if rows is None else rows[placeholders.row_of_image.to(rows.device)]
                for name, rows in question_inputs.items()
            }
            features: Any = self.get_image_features(
                pixel_values=images,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **of_image,
            )
            tokens = torch.stack(list(features.pooler_output))
        else:
            question = self._read_question(len(input_ids), **question_inputs)
            tokens = self._budget_tokens(vision_features, question, placeholders.row_of_image)
        short = unshortened_prompt(input_ids, None, None)
        return place_tokens(tokens.to(input_ids.device), placeholders, short)

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
        num_images, num_class_tokens = len(vision.patches), vision.num_class_tokens
        per_image = vision.patches.shape[1] + num_class_tokens
        image_token_id = self.config.image_token_id
        num_placeholders = self._num_placeholders(input_ids, num_images, per_image)
        is_short = self.config.compress and num_placeholders == self.config.visual_token_budget
        if is_short or not self.config.compress:
            placeholders = locate_placeholders(input_ids, image_token_id, num_placeholders, num_images)
            if is_short:
                tokens = self._budget_tokens(vision, question, placeholders.row_of_image)
            else:
                self._check_placeholders(int(placeholders.mask.sum()), num_images, per_image)
                tokens = self.multi_modal_projector(vision.with_class_token(vision.patches))
            short = unshortened_prompt(input_ids, attention_mask, position_ids)
            return short, place_tokens(tokens.to(input_ids.device), placeholders, short)

        placeholders = locate_placeholders(input_ids, image_token_id, per_image, num_images)
        with torch.no_grad():
            text_scores, has_question = self._text_scores(vision, question, placeholders.row_of_image)
            selection = self._select_tokens(vision, text_scores, has_question)
            num_kept = selection.num_tokens.to(input_ids.device) + num_class_tokens
            keep = surviving_positions(placeholders, num_kept, attention_mask)
            # The one copy to the host: everything that a shape or a check depends on.
            per_row = placeholders.mask.sum(1)
            facts = [selection.num_tokens.max(), selection.num_merged.max(), keep.sum(1).max(), per_row.sum()]
            facts.append((per_row % per_image).max())
            longest, most_merged, short_length, count, uneven = torch.stack(
                [fact.to(input_ids.device) for fact in facts]
            ).tolist()
            self._check_placeholders(count, num_images, per_image, is_uneven=bool(uneven))
            assembly = self._assemble_tokens(selection, vision, text_scores, has_question, longest, most_merged)
            short = shorten_prompt(input_ids, keep, short_length, image_token_id, attention_mask, position_ids)
        tokens = self._project_tokens(vision, assembly)
        return short, place_tokens(tokens.to(input_ids.device), placeholders, short)

    def _embed(
        self, input_ids: torch.Tensor, visual_embeds: torch.Tensor | None, text_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, S, D] embeddings of ids [B, S], with visual ones where placeholders stand."""
        if text_embeds is None:
            text_embeds = self.get_input_embeddings()(input_ids)
        if visual_embeds is None:
            return text_embeds
        is_visual = (input_ids == self.config.image_token_id)[:, :, None].to(text_embeds.device)
        return torch.where(is_visual, visual_embeds.to(text_embeds), text_embeds)

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
            question_input_ids, question_attention_mask, question_embeds: one row per *image* here, as there is no
                prompt to tell which image belongs to which question. Without them class attention chooses alone.
        """
        if not self.config.compress or self.config.visual_token_budget is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **kwargs,
            )
        self.config.validate_recovery()
        vision = self.get_vision_features(pixel_values, vision_feature_layer, vision_feature_select_strategy)
        question = self._read_question(len(pixel_values), question_input_ids, question_attention_mask, question_embeds)
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
        vision = self._vision_of(pixel_values, vision_features)
        question = self._read_question(len(input_ids), question_input_ids, question_attention_mask, question_embeds)
        per_image = self._num_placeholders(input_ids, len(vision.patches), self._placeholders_per_image())
        placeholders = locate_placeholders(input_ids, self.config.image_token_id, per_image, len(vision.patches))
        self._check_placeholders(int(placeholders.mask.sum()), len(vision.patches), per_image)
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
            question_embeds: [B, D] embeddings from `get_question_embeds`, instead of ids: one question, many images.
            visual_embeds: [B, S, D] visual tokens aligned with `input_ids`, which are then short already. Used by
                `generate`.
            vision_features: from `get_vision_features`, instead of `pixel_values`: one image, many questions.

        Raises:
            ValueError: if placeholders, images, questions, mask or cache do not belong together.
        """
        history = getattr(past_key_values, HISTORY, None)
        has_images = pixel_values is not None or vision_features is not None
        if visual_embeds is None and history is None and input_ids is not None:
            strategy = vision_feature_select_strategy
            if self.is_short_prompt(input_ids, pixel_values, vision_features, strategy):
                self.config.validate_recovery()
                visual_embeds = self.embed_short_prompt(
                    input_ids,
                    pixel_values,
                    vision_features,
                    vision_feature_layer,
                    strategy,
                    question_input_ids=question_input_ids,
                    question_attention_mask=question_attention_mask,
                    question_embeds=question_embeds,
                )
        if visual_embeds is not None and input_ids is not None:
            return super().forward(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=self._embed(input_ids, visual_embeds),
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
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (has_images and input_ids is None):
            raise ValueError(
                "input_ids must be given to continue a compressed cache with an image; without one, inputs_embeds do."
            )
        cached_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if cached_length and history is None:
            history = uncompressed_history(tokens, cached_length, attention_mask)
        if history is not None:
            history = history.cropped(cached_length)
        new_mask = mask_of_new_tokens(tokens, attention_mask, history)
        ids = input_ids if input_ids is not None else tokens.new_full(tokens.shape[:2], -1, dtype=torch.long)
        if has_images:
            vision = self._vision_of(
                pixel_values, vision_features, vision_feature_layer, vision_feature_select_strategy
            )
            question = self._read_question(len(ids), question_input_ids, question_attention_mask, question_embeds)
            short, visual_embeds = self.compress_prompt(ids, vision, question, new_mask, position_ids)
        else:
            short, visual_embeds = unshortened_prompt(ids, new_mask, position_ids), None
        if inputs_embeds is None or visual_embeds is not None:
            inputs_embeds = self._embed(short.input_ids, visual_embeds, inputs_embeds)

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
            past = history or empty_history(original_mask)
            past.extended(ids, original_mask, short).attach(outputs.past_key_values)
        if short.is_shortened:
            outputs.last_hidden_state = spread_over_original(outputs.last_hidden_state, short)
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(spread_over_original(states, short) for states in outputs.hidden_states)
        return outputs


def _full_precision(like: torch.Tensor) -> AbstractContextManager:
    """No autocast on the tensor's device: in bfloat16 scores and distances would rank other patches."""
    device_type = like.device.type
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


@dataclass(frozen=True)
class _Question:
    embeds: torch.Tensor  # [R, D] float32 unit norm
    present: torch.Tensor  # [R] bool


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

        Where tokens are dropped, a label on an image placeholder, or behind padding, is ignored: neither has a
        prediction of its own.
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
        cache, history = kwargs.get("past_key_values"), getattr(kwargs.get("past_key_values"), HISTORY, None)
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

        self.config.validate_recovery()
        kwargs.pop("input_ids", None)
        question_names = ("question_input_ids", "question_attention_mask", "question_embeds")
        vision_names = ("vision_feature_layer", "vision_feature_select_strategy")
        is_new = cache is None or int(cache.get_seq_length()) == 0
        if is_new and self.model.is_short_prompt(
            input_ids, kwargs.get("pixel_values"), kwargs.get("vision_features"), kwargs.get(vision_names[1])
        ):
            visual_embeds = self.model.embed_short_prompt(
                input_ids,
                kwargs.pop("pixel_values", None),
                kwargs.pop("vision_features", None),
                **{name: kwargs.pop(name, None) for name in (*vision_names, *question_names)},
            )
            return super().generate(
                input_ids,
                generation_config=generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                visual_embeds=visual_embeds,
                **kwargs,
            )

        if is_new and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._mask_of_padding(input_ids, generation_config, kwargs)
        prompt = self._compress_for_generation(input_ids, cache, history, kwargs)
        generation_config, kwargs = self._count_original_length(prompt, generation_config, kwargs)
        if streamer is not None:
            streamer = OriginalPromptStreamer(streamer, prompt)
        if prefix_allowed_tokens_fn is not None:
            allowed_tokens = prefix_allowed_tokens_fn

            def prefix_allowed_tokens_fn(row: int, ids: torch.Tensor) -> list[int]:
                return allowed_tokens(row, torch.cat([prompt.given_ids[row], ids[prompt.loop_ids.shape[1] :]]))

        if cache is not None and hasattr(cache, HISTORY):
            delattr(cache, HISTORY)  # inside the loop it is an ordinary cache of the short prompt
        try:
            result = super().generate(
                prompt.loop_ids,
                generation_config=generation_config,
                logits_processor=see_original_prompt(logits_processor, prompt, LogitsProcessorList),
                stopping_criteria=see_original_prompt(stopping_criteria, prompt, StoppingCriteriaList),
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                streamer=streamer,
                attention_mask=prompt.short_attention_mask,
                visual_embeds=prompt.visual_embeds,
                **kwargs,
            )
        except BaseException:
            if history is not None:
                setattr(cache, HISTORY, history)
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

    def _mask_of_padding(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """What stock `generate` takes for the mask where none is given: every padding token counts as padding."""
        config = generation_config or self.generation_config
        padding, end = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
        if padding is None or padding in (end if isinstance(end, list) else [end]):
            return None
        return (input_ids != padding).long()

    def _compress_for_generation(
        self,
        input_ids: torch.Tensor,
        cache: Cache | None,
        history: CompressedHistory | None,
        kwargs: dict[str, Any],
    ) -> "GenerationPrompt":
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
            history = history or uncompressed_history(input_ids[:, :0], cached_length, attention_mask)
            history = history.cropped(cached_length)
            is_full = is_full_history(input_ids, attention_mask, history)
        else:
            history = empty_history(input_ids)
        num_past = history.input_ids.shape[1] if is_full else 0
        new_ids = input_ids[:, num_past:]
        if new_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens, and past_key_values holds as many: there is no new token "
                "to go on from. Pass at least one token that is not cached."
            )
        new_mask = torch.ones_like(new_ids) if attention_mask is None else attention_mask[:, -new_ids.shape[1] :]

        per_image = self.model._placeholders_per_image(strategy)
        if pixel_values is not None and num_past:
            pixel_values = self._images_of_new_tokens(pixel_values, input_ids, new_ids, per_image)
        if pixel_values is None and vision is None:
            short, visual_embeds = unshortened_prompt(new_ids, new_mask, None), None
        else:
            vision = self.model._vision_of(pixel_values, vision, layer, strategy)
            question = self.model._read_question(len(input_ids), **question_inputs)
            new_positions = None if position_ids is None else position_ids[:, -new_ids.shape[1] :]
            short, visual_embeds = self.model.compress_prompt(new_ids, vision, question, new_mask, new_positions)
            visual_embeds = nn.functional.pad(visual_embeds, (0, 0, cached_length, 0))
        if position_ids is not None and not cached_length:
            kwargs["position_ids"] = short.position_ids
        extended = history.extended(new_ids, new_mask.long(), short)
        return GenerationPrompt(
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
        self.model._check_placeholders(sum(counts[1]), len(pixel_values), per_image)
        return pixel_values

    def _count_original_length(
        self, prompt: "GenerationPrompt", generation_config: GenerationConfig | None, kwargs: dict[str, Any]
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


__all__ = ["RecoverableLlavaForConditionalGeneration", "RecoverableLlavaModel"]
