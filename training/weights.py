"""Weights of a run or a checkpoint: written in bfloat16, read into the training model of their family."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .model import SMOKE_SIZE, ModelSize, TrainingModel
from .tiled_model import TiledTrainingModel


SHARD_BYTES = 14 * 2**20
NEW_LINE = "llava.model.image_newline"  # what only a LLaVA-NeXT has


def save_weights(model: TrainingModel, folder: Path) -> None:
    """The weights in bfloat16 in shards under 14 MiB: enough to export from, and to go on from elsewhere."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, value in model.state_dict().items():
        if name == "llava.lm_head.weight":  # tied to the embeddings
            continue
        value = value.detach().to("cpu", torch.bfloat16).contiguous()
        if used + value.nbytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += value.nbytes
    for index, shard in enumerate(shards):
        save_file(shard, folder / f"weights-{index}.safetensors")


def load_weights(folder: Path, smoke: bool = False) -> TrainingModel:
    """The model with the weights of `folder`: those that `save_weights` wrote, or a Hub repo of both halves."""
    files = sorted(folder.glob("weights-*.safetensors"))
    size = SMOKE_SIZE if smoke else ModelSize()
    if not files and (folder / "config.json").exists():
        return _load_combined(size, folder)
    if not files:
        raise ValueError(
            f"no weights-*.safetensors in {str(folder)!r}: train first, or name the folder of a run or a checkpoint"
        )
    weights = {name: value.float() for file in files for name, value in load_file(file).items()}
    weights["llava.lm_head.weight"] = weights["llava.model.language_model.embed_tokens.weight"]
    model = TiledTrainingModel(size) if NEW_LINE in weights else TrainingModel(size)
    model.load_state_dict(weights)
    return model.eval()


def _load_combined(size: ModelSize, folder: Path) -> TrainingModel:
    from transformers import AutoModelForImageTextToText

    import recoverable_llava  # noqa: F401  (its classes are then known to AutoModel)

    combined = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model
    tiled = hasattr(combined, "image_newline")
    model = TiledTrainingModel(size) if tiled else TrainingModel(size)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        getattr(model.llava.model, name).load_state_dict(getattr(combined, name).state_dict())
    if tiled:
        model.llava.model.image_newline.data.copy_(combined.image_newline.data)
    for name in ("question_tower", "visual_projection"):  # CLIP's temperature is not part of a Hub repo
        getattr(model, name).load_state_dict(getattr(combined, name).state_dict())
    return model.eval()
