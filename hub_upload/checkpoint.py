"""What a safetensors checkpoint holds, read from its headers: no tensor is loaded until it is asked for by name.

A checkpoint is a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`. Everything that
can be found broken without reading the weights (a truncated index, a missing or cut shard, an index that disagrees
with its shards) is found here, before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open


if TYPE_CHECKING:
    import torch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HASH_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it looks like."""

    shard: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    size: int


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    tensors: dict[str, TensorEntry]
    index_metadata: dict[str, Any]

    @property
    def shards(self) -> list[str]:
        return sorted({entry.shard for entry in self.tensors.values()})


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():  # also of a pipe, which would be waited for
        raise ValueError(f"{path} is missing: {path.parent} is not a complete transformers checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): it is truncated or damaged, fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object: fetch it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads every shard's header; like transformers, prefers a single file over an index."""
    if (folder / WEIGHTS).exists():
        return Checkpoint(folder, _read_shard(folder, WEIGHTS), {})
    if (folder / INDEX).exists():
        return _read_sharded(folder)
    pickled = sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} has no safetensors weights, only {', '.join(pickled)}, which are pickles and can run code when "
            "read. Use a revision or repository that holds safetensors, or convert a copy that you trust: "
            "AutoModel.from_pretrained(SOURCE, weights_only=True).save_pretrained(FOLDER), then pass FOLDER"
        )
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}: pass the folder of a complete checkpoint")


def _read_sharded(folder: Path) -> Checkpoint:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map: it is truncated or damaged, fetch it again")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names the shard {shard!r}; only .safetensors files beside it are read")
        tensors.update(_read_shard(folder, shard))
    listed = {name: entry.shard for name, entry in tensors.items()}
    if listed != weight_map:
        differing = sorted(
            name for name in listed.keys() | weight_map.keys() if listed.get(name) != weight_map.get(name)
        )
        raise ValueError(
            f"{folder / INDEX} and its shards disagree about {len(differing)} tensors, first {differing[0]!r}: "
            "the index or a shard belongs to another checkpoint, fetch them again"
        )
    return Checkpoint(folder, tensors, index.get("metadata") or {})


def _read_shard(folder: Path, shard: str) -> dict[str, TensorEntry]:
    if not (folder / shard).is_file():
        raise ValueError(f"{folder / shard} is missing, though the index names it: fetch it again")
    try:
        with safe_open(folder / shard, framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: _entry(shard, tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{folder / shard} cannot be read as safetensors ({error}): it is cut short or damaged, fetch it again"
        ) from None


def _entry(shard: str, shape: tuple[int, ...], dtype: str) -> TensorEntry:
    bits = int("".join(character for character in dtype.split("_")[0] if character.isdigit()) or 8)
    parameters = math.prod(shape)
    return TensorEntry(shard, shape, dtype, parameters, parameters * bits // 8)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor; the file is mapped for this call only, so that resident memory stays at one tensor."""
    with safe_open(checkpoint.folder / checkpoint.tensors[name].shard, framework="pt") as reader:
        return reader.get_tensor(name)


def merged_index(
    base: dict[str, TensorEntry], extra: dict[str, TensorEntry], metadata: dict[str, Any]
) -> dict[str, Any]:
    """The index of both; what the base's index says beyond sizes is kept."""
    entries = {**base, **extra}
    sizes = {
        "total_parameters": sum(entry.parameters for entry in entries.values()),
        "total_size": sum(entry.size for entry in entries.values()),
    }
    return {
        "metadata": {**metadata, **sizes},
        "weight_map": {name: entry.shard for name, entry in sorted(entries.items())},
    }


def file_sha256(path: Path, advance: Callable[[int], object] = lambda count: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def files_sha256(folder: Path, names: Iterable[str], description: str) -> dict[str, str]:
    """SHA-256 by name, with one progress bar over the bytes of all files when they are many."""
    from tqdm.auto import tqdm

    names = sorted(names)
    total = sum((folder / name).stat().st_size for name in names)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=total < 2**28) as progress:
        return {name: file_sha256(folder / name, progress.update) for name in names}
