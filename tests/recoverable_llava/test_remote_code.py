"""The repo folder as the Hub serves it: remote code, in a fresh process that does not have the package."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest
import torch
from batches import both_families
from transformers.dynamic_module_utils import get_relative_import_files

import recoverable_llava
from recoverable_llava import configuration_recoverable_llava, configuration_recoverable_llava_next
from recoverable_llava.tools.families import FAMILIES


PACKAGE = Path(recoverable_llava.__file__).parent
AUTO_MAPS = {
    "llava": configuration_recoverable_llava.AUTO_MAP,
    "llava_next": configuration_recoverable_llava_next.AUTO_MAP,
}


def reached(auto_map):
    """The files that the Hub runs of a repo with this auto_map."""
    entries = sorted({reference.split(".")[0] for reference in auto_map.values()})
    siblings = {Path(file).name for entry in entries for file in get_relative_import_files(PACKAGE / f"{entry}.py")}
    return sorted({f"{entry}.py" for entry in entries} | siblings)


FILES = {family: reached(auto_map) for family, auto_map in AUTO_MAPS.items()}
REMOTE_FILES = sorted({name for files in FILES.values() for name in files})


def run(tmp_path, function, folder, *arguments):
    """Run a function of `fresh_process` elsewhere, with a cache of its own, and return its report."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    report = tmp_path / f"{function}.json"
    inherited = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "OMP_NUM_THREADS")
    environment = {name: os.environ[name] for name in inherited if name in os.environ}
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-I", fresh_process.__file__, function, str(folder), str(report), *map(str, arguments)],
        cwd=elsewhere,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def moved_repo(repo_folder, tmp_path_factory):
    """The folder after a move: nothing in it may remember where it was built."""
    folder = tmp_path_factory.mktemp("moved") / "some-org" / "renamed.repo"
    shutil.copytree(repo_folder, folder)
    return folder


@pytest.fixture(scope="module")
def names(family):
    """The names of the family's classes."""
    classes = FAMILIES[family]
    return {
        "config": classes.config_class.__name__,
        "model": classes.model_class.model_class.__name__,
        "whole model": classes.model_class.__name__,
        "processor": classes.processor_class.__name__,
    }


