"""From a LLaVA checkpoint and a CLIP checkpoint to a folder that the Hub can serve.

The base's shards are linked, not rewritten; what CLIP adds goes into one more shard. Tensors are read one at a time, so
memory does not grow with the base. The folder appears under its name only when it is complete: it is built beside it
and renamed, so a build that fails or is killed leaves nothing that could be mistaken for a result.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hub_upload.checkpoint import (
    HASH_BLOCK_BYTES,
    INDEX,
    WEIGHTS,
    Checkpoint,
    TensorEntry,
    files_sha256,
    merged_index,
    read_checkpoint,
    read_json,
    read_tensor,
    write_json,
)
from hub_upload.hub import fetch_source
from hub_upload.inspection import CONFIG, visible_files
from hub_upload.known_bases import OPENAI_CLIP, defaults_for, has_tuned_tower
from hub_upload.model_card import model_card, read_base_card, read_results
from hub_upload.provenance import CARD, PROVENANCE
from hub_upload.remote_code import (
    PAGE,
    configuration_fields,
    executed_files,
    package_auto_map,
    package_folder,
    remote_code_page,
    without_code,
)
from hub_upload.source import Source, copy_without_weights, is_license


EXTRA_SHARD = "model-question-tower.safetensors"
# transformers prefers a file called model.safetensors to any index, so a single-file base gets another name.
BASE_SHARD = "model-base.safetensors"
GENERATION_CONFIG = "generation_config.json"
QUESTION_TOWER, VISUAL_PROJECTION = "model.question_tower.", "model.visual_projection.weight"
# A difference this small is the rounding of the same weights to 16 bits, once or twice.
ROUNDING, SUBNORMAL = 2.0**-7, 1e-6

RECOVERY_SETTINGS = configuration_fields()


class BuildFailure(RuntimeError):
    """The machine could not finish the build; the message says what to do. Nothing was left behind."""


def build(
    base: str,
    output: str | Path,
    *,
    clip: str | None = None,
    base_revision: str | None = None,
    clip_revision: str | None = None,
    chat_template: str | Path | None = None,
    license: str | None = None,
    results: str | Path | None = None,
    token: str | None = None,
    accept_different_vision_tower: bool = False,
    **recovery: Any,
) -> Path:
    """Builds the folder `output` from `base` (LLaVA-1.5 or LLaVA-NeXT) and `clip`, each a folder or a repo id.

    Which family it is follows from the `model_type` of the base.

    Args:
        chat_template: file with a Jinja chat template, for a base that has none.
        license: identifier for the card, where the base's card states none.
        results: JSON list of measured results for the card.
        accept_different_vision_tower: build although the base's vision tower has other weights than CLIP's, as after
            fine-tuning it; shapes must agree all the same. Not needed where it is known (`has_tuned_tower`).
        **recovery: fields of `RecoverySettings`.
    """
    output = Path(output)
    unknown = sorted(recovery.keys() - RECOVERY_SETTINGS.keys())
    if unknown:
        raise ValueError(
            f"{unknown[0]}={recovery[unknown[0]]!r} is no recovery setting; they are {[*RECOVERY_SETTINGS]}"
        )
    if chat_template is not None and not Path(chat_template).is_file():
        raise ValueError(f"chat_template={str(chat_template)!r} does not exist: pass a Jinja file")
    refuse_existing(output)
    clip, settings = defaults_for(base, clip)
    base_source = fetch_source(base, base_revision, token, "base")
    clip_source = fetch_source(clip, clip_revision, token, "clip")
    with new_folder(output) as folder, tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        _fill(
            folder,
            _Part(base_source, copy_without_weights(base_source, Path(temporary, "base"))),
            _Part(clip_source, copy_without_weights(clip_source, Path(temporary, "clip"))),
            {**settings, **recovery},
            chat_template=Path(chat_template).read_text(encoding="utf-8") if chat_template else None,
            license=license,
            results=read_results(Path(results) if results else None),
            accept_different_vision_tower=accept_different_vision_tower,
        )
    return output


@dataclass(frozen=True)
class _Part:
    """One of the two checkpoints: where its weights lie, and a safe copy of all else."""

    source: Source
    settings: Path


def _fill(
    folder: Path,
    base: _Part,
    clip: _Part,
    recovery: dict[str, Any],
    *,
    chat_template: str | None,
    license: str | None,
    results: list[dict[str, Any]],
    accept_different_vision_tower: bool,
) -> None:
    config, checked = recoverable_config(read_json(base.settings / CONFIG), read_json(clip.settings / CONFIG), recovery)
    base_weights, clip_weights = read_checkpoint(base.source.folder), read_checkpoint(clip.source.folder)
    base_sha256 = checked_sha256(base.source, base_weights.shards)
    checked_sha256(clip.source, clip_weights.shards if clip.source.hub_sha256 else [])
    may_differ = accept_different_vision_tower or has_tuned_tower(base.source.repo_id, clip.source.repo_id)
    differs = check_vision_tower(base_weights, clip_weights, may_differ)
    extra = extra_tensors(clip_weights, checked)
    shards = {shard: BASE_SHARD if shard == WEIGHTS else shard for shard in base_weights.shards}
    linked = [base.source.folder / shard for shard in shards]
    check_space(folder, linked, sum(entry.size for entry in extra.values()))
    for shard, name in shards.items():
        place_file(base.source.folder / shard, folder / name)
    write_extra_shard(clip_weights, extra, folder / EXTRA_SHARD)
    renamed = {name: replace(entry, shard=shards[entry.shard]) for name, entry in base_weights.tensors.items()}
    write_json(folder / INDEX, merged_index(renamed, extra, base_weights.index_metadata))
    write_json(folder / CONFIG, config)
    write_processor(folder, base.settings, clip.settings, checked, chat_template)
    for path in base.settings.iterdir():
        if path.name == GENERATION_CONFIG or is_license(path.name):
            shutil.copyfile(path, folder / path.name)
    for name in executed_files(package_folder(), config["auto_map"]):
        shutil.copyfile(package_folder() / name, folder / name)
    (folder / PAGE).write_text(remote_code_page(folder, config["auto_map"]), encoding="utf-8")
    files = files_sha256(folder, {*visible_files(folder)} - {*shards.values()}, "Hashing files")
    files |= {name: base_sha256[shard] for shard, name in shards.items()}
    provenance = {
        "base": base.source.provenance(),
        "base_shards": {name: shard for shard, name in shards.items()},
        "clip": clip.source.provenance(),
        "files": files,
        "recovery": {name: config[name] for name in RECOVERY_SETTINGS},
        "vision_tower_differs": differs,
    }
    write_json(folder / PROVENANCE, provenance)
    stated = read_base_card(base.settings)
    if license and license != stated.license:
        stated = replace(stated, license=license, license_name=None, license_link=None, states_license=False)
    (folder / CARD).write_text(model_card(config, checked, provenance, stated, results), encoding="utf-8")


def checked_sha256(source: Source, shards: list[str]) -> dict[str, str]:
    """SHA-256 of the source's shards; a download that differs from the Hub is refused before its weights are judged."""
    actual = files_sha256(source.folder, shards, f"Hashing {source.name}")
    damaged = sorted(name for name, digest in actual.items() if source.hub_sha256.get(name, digest) != digest)
    if damaged:
        raise ValueError(
            f"{', '.join(damaged)} of {source.name} in the local cache differs from the Hub: it is damaged. Delete "
            f"{source.folder.parents[1]} and run the command again"
        )
    return actual


