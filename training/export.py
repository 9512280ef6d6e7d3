"""Trained weights to folders that anyone can load: a stock LLaVA, a stock CLIP, and the Hub repo made of both."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GenerationConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from .language import CHAT_TEMPLATE, IMAGE_TOKEN, language_tokenizer, question_tokenizer
from .model import TrainingModel, text_config, vision_config
from .scenes import IMAGE_SIZE
from .tiled_model import TiledTrainingModel
from .tiles import PICTURE_SIZES, PINPOINTS
from .weights import load_weights


LARGEST_SHARD = "14MB"


def clip_model(model: TrainingModel) -> CLIPModel:
    """The CLIP half as a stock model: the same vision tower, its projection and the text tower."""
    config = CLIPConfig(
        vision_config=vision_config(model.size).to_dict(),
        text_config=text_config(model.size).to_dict(),
        projection_dim=model.size.projection,
    )
    clip = CLIPModel(config)
    tower = model.question_tower.text_model
    clip.vision_model.load_state_dict(model.llava.model.vision_tower.state_dict())
    clip.text_model.load_state_dict(tower.state_dict())
    clip.text_projection.load_state_dict(model.question_tower.text_projection.state_dict())
    clip.visual_projection.load_state_dict(model.visual_projection.state_dict())
    clip.logit_scale.data.copy_(model.logit_scale.data)
    return clip.eval()


def export_stock(model: TrainingModel, folder: Path) -> tuple[Path, Path]:
    """Writes `folder`/llava and `folder`/clip in bfloat16, each loadable by the stock classes, and returns both."""
    llava_folder, clip_folder = folder / "llava", folder / "clip"
    sizes = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    clip_image_processor = CLIPImageProcessor(**sizes)
    processor_class, image_processor = LlavaProcessor, clip_image_processor
    if isinstance(model, TiledTrainingModel):
        processor_class = LlavaNextProcessor
        image_processor = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **sizes)
    tokenizer = copy.deepcopy(language_tokenizer())
    tokenizer.model_max_length = model.llava.config.text_config.max_position_embeddings
    llava = model.llava.eval().to(torch.bfloat16)
    llava.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
        do_sample=False,
    )
    llava.save_pretrained(llava_folder, max_shard_size=LARGEST_SHARD)
    processor_class(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=model.size.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(llava_folder)
    clip_model(model).to(torch.bfloat16).save_pretrained(clip_folder, max_shard_size=LARGEST_SHARD)
    CLIPProcessor(image_processor=clip_image_processor, tokenizer=question_tokenizer()).save_pretrained(clip_folder)
    return llava_folder, clip_folder


def export_combined(llava: Path, clip: Path, folder: Path) -> None:
    """Writes the Hub repo folder: both halves combined by the package, its code, and the processor.

    The family is that of the LLaVA in folder `llava`, which `combine` reads from its configuration.
    """
    from recoverable_llava.tools.asking import DRAWN_SCENES
    from recoverable_llava.tools.combine import combine

    world: dict[str, Any] = {"picture_domain": DRAWN_SCENES}
    if AutoConfig.from_pretrained(llava).model_type == "llava_next":
        world["picture_sizes"] = PICTURE_SIZES
    model, processor = combine(str(llava), str(clip), **world)
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    processor.save_pretrained(folder)


def export(run: str, output: str, checkpoint: str | None, smoke: bool = False) -> None:
    """Exports a run: stock folders under `output`, and the combined Hub repo to `checkpoint` if it is named."""
    llava, clip = export_stock(load_weights(Path(run), smoke), Path(output))
    if checkpoint is not None:
        export_combined(llava, clip, Path(checkpoint))
    print(json.dumps({"llava": str(llava), "clip": str(clip), "checkpoint": checkpoint}))
