"""hub_upload.build: what the folder holds, and every input that must be refused before anything is written."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from batches import both_families
from command_line import CommandWorker
from huggingface_hub import ModelCard
from layouts import LAYOUTS, save_layout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import hub_upload.build as build_module
from hub_upload.build import (
    BASE_SHARD,
    EXTRA_SHARD,
    RECOVERY_SETTINGS,
    BuildFailure,
    build,
    recoverable_config,
)
from hub_upload.checkpoint import read_checkpoint, read_json, write_json
from hub_upload.known_bases import CLIP_OF_BASE, TUNED_TOWERS, defaults_for
from hub_upload.model_card import _how_many, _license_link, read_base_card
from hub_upload.remote_code import executed_files, imported_libraries, listed_hashes, package_folder
from recoverable_llava.configuration_recoverable_llava import AUTO_MAP
from recoverable_llava.configuration_recoverable_llava_next import AUTO_MAP as NEXT_AUTO_MAP
from recoverable_llava.tools.families import FAMILIES


ROOT = Path(__file__).parents[2]
AUTO_MAPS = {"llava": AUTO_MAP, "llava_next": NEXT_AUTO_MAP}


def changed_copy(source: Path, folder: Path, **config: object) -> Path:
    """A copy of a checkpoint whose config.json has other values; None removes one."""
    save_layout(source, folder, "as saved")
    merged = {**read_json(source / "config.json"), **config}
    write_json(folder / "config.json", {name: value for name, value in merged.items() if value is not None})
    return folder


def siblings(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


@both_families
def test_settings_are_read_from_the_configuration(family):
    classes = FAMILIES[family]
    fields = {field.name: str(field.type) for field in dataclasses.fields(classes.config_class)}
    inherited = {field.name for field in dataclasses.fields(classes.stock_model_class.config_class)}
    assert set(RECOVERY_SETTINGS) == set(fields) - inherited - {"question_config"}
    for name, kind in RECOVERY_SETTINGS.items():
        assert kind.__name__ in fields[name], name


def test_commands_that_only_send_files_import_no_torch():
    heavy = "{'torch', 'transformers', 'recoverable_llava'}"
    script = f"import sys, hub_upload.__main__; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@both_families
def test_folder_holds_everything_and_base_shards_are_the_same_files(built_once, base, family):
    names = {path.name for path in built_once.iterdir()}
    shards = read_checkpoint(base).shards
    assert {*shards, EXTRA_SHARD, "config.json", "processor_config.json", "generation_config.json"} <= names
    assert {"README.md", "trust_remote_code.md", "provenance.json", "chat_template.jinja", "LICENSE.txt"} <= names
    question_tokenizer = {path.name for path in (built_once / "question_tokenizer").iterdir()}
    assert {"tokenizer.json", "config.json"} <= question_tokenizer
    for shard in shards:
        assert os.path.samefile(base / shard, built_once / shard)
    code = executed_files(package_folder(), AUTO_MAPS[family])
    assert {name for name in names if name.endswith(".py")} == {*code}
    for name in code:
        assert (built_once / name).read_bytes() == (package_folder() / name).read_bytes()


def test_a_family_carries_no_file_of_another():
    one, other = (set(executed_files(package_folder(), auto_map)) for auto_map in AUTO_MAPS.values())
    assert "recoverable_model.py" in one & other
    assert {name.removesuffix(".py").partition("_")[0] for name in one - other} >= {"modeling", "processing"}
    assert not [name for name in one if "next" in name or "tiles" in name]
    own = {f"{part}_recoverable_llava_next.py" for part in ("configuration", "modeling", "processing")}
    assert own | {"image_tiles.py"} == other - one


@both_families
def test_config_keeps_the_base_and_adds_every_field(built_once, base, family):
    config, stock = (read_json(folder / "config.json") for folder in (built_once, base))
    changed = {"architectures", "model_type"}
    assert {name: config[name] for name in stock if name not in changed} == {
        name: value for name, value in stock.items() if name not in changed
    }
    assert config["auto_map"] == AUTO_MAPS[family]
    assert config["model_type"] == f"recoverable_{family}"
    assert {name: config[name] for name in tiny.RECOVERY} == tiny.RECOVERY
    assert set(RECOVERY_SETTINGS) <= set(config)
    assert config["question_config"]["projection_dim"] == 16
    processor_config = read_json(built_once / "processor_config.json")
    assert processor_config["auto_map"]["AutoProcessor"] == AUTO_MAPS[family]["AutoProcessor"]


def test_index_lists_every_tensor_and_extra_shard_is_clips_bytes(built_once, base, clip):
    index = read_json(built_once / "model.safetensors.index.json")
    checkpoint = read_checkpoint(built_once)
    assert index["metadata"]["total_size"] == sum(entry.size for entry in checkpoint.tensors.values())
    extra, source = load_file(built_once / EXTRA_SHARD), load_file(clip / "model.safetensors")
    for name, tensor in extra.items():
        assert torch.equal(tensor, source[name.removeprefix("model.").removeprefix("question_tower.")]), name
    assert set(checkpoint.tensors) == set(read_checkpoint(base).tensors) | set(extra)


def test_single_file_base_is_renamed_because_the_loader_prefers_its_old_name(tmp_path, llava_folder, clip):
    output = build(llava_folder, tmp_path / "out", clip=str(clip), **tiny.RECOVERY)
    assert not (output / "model.safetensors").exists()
    assert os.path.samefile(Path(llava_folder) / "model.safetensors", output / BASE_SHARD)


def test_two_builds_are_the_same(tmp_path, base, clip, built_once):
    again = build(str(base), tmp_path / "compressed", clip=str(clip), **tiny.RECOVERY)
    for path in (path for path in built_once.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(built_once)).read_bytes(), path.name


def test_across_disks_shards_are_copied(tmp_path, base, clip, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    output = build(str(base), tmp_path / "out", clip=str(clip), **tiny.RECOVERY)
    for shard in read_checkpoint(base).shards:
        assert not os.path.samefile(base / shard, output / shard)
        assert (base / shard).read_bytes() == (output / shard).read_bytes()


def test_buffers_of_old_clip_checkpoints_stay_out(tmp_path, base, clip):
    old = save_layout(clip, tmp_path / "clip", "as saved")
    tensors = load_file(old / "model.safetensors")
    for tower, length in (("text", 77), ("vision", tiny.NUM_PATCHES + 1)):
        tensors[f"{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    output = build(str(base), tmp_path / "out", clip=str(old), **tiny.RECOVERY)
    assert not [name for name in read_checkpoint(output).tensors if name.endswith("position_ids")]


def test_rounding_of_the_tower_to_16_bits_is_no_difference(tmp_path, llava_folder, clip):
    for dtype in (torch.float16, torch.bfloat16):
        half = save_layout(Path(llava_folder), tmp_path / f"base-{dtype}", "as saved")
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(half / "model.safetensors").items()}
        save_file(tensors, half / "model.safetensors", metadata={"format": "pt"})
        output = build(str(half), tmp_path / f"out-{dtype}", clip=str(clip), **tiny.RECOVERY)
        assert read_json(output / "provenance.json")["vision_tower_differs"] is False


def test_defaults_for_known_bases():
    for base in CLIP_OF_BASE:
        assert defaults_for(base, None) == ("openai/clip-vit-large-patch14-336", {"text_relevance": "negated"})
        assert defaults_for(base, "./my-copy-of-clip") == ("./my-copy-of-clip", {"text_relevance": "negated"})
    assert defaults_for("me/other", "openai/clip-vit-large-patch14-336")[1] == {"text_relevance": "negated"}
    assert defaults_for("me/other", "me/clip") == ("me/clip", {})
    with pytest.raises(ValueError, match=r"clip=None.*me/other.*llava-hf/llava-1.5-7b-hf"):
        defaults_for("me/other", None)


def test_configurations_as_they_are_published():
    """As llava-hf/llava-1.5-7b-hf and llava-v1.6-mistral-7b-hf write their config.json, defaults left out, and a CLIP
    of 2021, with every one."""
    text = {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    }
    tower = {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    }
    base = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {**tower, "vocab_size": 32000},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    old = {
        "_name_or_path": "",
        "add_cross_attention": False,
        "architectures": None,
        "bad_words_ids": None,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "max_length": 20,
        "num_beams": 1,
        "problem_type": None,
        "return_dict": True,
        "temperature": 1.0,
        "torch_dtype": None,
        "torchscript": False,
        "use_bfloat16": False,
    }
    heads = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    clip = {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {**old, **heads, "model_type": "clip_text_model", "vocab_size": 49408, "projection_dim": 768},
        "text_config_dict": None,
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {**old, **tower},
        "vision_config_dict": None,
    }
    config, checked = recoverable_config(base, clip, {"text_relevance": "negated"})
    assert config["text_config"] == text and config["vision_config"] == base["vision_config"]
    assert config["question_config"]["hidden_size"] == 768 and config["question_config"]["eos_token_id"] == 2
    assert config["text_relevance"] == "negated" and checked.num_patches == 576
    assert "max_length" not in config["question_config"]

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    newer = {
        **base,
        "architectures": ["LlavaNextForConditionalGeneration"],
        "image_grid_pinpoints": pinpoints,
        "model_type": "llava_next",
        "text_config": {**text, "model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None},
        "use_image_newline_parameter": True,
    }
    config, checked = recoverable_config(newer, clip, {"text_relevance": "negated"})
    assert config["model_type"] == "recoverable_llava_next"
    assert config["image_grid_pinpoints"] == pinpoints and config["text_config"] == newer["text_config"]
    assert checked.num_patches == 2880 and checked.text_config.model_type == "mistral"
    said = " ".join(_how_many(config, checked).split())
    assert "up to 2,880 visual tokens, by its shape: 576 of the whole picture" in said
    for budget, refused_images in ((320, False), (640, True)):
        said = _how_many({**config, "visual_token_budget": budget}, checked)
        assert f"exactly **{budget} of up to 2,880** visual tokens" in said
        assert f"({100 * budget / 2880:.0f} % of the most)" in said
        assert ("An image that has fewer is refused." in said) is refused_images
    with pytest.raises(ValueError, match='vision_feature_select_strategy must be "default" for LLaVA-NeXT'):
        recoverable_config({**newer, "vision_feature_select_strategy": "full"}, clip, {})


@pytest.mark.parametrize("kind", ["absolute", "relative", "snapshot"])
def test_links_out_of_a_local_base_are_not_followed(tmp_path, base, clip, kind):
    """A license, a template, settings: what a link of a stranger's base points to would be published."""
    folder = tmp_path / ("models--a/snapshots/base" if kind == "snapshot" else "base")
    copied = save_layout(base, folder, "as in memory", shards=2)
    secret = tmp_path / "secret"
    secret.write_text('{"my": "secret"}')
    names = ("LICENSE", "NOTICE.md", "USE_POLICY.txt", "chat_template.jinja", "generation_config.json")
    for name in names:
        (copied / name).unlink(missing_ok=True)
        (copied / name).symlink_to(Path("..", "secret") if kind == "relative" else secret)
    template = tmp_path / "template.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)
    with pytest.warns(UserWarning, match="is a link to a place outside of its checkpoint") as warned:
        output = build(str(copied), tmp_path / "out", clip=str(clip), chat_template=template, **tiny.RECOVERY)
    assert sorted(Path(str(warning.message).split()[0]).name for warning in warned) == sorted(names)
    for path in (path for path in output.rglob("*") if path.is_file()):
        assert b"secret" not in path.read_bytes(), path
    assert (output / "LICENSE.txt").read_text() == "The license of the base.\n"


