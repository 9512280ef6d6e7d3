"""The layouts in which LLaVA checkpoints are found on the Hub, made from a freshly saved one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def published_name(name: str) -> str:
    """As in llava-hf/llava-1.5-7b-hf."""
    return name.replace("vision_tower.", "vision_tower.vision_model.", 1)


def in_memory_name(name: str) -> str:
    """As in the state dict of today's class."""
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.", 1)


LAYOUTS = {
    "as saved": lambda name: name,
    "as published": published_name,
    "as in memory": in_memory_name,
    "as saved by 4.52": lambda name: in_memory_name(published_name(name)),
}


def save_layout(source: Path, folder: Path, layout: str, shards: int = 1) -> Path:
    """A copy of a checkpoint with its tensors renamed, in one file or in shards with an index."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors.update({LAYOUTS[layout](name): tensor for name, tensor in load_file(path).items()})
    ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json")
    shutil.copytree(source, folder, ignore=ignored, dirs_exist_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
