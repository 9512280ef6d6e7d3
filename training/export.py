"""Trained weights to folders that anyone can load: a stock LLaVA, a stock CLIP, and the Hub repo made of both."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GenerationConfig,
    LlavaProcessor,
)

from .language import CHAT_TEMPLATE, IMAGE_TOKEN, language_tokenizer, question_tokenizer
from .model import SMOKE_SIZE, ModelSize, TrainingModel, text_config, vision_config
from .scenes import IMAGE_SIZE


LARGEST_SHARD = "14MB"


def load_weights(folder: Path, smoke: bool = False) -> TrainingModel:
    """The model with the weights of `folder`: those that `train.save_weights` wrote, or a Hub repo of both halves."""
    files = sorted(folder.glob("weights-*.safetensors"))
    model = TrainingModel(SMOKE_SIZE if smoke else ModelSize())
    if not files and (folder / "config.json").exists():
        return _load_combined(model, folder)
    if not files:
        raise ValueError(
            f"no weights-*.safetensors in {str(folder)!r}: train first, or name the folder of a run or a checkpoint"
        )
    weights = {name: value.float() for file in files for name, value in load_file(file).items()}
    weights["llava.lm_head.weight"] = weights["llava.model.language_model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()


def _load_combined(model: TrainingModel, folder: Path) -> TrainingModel:
    from recoverable_llava import RecoverableLlavaForConditionalGeneration

    combined = RecoverableLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        getattr(model.llava.model, name).load_state_dict(getattr(combined, name).state_dict())
    for name in ("question_tower", "visual_projection"):  # CLIP's temperature is not part of a Hub repo
        getattr(model, name).load_state_dict(getattr(combined, name).state_dict())
    return model.eval()


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
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    tokenizer = language_tokenizer()
    llava = model.llava.eval().to(torch.bfloat16)
    llava.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=16,
        do_sample=False,
    )
    llava.save_pretrained(llava_folder, max_shard_size=LARGEST_SHARD)
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=model.size.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(llava_folder)
    clip_model(model).to(torch.bfloat16).save_pretrained(clip_folder, max_shard_size=LARGEST_SHARD)
    CLIPProcessor(image_processor=image_processor, tokenizer=question_tokenizer()).save_pretrained(clip_folder)
    return llava_folder, clip_folder


def export_combined(llava: Path, clip: Path, folder: Path) -> None:
    """Writes the Hub repo folder: both halves combined by the package, its code, and the processor."""
    from recoverable_llava.tools.asking import DRAWN_SCENES
    from recoverable_llava.tools.combine import combine

    model, processor = combine(str(llava), str(clip), picture_domain=DRAWN_SCENES)
    model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    processor.save_pretrained(folder)


def export(run: str, output: str, checkpoint: str | None, smoke: bool = False) -> None:
    """Exports a run: stock folders under `output`, and the combined Hub repo to `checkpoint` if it is named."""
    llava, clip = export_stock(load_weights(Path(run), smoke), Path(output))
    if checkpoint is not None:
        export_combined(llava, clip, Path(checkpoint))
    print(json.dumps({"llava": str(llava), "clip": str(clip), "checkpoint": checkpoint}))
