"""Combine a stock LLaVA checkpoint and the CLIP model of its vision tower into a model with recoverable compression.

Loads both into memory, through their stock classes. For full-size checkpoints `hub_upload` does the same on disk, shard
by shard.
"""

from typing import Any

import torch
from transformers import AutoTokenizer, CLIPModel, LlavaForConditionalGeneration, LlavaProcessor

from recoverable_llava.configuration_recoverable_llava import RecoverableLlavaConfig
from recoverable_llava.modeling_recoverable_llava import RecoverableLlavaForConditionalGeneration
from recoverable_llava.processing_recoverable_llava import RecoverableLlavaProcessor


def combine(
    llava: str, clip: str, *, dtype: str | torch.dtype = "auto", **recovery_settings: Any
) -> tuple[RecoverableLlavaForConditionalGeneration, RecoverableLlavaProcessor]:
    """The combined model and its processor; no weight of either checkpoint changes.

    Args:
        llava: folder or repo id of a stock LLaVA checkpoint with its processor.
        clip: folder or repo id of the CLIP model that its vision tower comes from, with its tokenizer.
        dtype: as in `from_pretrained`.
        recovery_settings: fields of `RecoverableLlavaConfig`.

    Raises:
        ValueError: if a checkpoint loads with missing, unexpected or mismatched keys, or the two do not fit.
    """
    stock = _load_completely(LlavaForConditionalGeneration, llava, dtype)
    clip_model = _load_completely(CLIPModel, clip, stock.dtype)
    ours, theirs = stock.config.vision_config.hidden_size, clip_model.config.vision_config.hidden_size
    if ours != theirs:
        raise ValueError(
            f"The vision tower of {llava} has {ours} channels, the one of {clip} {theirs}: pass the CLIP model that "
            "the vision tower comes from."
        )

    question_config = clip_model.config.text_config
    question_config.projection_dim = clip_model.config.projection_dim
    settings = stock.config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        settings.pop(name, None)
    config = RecoverableLlavaConfig(**settings, question_config=question_config.to_dict(), **recovery_settings)
    model = RecoverableLlavaForConditionalGeneration._from_config(config, dtype=stock.dtype)
    weights = {
        **stock.state_dict(),
        **{f"model.question_tower.text_model.{k}": v for k, v in clip_model.text_model.state_dict().items()},
        "model.question_tower.text_projection.weight": clip_model.text_projection.weight,
        "model.visual_projection.weight": clip_model.visual_projection.weight,
    }
    model.load_state_dict(weights, strict=True)
    model.generation_config = stock.generation_config
    model.eval()

    stock_processor = LlavaProcessor.from_pretrained(llava)
    question_tokenizer = AutoTokenizer.from_pretrained(clip)
    question_tokenizer.model_max_length = question_config.max_position_embeddings
    processor = RecoverableLlavaProcessor(
        image_processor=stock_processor.image_processor,
        tokenizer=stock_processor.tokenizer,
        question_tokenizer=question_tokenizer,
        patch_size=stock_processor.patch_size or stock.config.vision_config.patch_size,
        vision_feature_select_strategy=stock.config.vision_feature_select_strategy,
        chat_template=stock_processor.chat_template,
        image_token=stock_processor.image_token,
        num_additional_image_tokens=stock_processor.num_additional_image_tokens,
        visual_token_budget=config.visual_token_budget,
    )
    return model, processor


def _load_completely(model_class: Any, checkpoint: str, dtype: str | torch.dtype) -> Any:
    model, info = model_class.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    problems = {name: sorted(map(str, info[name])) for name in info if info[name]}
    if problems:
        raise ValueError(f"{checkpoint} does not load completely as {model_class.__name__}: {problems}.")
    return model