def test_links_of_the_hubs_cache_are_followed(tmp_path, base, clip):
    """There every file is one, to its content beside the snapshots; people pass such a folder, too."""
    snapshot, blobs = tmp_path / "models--maker--llava" / "snapshots" / "0123", tmp_path / "models--maker--llava/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (path for path in base.iterdir() if path.is_file()):
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    output = build(str(snapshot), tmp_path / "out", clip=str(clip), **tiny.RECOVERY)
    assert (output / "LICENSE.txt").read_text() == "The license of the base.\n"
    assert not [path for path in output.rglob("*") if path.is_symlink()]


def test_pipes_are_not_waited_for(tmp_path, base, clip):
    for name in ("config.json", "model-00001-of-00002.safetensors", "LICENSE"):
        copied = save_layout(base, tmp_path / name, "as in memory", shards=2)
        (copied / name).unlink(missing_ok=True)
        os.mkfifo(copied / name)
        if name == "LICENSE":
            assert not (build(str(copied), tmp_path / "out", clip=str(clip), **tiny.RECOVERY) / name).exists()
        else:
            refused(f"{name} is missing", tmp_path / "out", copied, clip)


def test_long_and_special_names(tmp_path, base, clip):
    for name in ("o" * 250, "é" * 120, "with [brackets] *"):
        output = build(str(base), tmp_path / name, clip=str(clip), **tiny.RECOVERY)
        assert output.is_dir() and siblings(output) == [name]
        output.rename(tmp_path.parent / f"{tmp_path.name}-{len(name)}")


