"""`forward` and `generate` of the whole model: they run on the short prompt, and the caller sees the original one.

Shared by all families. `forward` runs the language model's head, and the loss, over the tokens that are left, and then
brings logits back to the original numbering. `generate` compresses once, before the stock loop:

    stock        no image, or compression off: stock `generate`, untouched;
    SHORT        the prompt is short already: stock `generate`, with the visual tokens made beforehand;
    COMPRESSED   stock `generate` over the short prompt, in between two changes of numbering (original_prompt.py).

B prompts, L tokens of the original prompt, S of the short one, D size of an embedding, V of the vocabulary.
"""

import copy
import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cache_history import HISTORY, CompressedHistory, is_full_history, uncompressed_history
from .original_prompt import GenerationPrompt, OriginalPromptCallback
from .recoverable_model import ImageInputs, check_placeholder_count
from .recoverable_vision import Recovery, VisionFeatures, stock_forward
from .recovery_settings import RecoverySettings
from .short_prompt import ShortPrompt, locate_placeholders
from .transformers_names import CACHE, cache_of, is_paged, static_cache_of, the_cache


QUESTION_INPUTS = ("question_input_ids", "question_attention_mask", "question_embeds")
IMAGE_OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes")


class RecoverableGenerationMixin(nn.Module):
    """In front of a family's stock `...ForConditionalGeneration`."""

    stock_class: Any  # the stock family's
    model_class: Any  # of `self.model`; override it to choose tokens in another way
    output_class: Any  # of `forward`, the stock family's
    config: Any

    def __init__(self, config: Any):
        # The stock family's own __init__ would build a second language model.
        super(self.stock_class, self).__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_question_embeds(self, question_input_ids: torch.Tensor) -> torch.Tensor:
        """See `RecoverableVisionMixin.get_question_embeds`."""
        return self.model.get_question_embeds(question_input_ids)

    def get_vision_features(self, pixel_values: torch.Tensor, *options: Any, **more_options: Any) -> VisionFeatures:
        """See `RecoverableVisionMixin.get_vision_features`."""
        return self.model.get_vision_features(pixel_values, *options, **more_options)

    def recover_tokens(self, **inputs: Any) -> Recovery:
        """See `RecoverableModelMixin.recover_tokens`."""
        return self.model.recover_tokens(**inputs)

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
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        cache: Cache | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        vision_features: VisionFeatures | None = None,
        compress: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Any:
        """As stock, with the arguments of `RecoverableModelMixin.forward`.

        Where tokens are dropped, a label on an image placeholder, or behind padding, is ignored: neither has a
        prediction of its own. What a `Trainer` counted of them, it counted in vain: the loss is the mean over the
        targets that are left.
        """
        if is_paged(cache):
            kwargs["cache"], cache = cache, None
        cache = the_cache(past_key_values, cache)
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            CACHE: cache,
        }
        if image_sizes is not None:
            inputs["image_sizes"] = image_sizes
        ours = {
            "question_input_ids": question_input_ids,
            "question_attention_mask": question_attention_mask,
            "question_embeds": question_embeds,
            "vision_features": vision_features,
        }
        # Read once: another thread may change it before the inner model looks.
        compress = self.config.compress if compress is None else compress
        has_images = vision_features is not None or (pixel_values is not None and compress)
        if not has_images and CompressedHistory.of(cache) is None:
            if visual_embeds is not None:
                inputs["visual_embeds"] = visual_embeds
            if pixel_values is not None:
                inputs["compress"] = False
            return super().forward(labels=labels, logits_to_keep=logits_to_keep, **inputs, **kwargs)

        shift_labels = kwargs.pop("shift_labels", None)
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs, short = self.model(**inputs, **ours, compress=compress, keep_short=True, return_dict=True, **kwargs)
        logits, short_logits = self._logits(outputs.last_hidden_state, short, logits_to_keep)
        loss = None
        if labels is not None:
            if shift_labels is not None:  # what each position is to predict: the label of the next one
                labels = torch.cat([torch.full_like(shift_labels[:, :1], -100), shift_labels[:, :-1]], dim=1)
            ids = input_ids if input_ids is not None else self.model.ids_of_embeds(inputs_embeds)
            loss = self._loss(short_logits, short, ids, attention_mask, labels, shift_labels, num_items, kwargs)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return self.output_class(loss=loss, logits=logits, **rest)

    def _logits(
        self, hidden_states: torch.Tensor, short: ShortPrompt, logits_to_keep: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, kept of L, V] logits, and [B, S, V] those of the short prompt if all of them were needed."""
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rows = short.output_of[:, keep]
        if rows.shape[1] < hidden_states.shape[1]:
            index = rows.to(hidden_states.device)[:, :, None].expand(-1, -1, hidden_states.shape[-1])
            return self.lm_head(hidden_states.gather(1, index)), None
        logits = self.lm_head(hidden_states)
        if not short.may_have_moved and rows.shape[1] == logits.shape[1]:
            return logits, logits
        index = rows.to(logits.device)[:, :, None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, index), logits

    def _loss(
        self,
        logits: torch.Tensor | None,
        short: ShortPrompt,
        ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None,
        num_items: torch.Tensor | int | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The mean over the targets that count, on the short prompt's logits.

        A `Trainer` divides the sum of a step's losses by the number of labels that it counted in all batches of the
        step. Of these, the share that counts here is taken.
        """
        if logits is None:
            raise ValueError("labels need the logits of every position: leave logits_to_keep at 0.")
        # The first token of a row has no predecessor, in the short prompt as little as in the original one.
        is_absent = torch.zeros_like(ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.shape == ids.shape:
            is_absent = attention_mask == 0
        is_ignored = (ids == self.config.image_token_id) | nn.functional.pad(is_absent[:, :-1], (1, 0), value=True)
        counted = labels.masked_fill(is_ignored.to(labels.device), -100)
        is_padding = ~short.attention_mask.bool().to(labels.device)
        kwargs = dict(kwargs, vocab_size=self.config.text_config.vocab_size)
        kwargs["labels"] = short.of_original(counted).masked_fill(is_padding, -100)
        if shift_labels is not None:
            kwargs["shift_labels"] = torch.cat([kwargs["labels"][:, 1:], shift_labels[:, -1:]], dim=1)
        if num_items is not None:
            num_counted, num_given = ((each[:, 1:] != -100).sum() for each in (counted, labels))
            kwargs["num_items_in_batch"] = num_items * (num_counted / num_given.clamp(min=1)).clamp(min=1e-6)
        return self.loss_function(logits=logits, **kwargs)

    # ---------------------------------------------------------------------------------------------- the generation loop

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        cache: Cache | None = None,
        question_input_ids: torch.Tensor | None = None,
        question_attention_mask: torch.Tensor | None = None,
        question_embeds: torch.Tensor | None = None,
        visual_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As stock; `visual_embeds` [B, S, D] is cut to the tokens of this step, and left out once they are cached."""
        cache = the_cache(past_key_values, cache)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if visual_embeds is not None and model_inputs.get("input_ids") is not None:
            length = model_inputs["input_ids"].shape[1]
            # A decode step reads one token; asking a static cache for its length then would wait for the device.
            if is_first_iteration or length > 1:
                start = 0 if cache is None else int(cache.get_seq_length())
                if start < visual_embeds.shape[1]:
                    part = visual_embeds[:, start : start + length]
                    model_inputs["visual_embeds"] = nn.functional.pad(part, (0, 0, 0, length - part.shape[1]))
        return model_inputs

    def _supports_mm_encoder_outputs(self) -> bool:
        # Since 5.23: where `forward` names this argument, images are encoded before they are expanded to beams.
        return "mm_encoder_outputs" in inspect.signature(self.stock_class.forward).parameters

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

    def _merge_criteria_processor_list(self, default_list: Any, custom_list: Any) -> Any:
        # A callback of the caller takes the place of stock's own of the same type: that of the callback, whose wrapper
        # has another one.
        wrappers = {id(each.callback): each for each in custom_list if isinstance(each, OriginalPromptCallback)}
        bare = [each.callback if isinstance(each, OriginalPromptCallback) else each for each in custom_list]
        merged = super()._merge_criteria_processor_list(default_list, type(custom_list)(bare))
        return type(merged)(wrappers.get(id(each), each) for each in merged)

    # --------------------------------------------------------------------------------------------------------- generate

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As stock `generate`, over a prompt that is compressed once, before the loop.

        The loop runs on the short prompt. Returned sequences, the streamer and every callback of the caller see the
        original one, and `max_length` / `min_length` count it. Attentions and hidden states of the prompt have the
        short length. A returned cache can be continued with the full history or with new tokens alone.

        A loop of the caller's own (`custom_generate`) gets the short prompt as well; sequences that begin with it are
        returned with the original one instead, anything else as it is.

        Args:
            compress: instead of the config's, for this call.

        Raises:
            ValueError: if placeholders, images, questions, mask or cache do not belong together, or an option writes
                or reads the prompt by itself (`token_healing`, `cache_implementation="paged"`), without its images.
        """
        cache = the_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        forgotten = static_cache_of(self)
        if forgotten is not cache and hasattr(forgotten, HISTORY):
            delattr(forgotten, HISTORY)
        options = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
            **({} if cache is None else {CACHE: cache}),
        }
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        images = ImageInputs.of(
            kwargs.get("pixel_values"),
            kwargs.get("vision_features"),
            **{name: kwargs.get(name) for name in IMAGE_OPTIONS},
        )
        settings = self.config.recovery_settings(kwargs.pop("compress", None))
        is_ready = kwargs.get("visual_embeds") is not None or kwargs.get("mm_encoder_outputs") is not None
        # Pixels cannot be split into chunks nor given to any assistant: then all visual tokens are made beforehand.
        takes_pixels = (
            self._setting("prefill_chunk_size", generation_config, kwargs) is None and assistant_model is None
        )
        is_off = images is None or (not settings.compress and takes_pixels and images.vision_features is None)
        has_history = images is None and input_ids is not None and kwargs.get("inputs_embeds") is None
        has_history = CompressedHistory.of(cache) is not None and (has_history or images is not None)
        if is_ready or (is_off and not has_history):
            if settings.compress and images is None and cache is None and not is_ready:
                self._refuse_placeholders_without_images(input_ids, kwargs)
            if images is not None:
                kwargs["compress"] = False
            for name in QUESTION_INPUTS:  # an assistant would get them too
                kwargs.pop(name, None)
            with nullcontext() if images is None else stock_forward():
                return super().generate(inputs, **options, **kwargs)

        self._check_arguments(inputs, generation_config, kwargs)
        for name in ("input_ids", "pixel_values", "vision_features", *IMAGE_OPTIONS):
            kwargs.pop(name, None)
        question_inputs = {name: kwargs.pop(name, None) for name in QUESTION_INPUTS}
        inputs_embeds = kwargs.pop("inputs_embeds", None)
        ids = input_ids if input_ids is not None else self.model.ids_of_embeds(inputs_embeds)
        is_new = cache is None or int(cache.get_seq_length()) == 0
        if is_new and images is not None and self.model.is_short(ids, images, settings):
            visual_embeds, _ = self.model.embed_short_prompt(ids, images, settings, **question_inputs)
            if inputs_embeds is None:
                return super().generate(ids, visual_embeds=visual_embeds, **options, **kwargs)
            embeds = self.model.embed(ids, visual_embeds, inputs_embeds)
            given = {} if input_ids is None else {"input_ids": input_ids}
            return super().generate(inputs_embeds=embeds, **given, **options, **kwargs)

        if is_new and kwargs.get("attention_mask") is None and input_ids is not None:
            kwargs["attention_mask"] = self._mask_of_padding(input_ids, generation_config, kwargs)
        prompt = self._compress(ids, inputs_embeds, images, question_inputs, cache, settings, kwargs)
        if input_ids is None:
            prompt.hide_ids()
        options.update(prompt.callbacks(options))
        options["generation_config"], kwargs = self._count_original_length(prompt, generation_config, kwargs)

        history = getattr(cache, HISTORY, None)
        if history is not None:
            delattr(cache, HISTORY)  # inside the loop it is an ordinary cache of the short prompt
        try:
            result = super().generate(**prompt.loop_inputs(), **options, **kwargs)
        except BaseException:
            if history is not None:
                setattr(cache, HISTORY, history)
            raise
        is_tensor = isinstance(result, torch.Tensor)
        short_sequences: Any = result if is_tensor else getattr(result, "sequences", None)
        if custom_generate is not None and not prompt.begins(short_sequences):
            if history is not None:
                setattr(cache, HISTORY, history)
            return result
        cache = cache if is_tensor else cache_of(result)
        if cache is not None:
            prompt.remember(cache, short_sequences)
        if is_tensor:
            return prompt.restore(short_sequences)
        result.sequences = prompt.restore(short_sequences)
        return result

    def _refuse_placeholders_without_images(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return
        count = int((input_ids == self.config.image_token_id).sum())
        if count:
            raise ValueError(
                f"The prompts have {count} image placeholders, but no images were passed: add pixel_values."
            )

    def _setting(self, name: str, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
        """A field of the generation config of a call: keywords go before the config given, and this before our own."""
        if name in kwargs:
            return kwargs[name]
        given = getattr(generation_config, name, None)
        return getattr(self.generation_config, name, None) if given is None else given

    def _check_arguments(
        self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> None:
        """What stock refuses before or within its loop, or leaves images out for, is refused before ours."""
        input_ids, attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are two names of one argument: pass the prompt under one of them.")
        if inputs is None and input_ids is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("There are images, but no prompt with their placeholders: pass input_ids.")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, but must be [prompts, tokens], with 0 "
                "for padding."
            )
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(
                'cache_implementation="paged" generates from token ids alone, without images: leave it out.'
            )
        if self._setting("token_healing", generation_config, kwargs):
            raise ValueError(
                "token_healing=True writes the prompts anew as text, without image placeholders: leave it out, and "
                "end prompts where a token ends."
            )

    def _mask_of_padding(
        self, input_ids: torch.Tensor, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """What stock `generate` takes for the mask where none is given: every padding token counts as padding."""
        padding, end = (self._setting(name, generation_config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        if padding is None or padding in (end if isinstance(end, list) else [end]):
            return None
        return (input_ids != padding).long()

    def _compress(
        self,
        ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        images: ImageInputs | None,
        question_inputs: dict[str, torch.Tensor | None],
        cache: Cache | None,
        settings: RecoverySettings,
        kwargs: dict[str, Any],
    ) -> GenerationPrompt:
        """The short prompt for the loop. Takes what it uses out of `kwargs`."""
        attention_mask, position_ids = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        if attention_mask is not None and len(attention_mask) != len(ids):
            raise ValueError(f"attention_mask has {len(attention_mask)} rows, but there are {len(ids)} prompts.")
        cached_length = 0 if cache is None else int(cache.get_seq_length())
        is_full = inputs_embeds is None
        if cached_length:
            history = CompressedHistory.of(cache) or uncompressed_history(ids[:, :0], cached_length, attention_mask)
            is_full = is_full and is_full_history(ids, attention_mask, history)
        else:
            history = CompressedHistory.empty(ids)
            if attention_mask is not None and attention_mask.shape[1] < ids.shape[1]:
                raise ValueError(
                    f"attention_mask has {attention_mask.shape[1]} columns, but the prompts have {ids.shape[1]} tokens."
                )
        num_past = history.input_ids.shape[1] if is_full else 0
        new_ids = ids[:, num_past:]
        if new_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids has {ids.shape[1]} tokens, and past_key_values holds as many: there is no new token to go "
                "on from. Pass at least one token that is not cached."
            )
        new_mask = torch.ones_like(new_ids) if attention_mask is None else attention_mask[:, -new_ids.shape[1] :]
        new_positions = None if position_ids is None else position_ids[:, -new_ids.shape[1] :]
        if images is not None and num_past:
            images = self._images_of_new_tokens(images, ids, new_ids, settings)
        if images is None:
            short, visual_embeds = ShortPrompt.unchanged(new_ids, new_mask), None
        else:
            short, visual_embeds, _ = self.model.compress_prompt(
                new_ids, images, settings, new_mask, new_positions, may_be_short=cached_length > 0, **question_inputs
            )
        if position_ids is not None and not cached_length:
            kwargs["position_ids"] = short.position_ids
        embeds = None
        if inputs_embeds is not None:
            embeds = self.model.embed(short.input_ids, visual_embeds, short.of_original(inputs_embeds))
        elif visual_embeds is not None:
            visual_embeds = nn.functional.pad(visual_embeds, (0, 0, cached_length, 0))
        extended = history.extended(new_ids, new_mask.long(), short)
        return GenerationPrompt(
            given_ids=ids,
            loop_ids=extended.short_input_ids if is_full else short.input_ids,
            short_attention_mask=extended.short_attention_mask,
            visual_embeds=visual_embeds,
            inputs_embeds=embeds,
            history=extended,
        )

    def _images_of_new_tokens(
        self, images: ImageInputs, ids: torch.Tensor, new_ids: torch.Tensor, settings: RecoverySettings
    ) -> ImageInputs | None:
        """Of the images of a full history, those whose placeholders are new; images of the new part alone stay."""
        if images.pixel_values is None:
            return images
        counts = self.model.full_counts(images, ids.device)
        budgets = [] if settings.visual_token_budget is None else [settings.visual_token_budget]
        candidates = [counts.per_image, *(torch.full_like(counts.per_image, budget) for budget in budgets)]
        num_new = int((new_ids == self.config.image_token_id).sum())
        num_all = int((ids == self.config.image_token_id).sum())
        for per_image in candidates:
            total = int(per_image.sum())
            if num_new == total:
                return images
            if num_all == total:
                placeholders = locate_placeholders(ids, self.config.image_token_id, per_image)
                num_past = ids.shape[1] - new_ids.shape[1]
                is_new = torch.zeros_like(per_image).index_add_(
                    0,
                    placeholders.image[:, num_past:][placeholders.mask[:, num_past:]],
                    torch.ones(num_new, dtype=per_image.dtype, device=per_image.device),
                )
                return images.only(is_new > 0, counts.pixel_rows)
        check_placeholder_count(num_new, len(images), counts, settings)
        return images

    def _count_original_length(
        self, prompt: GenerationPrompt, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> tuple[GenerationConfig | None, dict[str, Any]]:
        """Make explicit `max_length` and `min_length` count the original prompt, as they do in stock `generate`."""
        if generation_config is not None:
            generation_config = copy.deepcopy(generation_config)

        def setting(name: str) -> Any:
            return self._setting(name, generation_config, kwargs)

        max_length, min_length = setting("max_length"), setting("min_length")
        changed = {}
        if max_length is not None and setting("max_new_tokens") is None:
            if max_length <= prompt.original_length:
                raise ValueError(
                    f"max_length is {max_length}, but the prompt alone has {prompt.original_length} tokens (image "
                    "placeholders included): increase max_length or, better yet, set max_new_tokens."
                )
            changed["max_length"] = max_length - prompt.num_dropped
        if min_length and setting("min_new_tokens") is None:
            changed["min_length"] = max(min_length - prompt.num_dropped, 0)
        for name, value in changed.items():
            if generation_config is not None and kwargs.get(name) is None:
                setattr(generation_config, name, value)
            else:
                kwargs[name] = value
        return generation_config, kwargs