@pytest.fixture(scope="module")
def expected(repo_folder, family):
    """What the package itself answers."""
    model = FAMILIES[family].model_class.from_pretrained(repo_folder)
    processor = FAMILIES[family].processor_class.from_pretrained(repo_folder)
    inputs = processor(images=fresh_process.pictures()[0], text=fresh_process.prompts()[0], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
        num_tokens = model.recover_tokens(**inputs).selection.num_tokens.tolist()
    answers = fresh_process.batch_answers(model, processor)
    assert len(set(answers)) > 1  # else mixed-up rows would go unnoticed
    num_placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return {
        "answers": answers,
        "logits": logits,
        "num_tokens": num_tokens,
        "num_placeholders": num_placeholders,
        "num_text_tokens": inputs["input_ids"].shape[1] - num_placeholders,
    }


# ----------------------------------------------------------------------------------------------------------- the files


@both_families
def test_the_folder_holds_the_files_of_the_package(repo_folder, family):
    """Those of its family, none of the other's."""
    in_folder = sorted(path.name for path in Path(repo_folder).glob("*.py"))
    assert [name for name in in_folder if name != "__init__.py"] == FILES[family]
    for name in FILES[family]:
        assert (Path(repo_folder) / name).read_bytes() == (PACKAGE / name).read_bytes(), name


def test_a_family_reaches_no_file_of_the_other():
    one, other = map(set, FILES.values())
    assert "modeling_recoverable_llava.py" in one - other and not [name for name in one if "_next" in name]
    assert {"modeling_recoverable_llava_next.py", "image_tiles.py"} <= other - one


def test_every_file_of_the_package_is_one_that_the_hub_runs():
    """What stands beside them would be code that a repo lacks, or that nothing uses; tools have a folder."""
    assert sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py") == REMOTE_FILES


def imports_of(name):
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


@pytest.mark.parametrize("name", REMOTE_FILES)
def test_remote_files_import_torch_and_transformers_alone(name):
    """They must import on any user's machine; and the Hub resolves only `from .sibling import name`."""
    for level, module in imports_of(name):
        if level:
            assert level == 1 and f"{module}.py" in REMOTE_FILES, module
        else:
            top = module.split(".")[0]
            assert top in ("torch", "transformers") or top in sys.stdlib_module_names, module


# Modules and functions that reach files, the network, the environment or other processes, or run text as code.
FORBIDDEN_MODULES = {
    *("builtins", "ctypes", "ftplib", "glob", "http", "importlib", "io", "multiprocessing", "pathlib", "pickle"),
    *("pkgutil", "runpy", "shelve", "shutil", "socket", "ssl", "subprocess", "sys", "tempfile", "threading"),
    *("urllib", "webbrowser"),
}
FORBIDDEN_NAMES = {"open", "exec", "eval", "compile", "__import__", "input", "print", "getenv", "environ", "system"}


@pytest.mark.parametrize("name", REMOTE_FILES)
def test_remote_files_touch_neither_files_nor_network(name):
    assert not {module.split(".")[0] for level, module in imports_of(name) if not level} & FORBIDDEN_MODULES
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_NAMES, f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert not (node.value.id == "os" and node.attr != "path"), f"{name}:{node.lineno}"
            assert f"{node.value.id}.{node.attr}" not in ("torch.load", "torch.hub", "torch.save"), (
                f"{name}:{node.lineno}"
            )
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            raise AssertionError(f"{name}:{node.lineno} imports from os")


@both_families
def test_the_config_names_every_class(repo_folder, family):
    config, expected = json.loads((Path(repo_folder) / "config.json").read_text()), AUTO_MAPS[family]
    assert config["auto_map"] == expected
    for reference in expected.values():
        module, name = reference.split(".")
        tree = ast.parse((Path(repo_folder) / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for file in ("processor_config.json", "tokenizer_config.json"):
        auto_map = json.loads((Path(repo_folder) / file).read_text()).get("auto_map", {})
        assert auto_map.items() <= expected.items()


# ------------------------------------------------------------------------------------------------------ fresh processes


@pytest.mark.slow
@both_families
def test_auto_classes(tmp_path, moved_repo, names, expected):
    report = run(tmp_path, "auto_classes", moved_repo)
    assert report["AutoConfig"] == names["config"]
    assert report["AutoProcessor"] == names["processor"]
    assert report["AutoModel"] == names["model"]
    assert set(report["AutoModel loading info"]) <= {"unexpected_keys"}
    assert all(key.endswith("lm_head.weight") for key in report["AutoModel loading info"].get("unexpected_keys", []))
    for name in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        assert report[name] == names["whole model"]
        assert report[f"{name} module"].startswith("transformers_modules.")
        assert report[f"{name} loading info"] == {}
        assert report[f"{name} answers"] == expected["answers"]
    torch.testing.assert_close(torch.tensor(report["logits"]), torch.tensor(expected["logits"]), rtol=0, atol=1e-5)
    assert report["num_tokens"] == expected["num_tokens"] and report["num_tokens"][0] < expected["num_placeholders"]
    assert report["uncompressed logits"] != report["logits"]
    assert all(module.startswith("transformers_modules") for module in report["modules"])


@pytest.mark.slow
@both_families
def test_pipeline(tmp_path, moved_repo, names, expected):
    report = run(tmp_path, "pipelines", moved_repo)
    assert report["model"] == names["whole model"]
    assert report["processor"] == names["processor"]
    answers = expected["answers"]

    def flat(outputs):
        return [text for output in outputs for text in (flat(output) if isinstance(output, list) else [output])]

    for name, wanted in {"string": answers[:1], "list": answers, "chat": answers[:1], "chats": answers}.items():
        assert [text.strip() for text in flat(report[name])] == [text.strip() for text in wanted], name
    assert flat(report["chats by twos"]) == flat(report["chats"])
    # It ran compressed: the prompt was shorter than it looks by the patches that were dropped.
    assert report["string prefill"] == [expected["num_text_tokens"] + expected["num_tokens"][0]]
    full = flat(report["string in full"])[0]
    assert full.startswith("USER: ") and full.endswith(flat(report["string"])[0])
    (conversation,) = (
        [report["chat in full"]] if isinstance(report["chat in full"][0], dict) else report["chat in full"]
    )
    assert [message["role"] for message in conversation] == ["user", "assistant"]
    assert conversation[1]["content"].strip() == answers[0].strip()


@pytest.mark.slow
@both_families
def test_without_trust_remote_code_a_clear_error(tmp_path, moved_repo):
    report = run(tmp_path, "without_trust", moved_repo)
    assert len(report) == 4
    for name, message in report.items():
        assert message.startswith("ValueError") and "trust_remote_code=True" in message, f"{name}: {message}"


@pytest.mark.slow
@both_families
def test_saving_what_was_loaded(tmp_path, moved_repo, family, expected):
    first, second = tmp_path / "first", tmp_path / "second"
    report = run(tmp_path, "save_twice", moved_repo, first, second)
    assert report["answers"] == [expected["answers"]] * 2
    assert report["weights"][0] == report["weights"][1]
    assert sorted(path.name for path in first.glob("*.py") if path.name != "__init__.py") == FILES[family]
    for name in FILES[family]:
        original = (moved_repo / name).read_bytes()
        assert (first / name).read_bytes() == original and (second / name).read_bytes() == original, name
    files = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert files == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    configs = [json.loads((folder / "config.json").read_text()) for folder in (moved_repo, first, second)]
    assert configs[0] == configs[1] == configs[2]


@pytest.mark.slow
@both_families
def test_device_map_and_disk_offload(tmp_path, moved_repo, expected):
    pytest.importorskip("accelerate")
    report = run(tmp_path, "offloaded", moved_repo, tmp_path / "offload")
    assert report["auto"] == report["disk"] == expected["answers"]
    assert report["on meta"] == ["language_model", "question_tower", "vision_tower"]
