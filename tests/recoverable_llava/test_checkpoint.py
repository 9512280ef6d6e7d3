"""The embedded checkpoints: complete, current, and able to answer."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import recoverable_llava
from hub_upload.remote_code import executed_files, package_auto_map
from recoverable_llava.tools.families import family_of
from training.examples import scene_examples, tiled_examples


ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "checkpoints").glob("*/config.json"))
PACKAGE = Path(recoverable_llava.__file__).parent


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def loaded(request):
    model, info = AutoModelForImageTextToText.from_pretrained(
        request.param, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), AutoProcessor.from_pretrained(request.param)


def wanted_code(folder: Path) -> list[str]:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return executed_files(PACKAGE, package_auto_map(model_type))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_code_is_that_of_the_package(folder):
    """`make checkpoint-code` copies it."""
    assert {"novelty_selection.py", "paper_selection.py"} < {*wanted_code(folder)}
    assert sorted(file.name for file in folder.glob("*.py")) == wanted_code(folder), "run make checkpoint-code"
    for name in wanted_code(folder):
        assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes(), f"{name}: run make checkpoint-code"


def test_checkpoint_code_copies_what_a_checkpoint_runs(tmp_path, capsys):
    """Of a family's files all, also new ones, and of another family's none."""
    for name, model_type in (("one", "recoverable_llava"), ("other", "recoverable_llava_next")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": model_type}))
        shutil.copy(PACKAGE / "selection.py", tmp_path / name / "gone.py")
        (tmp_path / name / "selection.py").write_text("stale = True\n")
    specification = importlib.util.spec_from_file_location("checkpoint_code", ROOT / ".ci" / "checkpoint_code.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    script.main(tmp_path)
    assert capsys.readouterr().out.startswith("one: ")
    code = {name: {file.name for file in (tmp_path / name).glob("*.py")} for name in ("one", "other")}
    for name, files in code.items():
        assert sorted(files) == wanted_code(tmp_path / name)
        assert all((tmp_path / name / file).read_bytes() == (PACKAGE / file).read_bytes() for file in files)
    assert "modeling_recoverable_llava.py" in code["one"] and "modeling_recoverable_llava_next.py" not in code["one"]
    assert {"modeling_recoverable_llava_next.py", "image_tiles.py"} <= code["other"] - code["one"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_files_fit_a_git_host(folder):
    weights = list(folder.glob("*.safetensors"))
    assert weights and all(file.stat().st_size <= 15_000_000 for file in weights)
    assert sum(file.stat().st_size for file in weights) <= 40_000_000
    assert not [file for file in folder.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ttf")]


def test_it_runs_with_the_defaults(loaded):
    names = ("selection", "novelty_threshold", "text_share", "text_reach", "text_relevance", "merge_remaining")
    config = loaded[0].config
    defaults = type(config)()
    assert {name: getattr(config, name) for name in names} == {name: getattr(defaults, name) for name in names}


def test_auto_classes_find_it(loaded):
    model, processor = loaded
    family = family_of(model.config.model_type)
    assert (type(model), type(processor)) == (family.model_class, family.processor_class)


def test_answers_survive_compression(loaded):
    """Of 14 held-out questions, two of each kind, at most one may be lost, with all tokens and with a tenth of them."""
    model, processor = loaded
    sees_tiles = model.config.model_type == "recoverable_llava_next"
    examples = list((tiled_examples if sees_tiles else scene_examples)("test", 14, seed=11))
    prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in examples]
    inputs = processor(
        images=[[example.image()] for example in examples], text=prompts, padding=True, return_tensors="pt"
    )
    for compress in (False, True):
        model.config.compress = compress
        sequences = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = sum(text.strip() == example.answer for text, example in zip(texts, examples))
        assert right >= 13, (compress, texts, [example.answer for example in examples])
    recovery = model.recover_tokens(**inputs)
    assert recovery.selection.num_tokens.sum() < 0.25 * sum(recovery.num_uncompressed)
