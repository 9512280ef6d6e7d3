"""The whole road of publishing at full size: build, verify, load and ask, beside stock LLaVA, as a table.

    python -m benchmarks.full_size_road --out output/full_size_road

Writes a base with random weights in the shape of LLaVA-1.5-7B and the CLIP ViT-L/14-336 of its vision tower, shard by
shard, so that it never is in memory; builds, verifies, and loads both from it. No network is needed. The checkpoints
lie in a temporary folder under `--out` and are removed at the end: `--size 7B` takes 16 GB of disk, 16 GB of memory,
and a GPU of 18 GB or, without one, patience. `--size tiny` is for the tests.

Random patches are all far from each other, so that adaptive mode would keep nearly all: the budget is fixed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from training.language import CHAT_TEMPLATE, IMAGE_TOKEN, language_tokenizer, question_tokenizer


ROOT = Path(__file__).parents[1]
SHARD_BYTES = 2 * 2**30
DISK_BYTES = 18e9  # 14.1 GB of base, 1.7 GB of CLIP, 0.5 GB of question tower, and some room
WEIGHT_SCALE = 0.02
QUESTION = "What color is the lemon?"


@dataclass(frozen=True)
class Size:
    """What differs from the sizes of LLaVA-1.5-7B and of its CLIP, which are transformers' defaults."""

    budget: int
    language_model: dict[str, int]
    vision_tower: dict[str, int]
    question_tower: dict[str, int]