# ------------------------------------------------------------------------------------------------------- folder


def refuse_existing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and is not empty: choose another folder or delete it first")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A hidden sibling of `output` that becomes `output` at the end, or disappears."""
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    folder = output.parent / f"{_hidden_name(output)}{uuid.uuid4().hex[:8]}"
    lock = folder.with_name(folder.name + ".lock")
    try:
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            folder.mkdir()
            yield folder
            refuse_existing(output)
            folder.replace(output)
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise BuildFailure(
            f"The disk of {output.parent} is full: {shutil.disk_usage(output.parent).free / 2**20:.0f} MiB were free "
            "at the end. Free some space, or choose an output on the same disk as the base, where shards take no "
            "space; then run the command again"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    return any(text in str(error) for text in ("No space left", "File too large", "quota exceeded"))


def _hidden_name(output: Path) -> str:
    """How the hidden siblings of `output` begin; of a long name the start, as names have at most 255 bytes."""
    return f".{output.name[:48]}.building-"


def _remove_abandoned(output: Path) -> None:
    """Removes what builds of the same output left when they were killed; a running one holds its lock."""
    for lock in output.parent.glob(f"{glob.escape(_hidden_name(output))}*.lock"):
        with lock.open("w") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)


def place_file(source: Path, target: Path) -> None:
    """A hard link of the file behind `source` (a cache holds symbolic links), or a copy where links cannot be."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}:
            raise
        _copy_with_progress(source, target)


def _copy_with_progress(source: Path, target: Path) -> None:
    from tqdm.auto import tqdm

    size = source.stat().st_size
    with (
        source.open("rb") as reader,
        target.open("wb") as writer,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"Copying {source.name}", disable=size < 2**28) as progress,
    ):
        while block := reader.read(HASH_BLOCK_BYTES):
            writer.write(block)
            progress.update(len(block))


def check_space(folder: Path, shards: list[Path], extra_bytes: int) -> None:
    """Before any byte is written: is there room for what cannot be linked?"""
    device = folder.stat().st_dev
    copied = sum(shard.stat().st_size for shard in shards if shard.stat().st_dev != device)
    free = shutil.disk_usage(folder).free
    if copied + extra_bytes > free:
        raise BuildFailure(
            f"The disk of {folder.parent} has {free / 2**20:.0f} MiB free, and the build needs "
            f"{(copied + extra_bytes) / 2**20:.0f} MiB there. Free some space, or choose an output on the same disk as "
            "the base, where shards take no space"
        )


# ------------------------------------------------------------------------------------------------------- config


def recoverable_config(
    base: dict[str, Any], clip: dict[str, Any], recovery: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """config.json, and the same as a checked object. The base's own fields stay as written, for every version to
    read."""
    from recoverable_llava.tools.families import FAMILIES

    model_type = base.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"base: config.json says model_type={model_type!r}; only 'llava' (LLaVA-1.5), 'llava_next' "
            "(LLaVA-1.6) and fine-tunes of both, in the transformers layout as in llava-hf, can be built"
        )
    family = FAMILIES[model_type]
    if "quantization_config" in base:
        raise ValueError("base: the checkpoint is quantized; build from the unquantized one and quantize when loading")
    if clip.get("model_type") != "clip":
        raise ValueError(
            f"clip: config.json says model_type={clip.get('model_type')!r}; a complete CLIP model ('clip': vision "
            "tower, text tower and both projections) is needed"
        )
    _check_vision_config(family.stock_model_class.config_class, base, clip)
    question = _question_config(clip)
    kept = {name: value for name, value in without_code(base).items() if name not in ("_name_or_path", "architectures")}
    fields = {**kept, "question_config": question, **recovery}
    checked = family.config_class(**{name: value for name, value in fields.items() if name != "model_type"})
    settings = {name: getattr(checked, name) for name in RECOVERY_SETTINGS}
    auto_map = package_auto_map(model_type)
    return {
        **kept,
        **settings,
        "architectures": [auto_map["AutoModelForImageTextToText"].split(".")[1]],
        "auto_map": dict(auto_map),
        "model_type": family.config_class.model_type,
        "question_config": question,
    }, checked


def _question_config(clip: dict[str, Any]) -> dict[str, Any]:
    """The text tower's configuration with every default written out, without what belongs to generation."""
    from transformers import CLIPConfig

    checked = CLIPConfig(**{name: value for name, value in clip.items() if name != "model_type"})
    text_config: Any = checked.text_config
    text = text_config.to_dict()
    names = (
        *("attention_dropout", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_factor"),
        *("initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "model_type"),
        *("num_attention_heads", "num_hidden_layers", "pad_token_id", "vocab_size"),
    )
    return {**{name: text[name] for name in names if name in text}, "projection_dim": checked.projection_dim}


def _check_vision_config(config_class: Any, base: dict[str, Any], clip: dict[str, Any]) -> None:
    from transformers import CLIPConfig

    ours: Any = config_class(**{name: value for name, value in base.items() if name != "model_type"}).vision_config
    theirs: Any = CLIPConfig(**{name: value for name, value in clip.items() if name != "model_type"}).vision_config
    if ours.model_type != "clip_vision_model":
        raise ValueError(
            f"base: its vision tower is a {ours.model_type!r}, not CLIP's; there is no class token to rank by"
        )
    shape = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"]
    for name in shape:
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"clip: its vision tower has {name}={getattr(theirs, name)}, the base's has {getattr(ours, name)}: it "
                f"is not the CLIP that the base was trained with. LLaVA-1.5 and LLaVA-1.6 use {OPENAI_CLIP}"
            )


# ------------------------------------------------------------------------------------------------------ weights


def _vision_tensors(checkpoint: Checkpoint, marks: tuple[str, ...]) -> dict[str, str]:
    """Tensors of the vision tower: name inside the tower, whatever the layout's prefixes, to name in the checkpoint."""
    found = {}
    for name in checkpoint.tensors:
        for mark in marks:
            if name.startswith(mark) and not name.endswith("position_ids"):
                found[name.removeprefix(mark).removeprefix("vision_model.")] = name
                break
    return found


def check_vision_tower(base: Checkpoint, clip: Checkpoint, accept_difference: bool = False) -> bool:
    """Whether the base's vision tower differs from CLIP's, up to the rounding to 16 bits; refused unless accepted."""
    import torch

    ours = _vision_tensors(base, ("model.vision_tower.", "vision_tower."))
    theirs = _vision_tensors(clip, ("vision_model.",))
    if not ours or not theirs:
        raise ValueError(f"{'base' if not ours else 'clip'}: the checkpoint holds no vision tower")
    if ours.keys() != theirs.keys():
        name = sorted(ours.keys() ^ theirs.keys())[0]
        raise ValueError(
            f"clip: {name!r} is in only one of base and CLIP vision tower: they are of different architecture"
        )
    differing, largest = [], 0.0
    for name in sorted(ours):
        left, right = base.tensors[ours[name]], clip.tensors[theirs[name]]
        if left.shape != right.shape:
            raise ValueError(
                f"clip: {name!r} of the vision tower has shape {list(right.shape)}, in the base {list(left.shape)}: it "
                "is not the CLIP that the base was trained with"
            )
        mine = read_tensor(base, ours[name]).to(torch.float32)
        reference = read_tensor(clip, theirs[name]).to(torch.float32)
        if not torch.isfinite(mine).all():
            raise ValueError(f"base: {ours[name]!r} holds NaN or infinity: the shard is damaged, fetch it again")
        gap = (mine - reference).abs()
        if bool((gap > ROUNDING * reference.abs() + SUBNORMAL).any()):
            differing.append(name)
            largest = max(largest, float(gap.max()))
    if differing and not accept_difference:
        raise ValueError(
            f"clip: {len(differing)} of {len(ours)} tensors of the base's vision tower differ from this CLIP's "
            f"(largest difference {largest:.3g}, first {differing[0]!r}). Either this is not the CLIP that the base "
            "was trained with, or the tower was fine-tuned (as that of LLaVA-1.6 was), and CLIP's text tower may no "
            "longer fit it. In the second case build with accept_different_vision_tower "
            "(--accept-different-vision-tower) and measure what compression costs"
        )
    return bool(differing)


def extra_tensors(clip: Checkpoint, config: Any) -> dict[str, TensorEntry]:
    """What CLIP adds, by its name in the built model; exactly what the model will ask for, or a ValueError."""
    import torch
    from transformers import CLIPTextModelWithProjection

    with torch.device("meta"):
        tower = CLIPTextModelWithProjection(config.question_config)
    wanted = {f"{QUESTION_TOWER}{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    wanted[VISUAL_PROJECTION] = (config.question_config.projection_dim, config.vision_config.hidden_size)
    found = {extra_name(name): entry for name, entry in clip.tensors.items() if extra_name(name)}
    for name, shape in wanted.items():
        source = name.removeprefix(QUESTION_TOWER).removeprefix("model.")
        if name not in found:
            raise ValueError(f"clip: the checkpoint lacks {source!r}; a complete CLIP model with both towers is needed")
        if found[name].shape != shape:
            raise ValueError(
                f"clip: {source!r} has shape {list(found[name].shape)}, its config.json asks for {list(shape)}: "
                "weights and configuration do not belong together"
            )
    return {name: replace(found[name], shard=EXTRA_SHARD) for name in sorted(wanted)}


def extra_name(clip_name: str) -> str | None:
    """Name in the built model of a CLIP tensor, or None for one that is not needed."""
    if clip_name.endswith("position_ids"):  # a buffer that old checkpoints carry and the model makes itself
        return None
    if clip_name == "visual_projection.weight":
        return VISUAL_PROJECTION
    if clip_name.startswith(("text_model.", "text_projection.")):
        return f"{QUESTION_TOWER}{clip_name}"
    return None


def write_extra_shard(clip: Checkpoint, extra: dict[str, TensorEntry], path: Path) -> None:
    """Keeps CLIP's own precision: the loader casts, and the bytes stay comparable with their source."""
    from safetensors.torch import save_file

    sources = {extra_name(name): name for name in clip.tensors}
    save_file({name: read_tensor(clip, sources[name]) for name in extra}, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------- processor


def write_processor(folder: Path, base: Path, clip: Path, config: Any, chat_template: str | None) -> None:
    from recoverable_llava.tools.combine import combine_processors

    try:
        processor = combine_processors(base, clip, config, chat_template)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(f"the processor of base or the tokenizer of clip cannot be used: {error}") from None
    if not processor.chat_template:
        raise ValueError(
            "base: it has no chat template, which the pipeline and the finding of the question need. Pass the one it "
            "was trained with as a Jinja file: chat_template (--chat-template FILE)"
        )
    processor.save_pretrained(folder)
