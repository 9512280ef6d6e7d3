"""hub_upload.verify: every kind of damage is found, and nothing damaged is executed."""

import os
import sys
from pathlib import Path

import pytest
import tiny
from batches import both_families
from command_line import REPO_ID

import hub_upload.verify as verify_module
from hub_upload.build import EXTRA_SHARD, build
from hub_upload.checkpoint import INDEX, file_sha256, read_json, write_json
from hub_upload.inspection import Check, table
from hub_upload.verify import loading_problems, verify


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.fixture
def not_executed(monkeypatch):
    def refuse(*_):
        raise AssertionError("a damaged folder was executed")

    monkeypatch.setattr(verify_module, "run_fresh_process", refuse)


def test_changed_code_is_found_and_not_executed(built, not_executed):
    with (built / "novelty_selection.py").open("a") as code:
        code.write("import os\n")
    checks = verify(built)
    assert failed(checks) == {"code equals trust_remote_code.md", "loads"}
    assert "novelty_selection.py" in table(checks) and "2 of 9 checks failed" in table(checks)


def test_unlisted_code_is_found(built, not_executed):
    (built / "more.py").write_text("print('more')\n")
    assert "code equals trust_remote_code.md" in failed(verify(built))
    page = built / "trust_remote_code.md"
    page.write_text(page.read_text().replace("  novelty_selection.py", "  forgotten.py"))
    assert "code equals trust_remote_code.md" in failed(verify(built))


def test_model_of_no_family_or_of_another_is_found(built, not_executed):
    config = read_json(built / "config.json")
    for model_type, message in (
        ("recoverable_llava_next", "_recoverable_llava_next.py or a file that it imports cannot be read"),
        ("llava_onevision", "model_type is 'llava_onevision': the families that can be built are"),
        (None, "model_type is 'None'"),
    ):
        write_json(built / "config.json", {**config, "model_type": model_type})
        checks = verify(built)
        assert failed(checks) == {"files can be read"} and message in checks[-1].detail, checks


def test_missing_code_is_found(built, not_executed):
    (built / "modeling_recoverable_llava.py").unlink()
    assert failed(verify(built)) == {"files can be read"}


def test_changed_weights_are_found(built, not_executed):
    shard = built / EXTRA_SHARD
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "weights equal provenance.json" in failed(verify(built))


def test_cut_and_missing_shards_are_found(built, not_executed):
    shard = built / EXTRA_SHARD
    os.truncate(shard, shard.stat().st_size - 8)
    assert failed(verify(built)) == {"files can be read"}
    shard.unlink()
    assert failed(verify(built)) == {"files can be read"}


def test_pickles_and_missing_classes_are_found(built, not_executed):
    (built / "training_args.bin").write_bytes(b"pickle")
    config = read_json(built / "config.json")
    del config["auto_map"]["AutoModelForMultimodalLM"]
    write_json(built / "config.json", config)
    assert failed(verify(built)) == {
        *("no pickles", "auto_map is complete", "loads"),
        "settings equal provenance.json",
    }


def test_what_would_be_loaded_instead_is_found_and_not_executed(built, not_executed):
    for name, check in (
        ("adapter_config.json", "nothing else is loaded"),
        ("model.safetensors", "nothing else is loaded"),
        ("custom_generate/generate.py", "nothing else is loaded"),
        ("deep/more.py", "code equals trust_remote_code.md"),
    ):
        (built / name).parent.mkdir(exist_ok=True)
        (built / name).write_text("{}")
        if name == "model.safetensors":  # preferred to the index, and broken
            assert failed(verify(built)) == {"files can be read"}
        else:
            assert check in failed(verify(built))
        (built / name).unlink()


