"""The inner model: drops surplus placeholders before the language model, and maps its outputs back.

Shared by all families. Each call takes one of these roads, decided in `forward` and `prompt_road`:

    stock        no image, or compression off: the stock model, untouched;
    SHORT        `visual_token_budget` placeholders per image: the image yields exactly that many tokens;
    COMPRESSED   N placeholders per image: scored, selected, assembled, and the prompt shortened here.

A cache that a compressed prompt left behind carries a `CompressedHistory`, so that later calls go on from it.

B prompts, I images, L tokens of the original prompt, S of the short one, N patches, K kept tokens, D embedding size.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from transformers import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cache_history import CompressedHistory, mask_of_new_tokens, uncompressed_history
from .recoverable_vision import (
    Questions,
    RecoverableVisionMixin,
    Recovery,
    VisionFeatures,
    check_question_rows,
    stock_forward,
)
from .recovery_settings import RecoverySettings
from .selection import Selection
from .short_prompt import (
    Placeholders,
    ShortPrompt,
    attentions_of_original,
    locate_placeholders,
    place_tokens,
    shorten_prompt,
    surviving_positions,
)
from .token_assembly import first_true
from .transformers_names import CACHE, cache_of, is_paged, set_image_features, the_cache


class Road(Enum):
    """What a prompt with images needs."""

    ALL_TOKENS = auto()  # compression is off
    SHORT = auto()  # it has `visual_token_budget` placeholders per image
    COMPRESSED = auto()  # it has a placeholder per patch


@dataclass(frozen=True)
class ImageInputs:
    """The images of a call: pixels, or what one pass of the vision tower made of them earlier."""

    pixel_values: Any  # [I, 3, H, W], or as the family has them, or None
    vision_features: VisionFeatures | None
    options: dict[str, Any]  # `vision_feature_layer` and the like; `image_sizes` as numbers on the host

    @classmethod
    def of(
        cls, pixel_values: torch.Tensor | None, vision_features: VisionFeatures | None, **options: Any
    ) -> "ImageInputs | None":
        """None if there are no images."""
        if pixel_values is None and vision_features is None:
            return None
        given = {name: value for name, value in options.items() if value is not None}
        if "image_sizes" in given:
            given["image_sizes"] = sizes_on_host(given["image_sizes"])
        return cls(pixel_values, vision_features, given)

    def only(self, mask: torch.Tensor, pixel_rows: list[int] | None) -> "ImageInputs | None":
        """The images whose entry of `mask` [I] is True; None if there are none. Waits for the device.

        Args:
            pixel_rows: as in `FullCounts`.
        """
        is_meant = mask.tolist()
        if not any(is_meant):
            return None
        options = dict(self.options)
        if "image_sizes" in options:
            options["image_sizes"] = [size for size, meant in zip(options["image_sizes"], is_meant) if meant]
        if pixel_rows is not None:
            is_meant = [meant for meant, number in zip(is_meant, pixel_rows) for _ in range(number)]
        return ImageInputs(self.pixel_values[torch.tensor(is_meant, device=self.pixel_values.device)], None, options)

    def __len__(self) -> int:
        if self.vision_features is not None:
            return len(self.vision_features.patches)
        return len(self.options.get("image_sizes", self.pixel_values))


@dataclass(frozen=True)
class FullCounts:
    """How many placeholders each image has in a prompt of which nothing was dropped."""

    per_image: torch.Tensor  # [I] long
    longest: int
    total: int
    pixel_rows: list[int] | None = None  # of `pixel_values` that each image has; None means one


@dataclass(frozen=True)
class ImageTokens:
    """The visual tokens of all images, as they stand in the prompt."""

    tokens: torch.Tensor  # [I, K, D]
    counts: list[int]  # how many of the K are an image's own
    last_hidden_state: Any  # [I, 1 + N, C] of the vision tower

    def show_in(self, outputs: Any) -> None:
        """Give the model's outputs these tokens, where stock has the images' features."""
        set_image_features(outputs, self.last_hidden_state, self.flat(), self.counts)

    def flat(self) -> torch.Tensor:
        """[sum of counts, D] without what fills images up to K."""
        every = self.tokens.flatten(0, 1)
        if sum(self.counts) == len(every):
            return every
        # The counts are known on the host, and so is what they leave: one copy to the device, and no waiting for it.
        is_own = torch.arange(self.tokens.shape[1]) < torch.tensor(self.counts)[:, None]
        own = first_true(is_own.flatten()[None], sum(self.counts))[0]
        return every.index_select(0, own.to(every.device, non_blocking=True))


def sizes_on_host(image_sizes: Any) -> list[tuple[int, int]]:
    """(height, width) of each image, of [I, 2] `image_sizes`: a tensor or lists. Shapes depend on them, as in stock.

    Raises:
        ValueError: unless they are pairs of numbers of at least 1.
    """
    rows = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
    try:
        sizes = [(int(height), int(width)) for height, width in rows]
    except (TypeError, ValueError):
        sizes = None
    if sizes is None or any(min(size) < 1 for size in sizes):
        raise ValueError(
            f"image_sizes is {rows}: pass the (height, width) in pixels of every image, [images, 2], which the repo's "
            "processor returns along with pixel_values."
        )
    return sizes


class RecoverableModelMixin(RecoverableVisionMixin):
    """In front of a family's stock model, which holds the language model."""

    def full_counts(self, images: ImageInputs, device: torch.device) -> FullCounts:
        """How many placeholders each image has where nothing is dropped. A family's own."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- which road

    def prompt_road(
        self, input_ids: torch.Tensor, images: ImageInputs, counts: FullCounts, settings: RecoverySettings
    ) -> Road:
        """The road of prompts [B, L] with images.

        Under a fixed budget it is decided without looking at the ids where the prompt's length allows it: a host that
        waits for the device would spoil the budget's purpose.

        Raises:
            ValueError: if the placeholders match neither the images nor the budget.
        """
        if not settings.compress:
            return Road.ALL_TOKENS
        budget = settings.visual_token_budget
        if budget is None:
            return Road.COMPRESSED
        has_room = input_ids.shape[1] >= counts.longest and input_ids.numel() >= counts.total
        is_too_short = input_ids.device.type != "cpu" and not has_room
        if budget * len(images) == counts.total or is_too_short or torch.compiler.is_compiling():
            return Road.SHORT
        count = int((input_ids == self.config.image_token_id).sum())
        if count == budget * len(images):
            return Road.SHORT
        check_placeholder_count(count, len(images), counts, settings)
        return Road.COMPRESSED

    # ---------------------------------------------------------------------------------------------------- visual tokens

    def vision_of(self, images: ImageInputs, settings: RecoverySettings) -> VisionFeatures:
        """What one pass of the vision tower makes of the images, unless they come as that."""
        if images.vision_features is not None:
            return images.vision_features
        return self.encode_images(
            images.pixel_values, settings.text_relevance, settings.attention_layer, **images.options
        )[1]

    def embed_short_prompt(
        self,
        input_ids: torch.Tensor,
        images: ImageInputs,
        settings: RecoverySettings,
        **question_inputs: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ImageTokens]:
        """[B, L, D] visual tokens at the placeholders of a prompt that is short already, zero where there is text.

        Static shapes from end to end, nothing is copied to the host. The towers, the recovery and the projector run as
        one call of `get_image_features`, which may be a compiled one.
        """
        budget: Any = settings.visual_token_budget  # which this road has
        per_image = torch.full((len(images),), budget, device=input_ids.device)
        placeholders = locate_placeholders(input_ids, self.config.image_token_id, per_image)
        check_question_rows(len(input_ids), **question_inputs)
        if images.vision_features is None:
            of_image = {
                name: None if rows is None else rows[placeholders.row_of_image.to(rows.device)]
                for name, rows in question_inputs.items()
            }
            features = self.get_image_features(
                images.pixel_values, **images.options, **of_image, settings=settings, return_dict=True
            )
            last_hidden_state, tokens = features.last_hidden_state, torch.stack(list(features.pooler_output))
        else:
            questions = self.questions_of(placeholders, len(input_ids), question_inputs)
            last_hidden_state = images.vision_features.last_hidden_state
            tokens = self.budget_tokens(images.vision_features, questions, settings)
        placed = place_tokens(tokens.to(input_ids.device), placeholders, ShortPrompt.unchanged(input_ids))
        return placed, ImageTokens(tokens, [budget] * len(images), last_hidden_state)

    def questions_of(
        self, placeholders: Placeholders, num_prompts: int, question_inputs: dict[str, torch.Tensor | None]
    ) -> Questions | None:
        """The question of each image: that of the prompt it stands in."""
        questions = self.embed_questions(num_prompts, **question_inputs)
        return None if questions is None else questions.of_images(placeholders.row_of_image)

    def compress_prompt(
        self,
        input_ids: torch.Tensor,
        images: ImageInputs,
        settings: RecoverySettings,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        may_be_short: bool = True,
        **question_inputs: torch.Tensor | None,
    ) -> tuple[ShortPrompt, torch.Tensor, ImageTokens]:
        """The short prompt of a batch, its visual tokens [B, S, D], zero where there is text, and those of each image.

        Args:
            may_be_short: False where `is_short` has said no, which may have waited for the device to count.

        Raises:
            ValueError: if the placeholders do not match the images.
        """
        counts = self.full_counts(images, input_ids.device)
        if may_be_short:
            road = self.prompt_road(input_ids, images, counts, settings)
        else:
            road = Road.COMPRESSED if settings.compress else Road.ALL_TOKENS
        if road is Road.SHORT:
            short = ShortPrompt.unchanged(input_ids, attention_mask, position_ids)
            return short, *self.embed_short_prompt(input_ids, images, settings, **question_inputs)

        placeholders = locate_placeholders(input_ids, self.config.image_token_id, counts.per_image)
        vision = self.vision_of(images, settings)
        if road is Road.ALL_TOKENS:
            check_placeholder_count(int(placeholders.mask.sum()), len(images), counts, settings)
            tokens = self.all_tokens(vision)
            short = ShortPrompt.unchanged(input_ids, attention_mask, position_ids)
            kept_counts = counts.per_image.tolist()
        else:
            questions = self.questions_of(placeholders, len(input_ids), question_inputs)
            facts: dict[str, Any] = {}

            def sizes(selection: Selection) -> tuple[int, int]:
                """The one copy to the host: everything that a shape or a check depends on."""
                num_kept = selection.num_tokens.to(input_ids.device) + vision.num_class_tokens
                keep = surviving_positions(placeholders, num_kept, attention_mask)
                numbers = [
                    selection.num_merged.max().to(input_ids.device),
                    keep.sum(1).max(),
                    placeholders.mask.sum(),
                    (placeholders.row_of_image != placeholders.last_row_of_image).any(),
                ]
                facts_of_batch = torch.cat([*(number[None] for number in numbers), num_kept])
                most_merged, short_length, count, is_split, *kept = facts_of_batch.tolist()
                check_placeholder_count(count, len(images), counts, settings, bool(is_split))
                facts.update(keep=keep, short_length=short_length, counts=kept)
                return max(kept) - vision.num_class_tokens, most_merged

            recovery = self.recover(vision, questions, settings, sizes)
            tokens = self.project(vision, recovery.assembly)
            kept_counts = facts["counts"]
            short = shorten_prompt(
                input_ids,
                facts["keep"],
                facts["short_length"],
                self.config.image_token_id,
                attention_mask,
                position_ids,
            )
        placed = place_tokens(tokens.to(input_ids.device), placeholders, short)
        return short, placed, ImageTokens(tokens, kept_counts, vision.last_hidden_state)

    def recover_tokens(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        image_sizes: torch.Tensor | None = None,
        **unused_inputs: Any,
    ) -> Recovery:
        """Which patches stay, come back or are merged, for each image, without running the language model.

        Takes what the processor returns: `model.recover_tokens(**inputs)`. Also where compression is off.
        """
        images = ImageInputs.of(pixel_values, vision_features, image_sizes=image_sizes)
        if images is None:
            raise ValueError("Neither pixel_values nor vision_features was given: pass one of them.")
        self.config.validate_recovery()
        settings = self.config.recovery_settings()
        counts = self.full_counts(images, input_ids.device)
        if self.prompt_road(input_ids, images, counts, settings) is Road.SHORT:
            per_image = torch.full_like(counts.per_image, settings.visual_token_budget)
        else:
            per_image = counts.per_image
        placeholders = locate_placeholders(input_ids, self.config.image_token_id, per_image)
        check_placeholder_count(int(placeholders.mask.sum()), len(images), counts, settings, total=int(per_image.sum()))
        vision = self.vision_of(images, settings)
        questions = self.questions_of(
            placeholders,
            len(input_ids),
            {
                "question_input_ids": question_input_ids,
                "question_attention_mask": question_attention_mask,
                "question_embeds": question_embeds,
            },
        )

        def sizes(selection: Selection) -> tuple[int, int]:
            num_tokens, num_merged = torch.stack([selection.num_tokens.max(), selection.num_merged.max()]).tolist()
            return num_tokens, num_merged

        return self.recover(vision, questions, settings, sizes)

    # ------------------------------------------------------------------------------------------------------- embeddings

    def embed(
        self, input_ids: torch.Tensor, visual_embeds: torch.Tensor | None, text_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, S, D] embeddings of ids [B, S], with visual ones where placeholders stand."""
        if text_embeds is None:
            text_embeds = self.get_input_embeddings()(input_ids)
        if visual_embeds is None:
            return text_embeds
        is_visual = (input_ids == self.config.image_token_id)[:, :, None].to(text_embeds.device)
        return torch.where(is_visual, visual_embeds.to(text_embeds), text_embeds)

    def ids_of_embeds(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[B, L] ids of embeddings [B, L, D]: the image token where its embedding stands, as in stock; -1 elsewhere."""
        image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        is_image = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        return torch.where(is_image, image_token, -1)

    # ---------------------------------------------------------------------------------------------------------- forward

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
        image_sizes: torch.Tensor | None = None,
        cache: Cache | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        compress: bool | None = None,
        keep_short: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """As stock, with the surplus placeholders dropped before the language model.

        Outputs have the original length: a dropped position repeats the output of the last kept one before it, attends
        as that one does, and is attended to by nobody.

        Args:
            cache: the KV cache, as transformers calls `past_key_values` since 5.24; either name is taken.
            question_input_ids: [B, T] the question of each prompt for the CLIP text tower, padded on the right.
            question_attention_mask: [B, T]; a row without any 1 has no question.
            question_embeds: [B, D] embeddings from `get_question_embeds`, instead of ids: one question, many images.
            visual_embeds: [B, S, D] visual tokens aligned with `input_ids`, which are then short already. Used by
                `generate`.
            vision_features: from `get_vision_features`, instead of `pixel_values`: one image, many questions.
            compress: instead of the config's, for this call.
            keep_short: leave `last_hidden_state` in the short numbering, and return the `ShortPrompt` behind the
                outputs: what runs over every position then runs over the short prompt.

        Raises:
            ValueError: if placeholders, images, questions, mask or cache do not belong together.
        """
        if is_paged(cache):
            kwargs["cache"], cache = cache, None  # type: ignore[typeddict-unknown-key]
        cache = the_cache(past_key_values, cache)
        # What `return_dict` asks for, here or in the config, is given at the end.
        stock = {**kwargs, CACHE: cache, "return_dict": True}
        if visual_embeds is not None and input_ids is not None:
            embeds = self.embed(input_ids, visual_embeds)
            return super().forward(
                inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **stock
            )

        options = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
        }
        images = ImageInputs.of(pixel_values, vision_features, **options)
        history = CompressedHistory.of(cache)
        settings: Any = None if images is None else self.config.recovery_settings(compress)
        is_off = images is None or (not settings.compress and vision_features is None)
        if history is None and (is_off or kwargs.get("mm_encoder_outputs")):
            with nullcontext() if images is None or torch.compiler.is_compiling() else stock_forward():
                outputs = super().forward(
                    input_ids=input_ids,
                    pixel_values=pixel_values,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                    **{name: value for name, value in options.items() if value is not None},
                    **stock,
                )
            return (outputs, ShortPrompt.unchanged(outputs.last_hidden_state[..., 0].long())) if keep_short else outputs

        ids = self._ids(input_ids, inputs_embeds, images)
        question_inputs = {
            "question_input_ids": question_input_ids,
            "question_attention_mask": question_attention_mask,
            "question_embeds": question_embeds,
        }
        masks = {"attention_mask": attention_mask, "position_ids": position_ids}
        if history is None and images is not None and self.is_short(ids, images, settings):
            visual_embeds, image_tokens = self.embed_short_prompt(ids, images, settings, **question_inputs)
            embeds = self.embed(ids, visual_embeds, inputs_embeds)
            outputs, short = super().forward(inputs_embeds=embeds, **masks, **stock), ShortPrompt.unchanged(ids)
            image_tokens.show_in(outputs)
        else:
            outputs, short = self._compressed_forward(
                ids, inputs_embeds, images, question_inputs, history, settings, **masks, **stock
            )
        if keep_short:
            return outputs, short
        outputs.last_hidden_state = short.to_original(outputs.last_hidden_state)
        return outputs

    def _compressed_forward(
        self,
        ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        images: ImageInputs | None,
        question_inputs: dict[str, torch.Tensor | None],
        history: CompressedHistory | None,
        settings: RecoverySettings,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **stock: Any,
    ) -> tuple[Any, ShortPrompt]:
        """The road of a prompt that is compressed here, or goes on from one that was."""
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim != 2):
            raise ValueError(
                "attention_mask must have shape [batch, length] where visual tokens are dropped, as a mask over pairs "
                "of positions cannot follow. Pass a mask of that shape, or set config.compress = False."
            )
        cache, was_continued = stock[CACHE], history is not None  # else `forward` has asked whether the prompt is short
        cached_length = 0 if cache is None else int(cache.get_seq_length())
        if cached_length and history is None:
            history = uncompressed_history(ids, cached_length, attention_mask)
        new_mask = mask_of_new_tokens(ids, attention_mask, history)
        visual_embeds, image_tokens = None, None
        if images is None:
            short = ShortPrompt.unchanged(ids, new_mask, position_ids)
        else:
            short, visual_embeds, image_tokens = self.compress_prompt(
                ids, images, settings, new_mask, position_ids, may_be_short=was_continued, **question_inputs
            )
        text_embeds = None if inputs_embeds is None else short.of_original(inputs_embeds)

        original_mask = torch.ones_like(ids) if new_mask is None else new_mask.long()
        extended = (history or CompressedHistory.empty(ids)).extended(ids, original_mask, short)
        short_positions = short.position_ids
        if history is not None:
            short_positions = history.positions_of(short, position_ids is not None)
        # Without a mask a single row has no padding, and packed sequences are recognised by their positions.
        is_dense = attention_mask is None and history is None and len(ids) == 1
        outputs = super().forward(
            attention_mask=None if is_dense else extended.short_attention_mask,
            position_ids=short_positions,
            inputs_embeds=self.embed(short.input_ids, visual_embeds, text_embeds),
            **stock,
        )
        if cache_of(outputs) is not None:
            extended.attach(cache_of(outputs))
        if image_tokens is not None:
            image_tokens.show_in(outputs)
        self._to_original(outputs, short, extended)
        return outputs, short

    def _ids(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, images: ImageInputs | None
    ) -> torch.Tensor:
        """[B, L] the ids of a call; -1 for tokens that were given as embeddings."""
        if input_ids is not None and inputs_embeds is None:
            return input_ids
        if input_ids is not None or inputs_embeds is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        if images is not None:
            return self.ids_of_embeds(inputs_embeds)
        return inputs_embeds.new_full(inputs_embeds.shape[:2], -1, dtype=torch.long)

    def is_short(self, ids: torch.Tensor, images: ImageInputs, settings: RecoverySettings) -> bool:
        """Whether the prompts carry `visual_token_budget` placeholders per image, so that nothing is left to drop."""
        if settings.visual_token_budget is None:
            return False
        return self.prompt_road(ids, images, self.full_counts(images, ids.device), settings) is Road.SHORT

    @staticmethod
    def _to_original(outputs: Any, short: ShortPrompt, extended: CompressedHistory) -> None:
        """Bring hidden states and attentions, where there are any, back to the original numbering."""
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(
                short.to_original(states) if isinstance(states, torch.Tensor) else states
                for states in outputs.hidden_states
            )
        if outputs.attentions is not None and extended.irreducible_length:
            outputs.attentions = tuple(
                attentions_of_original(
                    weights, short, extended.source, extended.short_attention_mask, extended.input_ids.shape[1]
                )
                if isinstance(weights, torch.Tensor)
                else weights
                for weights in outputs.attentions
            )


def check_placeholder_count(
    count: int,
    num_images: int,
    counts: FullCounts,
    settings: RecoverySettings,
    is_split: bool = False,
    total: int | None = None,
) -> None:
    """Raise a ValueError unless `count` is what the images need, and no image is split over prompts."""
    if count == (counts.total if total is None else total) and not is_split:
        return
    budget = settings.visual_token_budget
    short = "" if budget is None else f" (or visual_token_budget = {budget} each, {num_images * budget} in all)"
    at_most = "" if counts.longest * num_images == counts.total else "at most "
    raise ValueError(
        f"The prompts have {count} image placeholders, but {num_images} images need {at_most}{counts.longest} each, "
        f"{counts.total} in all{short}, and an image's placeholders stand in one prompt. Prepare prompts and images "
        "together with the repo's processor."
    )