# ------------------------------------------------------------------------------------------------ what is refused


def refused(message: str, output: Path, base: object, clip: object, **arguments: object) -> None:
    """The build says why, and leaves nothing behind."""
    before = siblings(output)
    with pytest.raises(ValueError, match=message):
        build(str(base), output, clip=str(clip), **{**tiny.RECOVERY, **arguments})
    assert siblings(output) == before


def test_wrong_arguments(tmp_path, base, clip):
    output = tmp_path / "out"
    refused("no recovery setting", output, base, clip, lof=2)
    refused("lof_threshold must be", output, base, clip, lof_threshold=0.5)
    refused("text_relevance must be one of", output, base, clip, text_relevance="guess")
    refused("base_revision='main' belongs to a repo id", output, base, clip, base_revision="main")
    refused("no such folder", output, "./nowhere", clip)
    refused("no such folder", output, "/no/where/at/all", clip)
    refused("chat_template='none.jinja' does not exist", output, base, clip, chat_template="none.jinja")
    refused("results='.*' cannot be read", output, base, clip, results=tmp_path / "none.json")
    (tmp_path / "results.json").write_text('[{"name": "VQAv2", "value": 70}]')
    refused("keys name, value and command", output, base, clip, results=tmp_path / "results.json")


def test_existing_output_is_never_overwritten(tmp_path, base, clip):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("work")
    refused("exists and is not empty", output, base, clip)
    assert (output / "precious").read_text() == "work"