@pytest.mark.parametrize("name", ["provenance.json", "config.json", "question_tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"auto_map": 5, "files": 5}', b"\xff", b"[" * 100_000])
def test_damaged_settings_are_found_and_not_executed(built, not_executed, name, content):
    (built / name).unlink()
    (built / name).write_bytes(content)
    assert not all(check.passed for check in verify(built))


def change_code(folder: Path) -> None:
    """Other code, listed with its hash everywhere, as in a repository of somebody who wants it to be run."""
    code, page = folder / "novelty_selection.py", folder / "trust_remote_code.md"
    before = file_sha256(code)
    code.write_text(code.read_text() + "\nOTHER = True\n")
    page.write_text(page.read_text().replace(before, file_sha256(code)))
    provenance = read_json(folder / "provenance.json")
    provenance["files"] |= {path.name: file_sha256(path) for path in (code, page)}
    write_json(folder / "provenance.json", provenance)


def test_code_that_is_not_the_packages_is_not_run_unasked(built, not_executed):
    change_code(built)
    checks = verify(built)
    assert failed(checks) == {"loads"}
    assert "novelty_selection.py" in checks[-1].detail and "--trust-remote-code" in checks[-1].detail
    with pytest.raises(AssertionError, match="was executed"):
        verify(built, trust_remote_code=True)


def test_wrong_targets(built, tmp_path):
    with pytest.raises(ValueError, match="belongs to a repo id"):
        verify(built, revision="main")
    with pytest.raises(ValueError, match="pass a picture file"):
        verify(built, image=tmp_path / "none.png")
    with pytest.raises(ValueError, match="not built by"):
        verify(tmp_path)
    (built / "trust_remote_code.md").unlink()
    with pytest.raises(ValueError, match="has no trust_remote_code.md"):
        verify(built)


def test_weights_that_the_model_misses_are_found(tmp_path, llava_folder, clip, command_line, base):
    """The loader only warns about missing keys and leaves random weights; verify fails."""
    folder = build(str(base), tmp_path / "compressed", clip=str(clip), **tiny.RECOVERY)
    index = read_json(folder / INDEX)
    shard = folder / EXTRA_SHARD
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    del tensors["model.visual_projection.weight"], index["weight_map"]["model.visual_projection.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    write_json(folder / INDEX, index)
    provenance = read_json(folder / "provenance.json")
    provenance["files"] |= {name: file_sha256(folder / name) for name in (EXTRA_SHARD, INDEX)}
    write_json(folder / "provenance.json", provenance)
    run = command_line("verify", folder)
    assert run.returncode == 1
    assert "loading info is empty" in run.stdout and "model.visual_projection.weight" in run.stdout


def test_repository_that_does_not_exist(command_line):
    run = command_line("verify", REPO_ID)
    assert run.returncode == 1 and "does not exist, or it is private" in run.stderr


def test_report_of_a_broken_process():
    checks = verify_module.check_report({"error": "it broke"}, {})
    assert checks == [Check("loads in a fresh process", False, "it broke")]


def test_buffers_that_stock_does_not_use_either_are_no_problem():
    buffer = "model.language_model.layers.0.self_attn.rotary_emb.inv_freq"
    stock = {"unexpected_keys": [buffer]}
    assert loading_problems({"unexpected_keys": [buffer]}, stock) == {}
    assert loading_problems({"unexpected_keys": [buffer, "lm.weight"]}, stock) == {"unexpected_keys": ["lm.weight"]}
    assert loading_problems({}, {"missing_keys": ["lm_head.weight"]}) == {"missing_keys": ["lm_head.weight"]}


@both_families
def test_stock_base_is_the_base(built_once, base, tmp_path):
    verify_module.write_stock_base(built_once, tmp_path)
    assert read_json(tmp_path / "config.json") == read_json(base / "config.json")
    assert read_json(tmp_path / INDEX)["weight_map"] == read_json(base / INDEX)["weight_map"]
    for path in Path(tmp_path).glob("*.safetensors"):
        assert os.path.samefile(path, base / path.name)


def other_pythons() -> list[Path]:
    """Environments with another transformers: the one beside this (`make test` and `make test-lowest`), or named."""
    prefix = Path(sys.prefix)
    siblings = {prefix.with_name(prefix.name + "-5.12.0"), prefix.with_name(prefix.name.removesuffix("-5.12.0"))}
    named = [Path(path) for path in os.environ.get("OTHER_PYTHON", "").split(os.pathsep) if path]
    return [path for path in (*(folder / "bin" / "python" for folder in siblings - {prefix}), *named) if path.exists()]


@both_families
def test_built_here_loads_on_the_other_declared_transformers(built, monkeypatch):
    if not other_pythons():
        pytest.skip(
            "no environment with another transformers; `make test-lowest` makes one, or name it in OTHER_PYTHON"
        )
    for python in other_pythons():
        monkeypatch.setattr(verify_module.sys, "executable", str(python))
        checks = verify(built)
        assert not failed(checks), table(checks)