SIZES = {
    "7B": Size(
        64,
        {"vocab_size": 32064, "max_position_embeddings": 4096},
        {},
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "tiny": Size(
        16,
        {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 112,
        },
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}
VISION_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class Step:
    """One line of the table; memory in bytes."""

    name: str
    seconds: float
    resident: int
    on_gpu: int | None = None


# ------------------------------------------------------------------------------------------------------- checkpoints


def base_config(size: Size) -> LlavaConfig:
    return LlavaConfig(
        vision_config={**VISION_TOWER, **size.vision_tower, "model_type": "clip_vision_model"},
        text_config={"model_type": "llama", **size.language_model, **special_tokens(language_tokenizer())},
        image_token_index=language_tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        tie_word_embeddings=False,
        dtype="float16",
    )


def clip_config(size: Size) -> CLIPConfig:
    projection_dim = VISION_TOWER["projection_dim"]
    return CLIPConfig(
        vision_config={**VISION_TOWER, **size.vision_tower},
        text_config={**size.question_tower, **special_tokens(question_tokenizer()), "projection_dim": projection_dim},
        projection_dim=projection_dim,
    )


def special_tokens(tokenizer: Any) -> dict[str, int]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def write_base(folder: Path, size: Size) -> int:
    """A stock LLaVA with random weights in float16 and its processor; returns the bytes of its weights."""
    config, tokenizer = base_config(size), language_tokenizer()
    written = write_weights(folder, LlavaForConditionalGeneration, config, torch.float16)
    config.save_pretrained(folder)
    GenerationConfig(**special_tokens(tokenizer), do_sample=False).save_pretrained(folder)
    side = config.vision_config.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return written


def write_clip(folder: Path, size: Size) -> int:
    """The CLIP of the base's vision tower, in float32 as it is published, and its tokenizer."""
    config = clip_config(size)
    written = write_weights(folder, CLIPModel, config, torch.float32)
    config.save_pretrained(folder)
    question_tokenizer().save_pretrained(folder)
    return written


def write_weights(folder: Path, model_class: Any, config: Any, dtype: torch.dtype) -> int:
    """Random weights of a model that is never made, one shard in memory at a time."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        room -= shape.numel() * dtype.itemsize
        if room < 0 and shards[-1]:
            shards.append([])
            room = SHARD_BYTES - shape.numel() * dtype.itemsize
        shards[-1].append(name)
    folder.mkdir(parents=True)
    total = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"Writing {folder.name}") as progress:
        for index, names in enumerate(shards):
            file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            weights = {name: random_weight(name, shapes[name]).to(dtype).cpu() for name in names}
            save_file(weights, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
            progress.update(sum(shapes[name].numel() for name in names) * dtype.itemsize)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def random_weight(name: str, shape: torch.Size) -> torch.Tensor:
    """The same for one name: base and CLIP have one vision tower."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, device=device)
    inside = re.sub(r"^(model\.vision_tower\.(vision_model\.)?|vision_model\.)", "vision_tower.", name)
    generator = torch.Generator(device).manual_seed(zlib.crc32(inside.encode()))
    return torch.randn(shape, generator=generator, device=device) * WEIGHT_SCALE


# ------------------------------------------------------------------------------------------------------ measurements


def measured(name: str, *command: object) -> tuple[Step, str]:
    """Runs a Python command; its seconds, the highest resident memory of its processes, and what it printed."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} ended with status {process.returncode}:\n{output}")
    return Step(name, time.perf_counter() - start, usage.ru_maxrss * 1024), output


def load_and_ask(folder: str, is_stock: bool) -> None:
    """Loads a checkpoint as a user would, asks one question, and prints what that took; in a process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    if is_stock:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").to(device)
        processor = LlavaProcessor.from_pretrained(folder)
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype="auto").to(device)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    image = Image.radial_gradient("L").convert("RGB")
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    on_gpu = torch.cuda.max_memory_allocated() if device == "cuda" else None
    report = {"seconds": seconds, "on_gpu": on_gpu, "new_tokens": answer.shape[1] - inputs["input_ids"].shape[1]}
    print(json.dumps(report))


def measured_load(name: str, folder: Path, is_stock: bool) -> Step:
    """The second of two loads: the files are in the page cache then, for both."""
    code = f"from benchmarks.full_size_road import load_and_ask; load_and_ask({str(folder)!r}, {is_stock})"
    for _ in range(2):
        step, output = measured(name, "-c", code)
    report = json.loads(output.splitlines()[-1])
    return Step(name, report["seconds"], step.resident, report["on_gpu"])


def write(folder: str, size: str) -> None:
    """Writes both checkpoints and prints the bytes of their weights; in a process of its own."""
    base, clip = write_base(Path(folder, "base"), SIZES[size]), write_clip(Path(folder, "clip"), SIZES[size])
    print(json.dumps({"bytes": base + clip}))


def walk(folder: Path, size: str) -> tuple[list[Step], str]:
    """Every step of the road, in `folder`, and what `verify` printed."""
    base, clip, built = folder / "base", folder / "clip", folder / "built"
    code = f"from benchmarks.full_size_road import write; write({str(folder)!r}, {size!r})"
    step, output = measured("write a random base and its CLIP", "-c", code)
    gigabytes = json.loads(output.splitlines()[-1])["bytes"] / 1e9
    steps = [replace(step, name=f"{step.name}, {gigabytes:.1f} GB")]
    budget = ("--visual-token-budget", SIZES[size].budget)
    steps += [measured("build", "-m", "hub_upload", "build", base, "--clip", clip, "--output", built, *budget)[0]]
    step, verified = measured("verify", "-m", "hub_upload", "verify", built)
    steps += [step]
    steps += [measured_load("load, stock LLaVA", base, is_stock=True)]
    steps += [measured_load("load, built repository", built, is_stock=False)]
    return steps, verified


def table(steps: list[Step]) -> str:
    rows = [
        f"| {step.name} | {step.seconds:.1f} | {step.resident / 1e9:.1f} | "
        f"{'' if step.on_gpu is None else f'{step.on_gpu / 1e9:.1f}'} |"
        for step in steps
    ]
    return "\n".join(
        ["| step | seconds | peak resident memory, GB | peak GPU memory, GB |", "|---|---|---|---|", *rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/full_size_road"))
    parser.add_argument("--size", choices=list(SIZES), default="7B")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(arguments.out).free
    if arguments.size != "tiny" and free < DISK_BYTES:
        raise SystemExit(
            f"--out {arguments.out}: its disk has {free / 1e9:.0f} GB free and the checkpoints take "
            f"{DISK_BYTES / 1e9:.0f} GB: choose another place"
        )
    with tempfile.TemporaryDirectory(dir=arguments.out) as temporary:
        steps, verified = walk(Path(temporary).resolve(), arguments.size)
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    results = {"size": arguments.size, "machine": machine, "steps": [asdict(step) for step in steps]}
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    page = f"{table(steps)}\n\n{described}\n\n```\n{verified.strip()}\n```\n"
    (arguments.out / "table.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
