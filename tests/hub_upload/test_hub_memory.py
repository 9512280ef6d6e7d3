"""A base of several gigabytes is built within the memory of a small one. The shards are sparse: they take no disk."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import ROOT
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from hub_upload.checkpoint import read_json, write_json


VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SIZES = {"F16": 2, "F32": 4}


def write_sparse_shard(path: Path, shapes: dict[str, list[int]], dtype: str) -> int:
    """A valid safetensors file of zeros that the disk does not store; returns its size."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(path, 8 + len(encoded) + offset)
    return path.stat().st_size


def meta_shapes(model_class: type, config: object) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(tensor.shape) for name, tensor in model_class(config).state_dict().items()}


def full_size_checkpoints(
    folder: Path, llava: Path, clip: Path, layers: int, hidden_size: int
) -> tuple[int, Path, Path]:
    """LLaVA-1.5 and CLIP ViT-L/14-336 in their real shapes, with `layers` layers of the language model."""
    base, tower = folder / "base", folder / "clip"
    shutil.copytree(clip, tower)
    config = read_json(tower / "config.json")
    text = {**config["text_config"], **TEXT, "vocab_size": 49408, "projection_dim": 768}
    config |= {"projection_dim": 768, "vision_config": {**config["vision_config"], **VISION}, "text_config": text}
    write_json(tower / "config.json", config)
    write_sparse_shard(tower / "model.safetensors", meta_shapes(CLIPModel, CLIPConfig(**config)), "F32")

    shutil.copytree(llava, base)
    (base / "model.safetensors").unlink()
    config = read_json(base / "config.json")
    config["vision_config"] |= VISION
    config["text_config"] |= {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 43 // 16,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 128,
        "num_key_value_heads": hidden_size // 128,
        "head_dim": 128,
        "vocab_size": 32064,
    }
    write_json(base / "config.json", {**config, "dtype": "float16"})
    shapes = meta_shapes(LlavaForConditionalGeneration, LlavaConfig(**config))
    names, total, weight_map = list(shapes), 0, {}
    shards = max(2, layers // 8)
    for index in range(shards):
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        total += write_sparse_shard(base / file, {name: shapes[name] for name in part}, "F16")
        weight_map.update(dict.fromkeys(part, file))
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return total, base, tower


def peak_memory_of_build(base: Path, clip: Path, output: Path) -> tuple[int, float]:
    """Highest resident memory of the building process in bytes, and its seconds.

    Not from `getrusage`: what that tells begins with the memory of the process that forked this one.
    """
    script = (
        "import re, sys; from hub_upload.__main__ import main; status = main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", script, "build", str(base), "--clip", str(clip), "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return int(run.stdout.splitlines()[-1]) * 1024, time.monotonic() - start


@pytest.mark.slow
def test_memory_does_not_grow_with_the_base(tmp_path, llava_folder, clip_folder):
    size, base, clip = full_size_checkpoints(
        tmp_path, Path(llava_folder), Path(clip_folder), layers=6, hidden_size=4096
    )
    assert size > 3e9
    peak, _ = peak_memory_of_build(base, clip, tmp_path / "out")
    assert peak < 2 * 2**30
    stored = sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").rglob("*.safetensors"))
    assert stored < 0.6e9  # the question tower; what is linked takes no second copy
