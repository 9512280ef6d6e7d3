"""Combine a stock LLaVA checkpoint and the CLIP model of its vision tower into a model with recoverable compression.

Loads both into memory, through their stock classes. For full-size checkpoints `hub_upload` does the same on disk, shard
by shard.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from .families import family_of


def combine(llava: str, clip: str, *, dtype: str | torch.dtype = "auto", **recovery_settings: Any) -> tuple[Any, Any]:
    """The combined model and its processor; no weight of either checkpoint changes.

    Args:
        llava: folder or repo id of a stock LLaVA or LLaVA-NeXT checkpoint with its processor.
        clip: folder or repo id of the CLIP model that its vision tower comes from, with its tokenizer.
        dtype: as in `from_pretrained`.
        recovery_settings: fields of `RecoverySettings`.

    Raises:
        ValueError: if a checkpoint loads with missing, unexpected or mismatched keys, or the two do not fit.
    """
    family = family_of(AutoConfig.from_pretrained(llava).model_type)
    stock = _load_completely(family.stock_model_class, llava, dtype)
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
    for name in ("model_type", "architectures", "auto_map", "custom_pipelines", "transformers_version"):
        settings.pop(name, None)
    config = family.config_class(**settings, question_config=question_config.to_dict(), **recovery_settings)
    model = family.model_class._from_config(config, dtype=stock.dtype)
    weights = {
        **stock.state_dict(),
        **{f"model.question_tower.text_model.{k}": v for k, v in clip_model.text_model.state_dict().items()},
        "model.question_tower.text_projection.weight": clip_model.text_projection.weight,
        "model.visual_projection.weight": clip_model.visual_projection.weight,
    }
    model.load_state_dict(weights, strict=True)
    model.generation_config = stock.generation_config
    model.eval()
    return model, combine_processors(llava, clip, config)


def combine_processors(llava: str | Path, clip: str | Path, config: Any, chat_template: str | None = None) -> Any:
    """LLaVA's image processor and tokenizer, and CLIP's tokenizer for the question, for the model of `config`.

    Args:
        llava: folder or repo id of a stock LLaVA's processor.
        clip: folder or repo id of CLIP's tokenizer.
        config: of the combined model.
        chat_template: Jinja text in place of the checkpoint's own.

    Raises:
        ValueError: if patches, vocabulary or the end of a question are not those of `config`.
    """
    family = family_of(config.model_type)
    stock = family.stock_processor_class.from_pretrained(llava)
    patch_size = config.vision_config.patch_size
    if stock.patch_size not in (None, patch_size):
        raise ValueError(
            f"LLaVA's processor has patch_size={stock.patch_size}, its vision tower {patch_size}: take both from the "
            "same checkpoint."
        )
    question_tokenizer = AutoTokenizer.from_pretrained(clip)
    vocab_size = config.question_config.vocab_size
    if len(question_tokenizer) > vocab_size:
        raise ValueError(
            f"CLIP's tokenizer has {len(question_tokenizer)} entries, its text tower {vocab_size}: take both from the "
            "same checkpoint."
        )
    # 2 is what CLIP's first configurations say; the tower then takes the highest token, which ends the question.
    end, expected = question_tokenizer.eos_token_id, config.question_config.eos_token_id
    if expected not in (2, end):
        raise ValueError(
            f"CLIP's tokenizer ends a question with token {end}, the text tower looks for {expected} and would read "
            "the wrong place: take both from the same checkpoint."
        )
    question_tokenizer.model_max_length = config.question_config.max_position_embeddings
    # All classes here are transformers' own; what is saved must not name those of another repository.
    for tokenizer in (stock.tokenizer, question_tokenizer):
        tokenizer.init_kwargs.pop("auto_map", None)
    for part in (stock.image_processor, stock.tokenizer, question_tokenizer):
        for name in ("auto_map", "_auto_map"):
            vars(part).pop(name, None)
    return family.processor_class(
        image_processor=stock.image_processor,
        tokenizer=stock.tokenizer,
        question_tokenizer=question_tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=chat_template or stock.chat_template or stock.tokenizer.chat_template,
        image_token=stock.image_token,
        # Written before version 4.46, a processor does not know of the class token, which CLIP always has.
        num_additional_image_tokens=stock.num_additional_image_tokens or 1,
        visual_token_budget=config.visual_token_budget,
    )


def _load_completely(model_class: Any, checkpoint: str, dtype: str | torch.dtype) -> Any:
    model, info = model_class.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    problems = {name: sorted(map(str, info[name])) for name in info if info[name]}
    if problems:
        raise ValueError(f"{checkpoint} does not load completely as {model_class.__name__}: {problems}.")
    return model