def test_another_clip_is_refused(tmp_path, base, clip):
    output = tmp_path / "out"
    other = tmp_path / "other"
    tiny.save_tiny_clip(other, seed=7)
    refused("tensors of the base's vision tower differ.*accept_different_vision_tower", output, base, other)
    wide = tmp_path / "wide"
    tiny.save_tiny_clip(wide, hidden_size=64)
    refused("hidden_size=64, the base's has 32", output, base, wide)


# A tower that was tuned along with the language model: known of LLaVA-1.6, to be said of others.


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory) -> Path:
    """A CLIP of the base's shape with other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny.save_tiny_clip(folder, seed=7)
    return folder


UNFROZEN = "LLaVA-1.6 was trained with its tower unfrozen"


@both_families
def test_tuned_tower_of_an_unknown_base_must_be_accepted(tmp_path, base, other_clip):
    output = tmp_path / "out"
    message = "tensors of the base's vision tower differ.*--accept-different-vision-tower"
    refused(message, output, base, other_clip)
    accepted = {"accept_different_vision_tower": True, **tiny.RECOVERY}
    built = build(str(base), output, clip=str(other_clip), **accepted)
    card = (built / "README.md").read_text()
    assert "see [Limits](#limits)" in card and UNFROZEN not in card
    assert "differs from the one that the question's text tower was trained with. The base's own tower stays" in card
    assert "(it chooses 90 % of the tokens here)" in card


LLAVA_NEXT = pytest.mark.parametrize("family", ["llava_next"], indirect=True)


@LLAVA_NEXT
def test_name_of_a_folder_makes_no_known_base(tmp_path, base, other_clip, monkeypatch):
    """A folder may be called anything."""
    monkeypatch.chdir(tmp_path)
    save_layout(base, Path(TUNED_TOWERS[0]), "as in memory", shards=2)
    refused("tensors of the base's vision tower differ", tmp_path / "out", TUNED_TOWERS[0], other_clip)


@LLAVA_NEXT
def test_tuned_towers_of_known_bases_are_accepted_with_their_clip_alone(tmp_path, hub, base, other_clip):
    for name in ("llava-hf/llava-1.5-7b-hf", *TUNED_TOWERS):
        hub.add_folder(name, base)
    for name in (CLIP_OF_BASE[TUNED_TOWERS[0]], "maker/other-clip"):
        hub.add_folder(name, other_clip)
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.RECOVERY.items()]
    with CommandWorker(hub, tmp_path) as command:
        for arguments in ((TUNED_TOWERS[0], "--clip", "maker/other-clip"), ("llava-hf/llava-1.5-7b-hf",)):
            status, said = command("build", *arguments, "--output", "refused", *settings)
            assert status == 1 and "tensors of the base's vision tower differ" in said, said
        for name in TUNED_TOWERS:
            status, said = command("build", name, "--output", name.partition("/")[2], *settings)
            assert status == 0, said
            built = tmp_path / name.partition("/")[2]
            card = (built / "README.md").read_text()
            assert f"{UNFROZEN}. The base's own tower stays" in card and "see [Limits](#limits)" in card
            assert f'LlavaNextForConditionalGeneration.from_pretrained("{name}")' in card
            assert read_json(built / "provenance.json")["vision_tower_differs"] is True
            assert read_json(built / "config.json")["text_relevance"] == "negated"
    for shard in read_checkpoint(base).shards:
        assert (built / shard).read_bytes() == (base / shard).read_bytes()
    extra, source = load_file(built / EXTRA_SHARD), load_file(other_clip / "model.safetensors")
    assert not [name for name in extra if "vision" in name]
    assert torch.equal(extra["model.visual_projection.weight"], source["visual_projection.weight"])


def test_other_models_are_refused(tmp_path, base, llava_folder, clip):
    output, llava = tmp_path / "out", Path(llava_folder)
    for number, kind in enumerate(("llava_onevision", "recoverable_llava_next", ["llava"])):
        other = changed_copy(llava, tmp_path / f"a{number}", model_type=kind)
        refused(f"model_type={re.escape(repr(kind))}; only 'llava'.*'llava_next'", output, other, clip)
    refused("quantized", output, changed_copy(llava, tmp_path / "b", quantization_config={"bits": 4}), clip)
    refused("model_type='siglip'", output, base, changed_copy(clip, tmp_path / "c", model_type="siglip"))
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32}
    refused("not CLIP's", output, changed_copy(llava, tmp_path / "d", vision_config=vision), clip)


def test_incomplete_clip_is_refused(tmp_path, base, clip):
    for lost, message in (
        ("visual_projection.weight", "lacks 'visual_projection.weight'"),
        ("text_model.final_layer_norm.weight", "lacks 'text_model.final_layer_norm.weight'"),
        ("vision_model.post_layernorm.weight", "'post_layernorm.weight' is in only one"),
    ):
        part = save_layout(clip, tmp_path / lost, "as saved")
        tensors = load_file(part / "model.safetensors")
        del tensors[lost]
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        refused(message, tmp_path / "out", base, part)


def test_tokenizer_of_another_clip_is_refused(tmp_path, base, clip):
    other = changed_copy(clip, tmp_path / "eos")
    config = read_json(other / "config.json")
    config["text_config"]["eos_token_id"] += 1
    write_json(other / "config.json", config)
    refused("ends a question with token .* the text tower looks for", tmp_path / "out", base, other)


def test_projection_of_another_size_is_refused(tmp_path, base, clip):
    part = save_layout(clip, tmp_path / "clip", "as saved")
    tensors = load_file(part / "model.safetensors")
    tensors["visual_projection.weight"] = torch.zeros(8, 32)
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    refused(r"visual_projection.weight' has shape \[8, 32\].*asks for \[16, 32\]", tmp_path / "out", base, part)


def test_pickled_weights_are_not_read(tmp_path, base, clip):
    pickled = save_layout(clip, tmp_path / "clip", "as saved")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused("pytorch_model.bin, which are pickles.*safetensors", tmp_path / "out", base, pickled)


def test_base_without_chat_template(tmp_path, llava_folder, clip):
    bare = save_layout(Path(llava_folder), tmp_path / "base", "as saved")
    (bare / "chat_template.jinja").unlink()
    refused("no chat template.*--chat-template", tmp_path / "out", bare, clip)
    template = tmp_path / "template.jinja"
    template.write_text(tiny.CHAT_TEMPLATE)
    built = build(str(bare), tmp_path / "out", clip=str(clip), chat_template=template, **tiny.RECOVERY)
    assert (built / "chat_template.jinja").read_text() == tiny.CHAT_TEMPLATE


def test_damaged_bases_are_refused(tmp_path, base, clip):
    output = tmp_path / "out"
    shard = "model-00002-of-00002.safetensors"

    def damaged(name: str) -> Path:
        return save_layout(base, tmp_path / name, "as in memory", shards=2)

    folder = damaged("cut shard")
    os.truncate(folder / shard, (folder / shard).stat().st_size - 100)
    refused(f"{shard} cannot be read as safetensors.*fetch it again", output, folder, clip)

    folder = damaged("overwritten header")
    with (folder / shard).open("r+b") as file:
        file.write(b"\xff" * 64)
    refused(f"{shard} cannot be read as safetensors", output, folder, clip)

    folder = damaged("missing shard")
    (folder / shard).unlink()
    refused(f"{shard} is missing", output, folder, clip)

    folder = damaged("truncated index")
    index = folder / "model.safetensors.index.json"
    os.truncate(index, index.stat().st_size // 2)
    refused("index.json is not valid JSON.*truncated", output, folder, clip)

    folder = damaged("index of another checkpoint")
    index = folder / "model.safetensors.index.json"
    content = read_json(index)
    content["weight_map"].pop("lm_head.weight")
    write_json(index, content)
    refused("disagree about 1 tensors, first 'lm_head.weight'", output, folder, clip)

    folder = damaged("index that leaves the folder")
    index = folder / "model.safetensors.index.json"
    content = read_json(index)
    content["weight_map"]["lm_head.weight"] = "../model-00001-of-00002.safetensors"
    write_json(index, content)
    refused("only .safetensors files beside it are read", output, folder, clip)

    folder = damaged("no config")
    (folder / "config.json").unlink()
    refused("config.json is missing", output, folder, clip)


def test_nan_in_the_vision_tower_is_refused(tmp_path, llava_folder, clip):
    folder = save_layout(Path(llava_folder), tmp_path / "base", "as published")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.vision_model.pre_layrnorm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused("holds NaN or infinity", tmp_path / "out", folder, clip)


# ----------------------------------------------------------------------------------------------- machine failures


def test_too_little_space_is_found_before_writing(tmp_path, base, clip, monkeypatch):
    usage = build_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BuildFailure, match=r"has 0 MiB free.*Free some space"):
        build(str(base), tmp_path / "out", clip=str(clip), **tiny.RECOVERY)
    assert siblings(tmp_path / "out") == []


def test_disk_that_fills_up_while_building(tmp_path, base, clip):
    """A real limit of the operating system on what a file may hold, met in the middle of the build."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "from hub_upload.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["build", base, "--clip", clip, "--output", tmp_path / "out", "--visual-lof-neighbors", 6]
    run = subprocess.run(
        [sys.executable, "-c", limited, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert run.returncode == 1
    assert "is full" in run.stderr and "Free some space" in run.stderr
    assert "Traceback" not in run.stderr
    assert siblings(tmp_path / "out") == []


def test_every_way_in_which_a_full_disk_shows(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(BuildFailure, match="Free some space"), build_module.new_folder(tmp_path / "out"):
            raise error
    with pytest.raises(OSError, match="Input/output"), build_module.new_folder(tmp_path / "out"):
        raise OSError(errno.EIO, "Input/output error")
    assert siblings(tmp_path / "out") == []


def test_killed_build_leaves_no_output_and_can_be_repeated(tmp_path, base, clip):
    output = tmp_path / "out"
    stopping = (
        "import os, sys, time, hub_upload.build as build\n"
        "def stop(*_):\n"
        "    print('stopped', flush=True)\n"
        "    time.sleep(60)\n"
        "build.write_processor = stop\n"
        "build.build(sys.argv[1], sys.argv[2], clip=sys.argv[3], visual_lof_neighbors=6)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", stopping, str(base), str(output), str(clip)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "stopped\n"
    unfinished = [name for name in siblings(output) if name.startswith(".out.building-")]
    assert unfinished and not output.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not output.exists()
    build(str(base), output, clip=str(clip), **tiny.RECOVERY)
    assert siblings(output) == ["out"]


def test_running_build_of_the_same_output_is_left_alone(tmp_path, base, clip):
    output = tmp_path / "out"
    with build_module.new_folder(output) as folder:
        (folder / "file").write_text("other")
        build(str(base), output, clip=str(clip), **tiny.RECOVERY)
        assert folder.is_dir()
        (output / "mine").write_text("")
        for path in sorted(output.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert (output / "file").read_text() == "other"


# ------------------------------------------------------------------------------------------------ what people read


@both_families
def test_card_says_what_a_person_wants_to_know(built_once, family):
    card = ModelCard.load(built_once / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["license"] == "llama2"
    assert "custom_code" in data["tags"]
    for heading in (
        "Use it",
        "What you save",
        "Change it or switch it off",
        "Measured",
        "Limits",
        "License",
        "Citation",
    ):
        assert f"## {heading}" in card.text
    for said in ("trust_remote_code=True", "compress = False", "2409.01179", "No benchmark has been run"):
        assert said in card.text, said
    of_family = {
        "llava": ("LlavaForConditionalGeneration, LlavaProcessor", "An image has 36 visual tokens."),
        "llava_next": (
            "LlavaNextForConditionalGeneration, LlavaNextProcessor",
            "An image has up to 180 visual tokens, by its shape: 36 of the whole picture",
        ),
    }
    for each, sentences in of_family.items():
        assert all((said in card.text) is (each == family) for said in sentences)
    assert family in data["tags"]
    assert str(Path(built_once).parent) not in card.text


PAPER = {"selection": "paper", "text_relevance": "projected"}


def card_of(tmp_path: Path, base: str, clip: Path, **arguments: object) -> str:
    """The card of a build, as one line, so that sentences can be looked for."""
    output = build(base, tmp_path / "out", clip=str(clip), **{**tiny.RECOVERY, **arguments})
    return " ".join((output / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "novelty_threshold = 0.5"),
        ({"novelty_threshold": 0.6}, "novelty_threshold = 1.2"),
        (PAPER, "lof_threshold = 2.0"),
        ({**PAPER, "lof_threshold": 2.5}, "lof_threshold = 5.0"),
        ({"visual_token_budget": 9}, "visual_token_budget = 8"),
        ({"visual_token_budget": 8}, "visual_token_budget = 4"),
        ({"visual_token_budget": 1}, "visual_token_budget = 1"),
    ],
)
def test_card_names_the_setting_that_has_an_effect(tmp_path, llava_folder, clip, settings, line):
    assert line in card_of(tmp_path, llava_folder, clip, **settings)


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ({}, ["depends on the image alone", "is not the paper's", "90 % of them", "into one token"], ["around a few"]),
        ({"merge_remaining": False}, ["drops what is left"], ["into one token"]),
        ({"max_visual_tokens": 9, "min_visual_tokens": 3}, ["How many stay (at least 3 and at most 9)"], []),
        (PAPER, ["depends on the image and on the question", "that of Chen et al."], ["is not the paper's", "alone"]),
        (
            {"visual_token_budget": 9},
            ["exactly **9 of 36**", "processor.visual_token_budget = False, None"],
            ["depends"],
        ),
        ({"compress": False}, ["As published, compression is switched off"], []),
    ],
    ids=["default", "no rest", "bounds", "paper", "budget", "off"],
)
def test_card_says_what_the_settings_do(tmp_path, llava_folder, clip, settings, said, unsaid):
    card = card_of(tmp_path, llava_folder, clip, **settings)
    assert [words for words in said if words not in card] == []
    assert [words for words in [*unsaid, "10 %", "the paper reports"] if words in card] == []


BASE_CARD = """---
license: other
license_name: a `strange` license
license_link: LICENSE.md
base_model: {base_model}
---
# A fine-tune
"""


@pytest.mark.parametrize("is_license_there", [True, False])
def test_card_passes_on_what_the_card_of_a_local_base_states(tmp_path, llava_folder, clip, is_license_there):
    base = save_layout(Path(llava_folder), tmp_path / "base", "as saved")
    (base / "README.md").write_text(BASE_CARD.format(base_model="llava-hf/llava-1.5-7b-hf"))
    if is_license_there:
        (base / "LICENSE.md").write_text("Nobody may.")
    output = build(str(base), tmp_path / "out", clip=str(clip), **tiny.RECOVERY)
    data = ModelCard.load(output / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "a strange license")
    assert data.get("license_link") == ("LICENSE.md" if is_license_there else None)
    assert data["base_model"] == ["llava-hf/llava-1.5-7b-hf"]
    text = (output / "README.md").read_text()
    assert "(a local checkpoint of the publisher, made from [llava-hf/llava-1.5-7b-hf](" in text
    assert ("[`a strange license`](LICENSE.md)" if is_license_there else "states: `a strange license`.") in text


def test_license_of_the_publisher_is_not_called_the_bases(tmp_path, llava_folder, clip):
    base = save_layout(Path(llava_folder), tmp_path / "base", "as saved")
    (base / "README.md").write_text(BASE_CARD.format(base_model="[a/b, c/d, ./runs/17, 5]"))
    output = build(str(base), tmp_path / "out", clip=str(clip), license="mit", **tiny.RECOVERY)
    data = ModelCard.load(output / "README.md").data.to_dict()
    assert data["license"] == "mit" and "license_name" not in data and data["base_model"] == ["a/b", "c/d"]
    text = (output / "README.md").read_text()
    assert "according to who published this repository: `mit`" in text and "./runs/17" not in text


@pytest.mark.parametrize(
    ("content", "license"),
    [
        (b"", None),
        (b"# No metadata\n", None),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", None),
        (b"---\nlicense: mit\n---\n\xff\xfe\n", "mit"),
        (b"---\nlicense: |\n  mit\n  # injected\n---\n", "mit # injected"),
    ],
)
def test_cards_of_bases_that_state_no_license_or_badly(tmp_path, content, license):
    (tmp_path / "README.md").write_bytes(content)
    assert read_base_card(tmp_path).license == license


def test_metadata_that_cannot_be_read_is_named(tmp_path, llava_folder, clip):
    base = save_layout(Path(llava_folder), tmp_path / "base", "as saved")
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    refused("base: the metadata of its README.md cannot be read", tmp_path / "out", base, clip)


def test_relative_link_to_a_license_on_the_hub_leads_to_the_base():
    base = {"repo_id": "maker/llava", "revision": "0123"}
    assert _license_link("./LICENSE.md", base, {}) == "https://huggingface.co/maker/llava/blob/0123/LICENSE.md"
    assert _license_link("https://x.y/z", base, {}) == "https://x.y/z"
    assert _license_link("LICENSE.md", base, {"LICENSE.md": "0" * 64}) == "LICENSE.md"
    assert _license_link("LICENSE.md", {"folder": "llava"}, {}) is None


def test_card_with_results_budget_and_another_license(tmp_path, llava_folder, clip):
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"name": "VQAv2", "value": 70.1, "command": "make evaluate"}]))
    output = build(
        llava_folder,
        tmp_path / "out",
        clip=str(clip),
        results=results,
        license="mit",
        **tiny.RECOVERY,
        visual_token_budget=9,
    )
    card = (output / "README.md").read_text()
    assert "| VQAv2 | 70.1 | `make evaluate` |" in card
    assert "exactly **9 of 36**" in card
    assert "license: mit" in card
    assert read_json(output / "processor_config.json")["visual_token_budget"] == 9


@both_families
def test_code_page_lists_hashes_that_sha256sum_accepts(built_once, family):
    page = (built_once / "trust_remote_code.md").read_text()
    assert sorted(listed_hashes(page)) == executed_files(built_once, AUTO_MAPS[family])
    block = page.split("```\n")[1]
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict"],
        input=block,
        cwd=built_once,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


@both_families
def test_code_imports_only_what_every_user_of_transformers_has(family):
    for name in executed_files(package_folder(), AUTO_MAPS[family]):
        imported = set(imported_libraries(package_folder() / name))
        assert imported <= {"torch", "transformers", *sys.stdlib_module_names}, name


@both_families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_builds(tmp_path, llava_folder, clip, layout):
    folder = save_layout(Path(llava_folder), tmp_path / "base", layout, shards=2)
    assert build(str(folder), tmp_path / "out", clip=str(clip), **tiny.RECOVERY).is_dir()
