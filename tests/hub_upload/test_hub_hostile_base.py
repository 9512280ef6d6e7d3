"""A base from a stranger: whatever it brings along, what is published holds our code alone and nothing of this disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import BASE_ID, CLIP_ID, REPO_ID, CommandWorker, run_hub_upload
from hostile import (
    EVIL,
    EVIL_CODE,
    EVIL_ID,
    HOSTILE_CLIP_ENTRIES,
    HOSTILE_ENTRIES,
    KINDS,
    SECRET,
    add_code,
    add_entries,
    add_file,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback_hub import Blob, LoopbackHub

from hub_upload.build import build
from hub_upload.checkpoint import read_json
from hub_upload.inspection import inspect_files
from hub_upload.publish import read_unchanged
from hub_upload.verify import verify


SETTINGS = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.RECOVERY.items()]

STRANGER = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

for load in (AutoProcessor, AutoTokenizer, AutoConfig, AutoModelForImageTextToText):
    loaded = load.from_pretrained(sys.argv[1], trust_remote_code=True)
    print(type(loaded).__name__)
print(type(pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)).__name__)
AutoTokenizer.from_pretrained(sys.argv[1], subfolder="question_tokenizer", trust_remote_code=True)
"""


def copy_of(source: Path, folder: Path) -> Path:
    """A checkpoint that a test may change; weights are linked."""
    return Path(shutil.copytree(source, folder, copy_function=lambda old, new: shutil.copyfile(old, new)))


@pytest.fixture
def hostile_sources(tmp_path, base, clip) -> tuple[Path, Path]:
    folders = copy_of(base, tmp_path / "base"), copy_of(clip, tmp_path / "clip")
    add_entries(folders[0], HOSTILE_ENTRIES)
    add_entries(folders[1], HOSTILE_CLIP_ENTRIES)
    add_code(folders[0])
    return folders


def as_stranger(hub: LoopbackHub, folder: Path, repo: str) -> subprocess.CompletedProcess:
    """Loads a repository in every way, with trust_remote_code; `folder`/mark appears if EVIL_CODE ran."""
    return subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, repo],
        env={**hub.environment(folder / "stranger", token=None), "EVIL_MARK": str(folder / "mark")},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stranger_runs_our_code_alone(hub, tmp_path, hostile_sources):
    """The list of entries is not idle: a repository that keeps one of them runs the other's code."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "mod.py").write_text(EVIL_CODE)
    (evil / "generate.py").write_text(EVIL_CODE)
    hub.add_folder(EVIL_ID, evil)
    hub.add_folder(BASE_ID, hostile_sources[0])
    hub.add_folder(CLIP_ID, hostile_sources[1])
    run = run_hub_upload(hub, tmp_path, "push", BASE_ID, REPO_ID, "--clip", CLIP_ID, *SETTINGS)
    assert run.returncode == 0, run.stderr
    published = hub.main_files(REPO_ID)
    assert not any(b"evil" in blob.content for path, blob in published.items() if path.endswith((".json", ".py")))
    loaded = as_stranger(hub, tmp_path, REPO_ID)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split()[0] == "RecoverableLlavaProcessor"
    assert not (tmp_path / "mark").exists(), "foreign code ran"

    files = dict(published)
    processor = json.loads(files["tokenizer_config.json"].content)
    processor["auto_map"] = {"AutoTokenizer": [EVIL, EVIL]}
    files["tokenizer_config.json"] = Blob(json.dumps(processor).encode())
    hub.repos[REPO_ID].add_commit("main", files, "by an attacker")
    as_stranger(hub, tmp_path, REPO_ID)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    checked = run_hub_upload(hub, tmp_path, "verify", REPO_ID, EVIL_MARK=str(tmp_path / "mark"))
    assert checked.returncode == 1 and "not executed" in checked.stdout and EVIL in checked.stdout, checked.stdout
    assert not (tmp_path / "mark").exists(), "verify ran foreign code"


def test_local_sources_lose_every_entry_that_names_code(tmp_path, hostile_sources):
    base, clip = hostile_sources
    output = build(str(base), tmp_path / "out", clip=str(clip), **tiny.RECOVERY)
    for path in (path for path in output.rglob("*") if path.is_file() and path.suffix != ".safetensors"):
        assert b"evil" not in path.read_bytes(), path
    assert not (output / "custom_generate").exists() and not (output / "adapter_config.json").exists()
    assert {"AutoConfig", "AutoModel"} <= set(read_json(output / "config.json")["auto_map"])


# ---------------------------------------------------------------------------------------------- files of every kind


NAMES = st.sampled_from(
    (
        *("LICENSE", "LICENSE.md", "LICENSE.py", "LICENSE.safetensors", "NOTICE.txt", "NOTICE.bin", "USE_POLICY.md"),
        *("LICENSE" + "x" * 200, "NOTICE \n.txt", ".env", ".git", "notes.txt", "extra.json", "added_tokens.json"),
        *("chat_template.json", "special_tokens_map.json", "preprocessor_config.json", "other.jinja", "vocab.model"),
        *("custom_generate", "mod.py", "adapter_config.json", "training_args.bin", "README", "model.onnx", "examples"),
        *("config.6.0.0.json", "additional_chat_templates", "question_tokenizer", "provenance.json", "LICENSE_DIR"),
    )
)
EXTRAS = st.dictionaries(NAMES, st.sampled_from(KINDS), max_size=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Hub, a process that publishes to it, and a secret outside of everything."""
    folder = tmp_path_factory.mktemp("world")
    secret = folder / "outside" / "secret"
    secret.parent.mkdir()
    secret.write_text(SECRET)
    with LoopbackHub() as hub, CommandWorker(hub, folder) as command:
        yield hub, command, secret


def is_safe(content: bytes) -> bool:
    return SECRET.encode() not in content and EVIL_CODE.encode() not in content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is a link to a place outside")
@settings(max_examples=30, deadline=None)
@given(extras=EXTRAS)
def test_what_is_built_from_a_base_with_extra_files(tmp_path_factory, world, base, clip, extras):
    _, _, secret = world
    folder = tmp_path_factory.mktemp("base")
    changed = copy_of(base, folder / "base")
    for name, kind in extras.items():
        add_file(changed, name, kind, secret)
    try:
        output = build(str(changed), folder / "out", clip=str(clip), **tiny.RECOVERY)
    except ValueError as error:  # a file that a tokenizer reads and that is none, for example
        assert "base" in str(error), extras
        assert [path.name for path in folder.iterdir()] == ["base"]
        return
    written = {*read_json(output / "provenance.json")["files"], "README.md", "provenance.json"}
    for path in (path for path in output.rglob("*") if not path.is_dir()):
        assert path.is_file() and not path.is_symlink(), path
        assert path.relative_to(output).as_posix() in written, path
        assert is_safe(path.read_bytes()), path
    assert all(check.passed for check in inspect_files(output)), extras
    read_unchanged(output)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(extras=EXTRAS, nested=EXTRAS)
def test_what_is_published_of_a_folder_with_extra_files(tmp_path_factory, world, built_once, extras, nested):
    hub, command, secret = world
    folder = Path(shutil.copytree(built_once, tmp_path_factory.mktemp("published") / "model"))
    written = {*read_json(folder / "provenance.json")["files"], "README.md", "provenance.json"}
    for name, kind in extras.items():
        add_file(folder, name, kind, secret)
    for name, kind in nested.items():
        add_file(folder / "question_tokenizer", name, kind, secret)
    repo_id = f"writer/model-{len(hub.repos)}"
    status, output = command("publish", folder, repo_id)
    assert "Traceback" not in output, (extras, output)
    if status == 0:
        assert set(hub.main_files(repo_id)) == {*written, ".gitattributes"}, extras
        assert all(is_safe(blob.content) for blob in hub.main_files(repo_id).values()), extras
    else:  # verify would not pass the folder either
        assert repo_id not in hub.repos
        checks = verify(folder)
        assert not all(check.passed for check in checks), extras


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(names=st.sets(NAMES, max_size=8), folders=st.sets(NAMES, max_size=4))
def test_what_a_second_publication_leaves(tmp_path_factory, world, built_once, names, folders):
    """Files that somebody put beside a published model: none is deleted or changed, whether they allow another."""
    hub, command, _ = world
    folder = Path(shutil.copytree(built_once, tmp_path_factory.mktemp("again") / "model"))
    repo_id = f"writer/model-{len(hub.repos)}"
    assert command("publish", folder, repo_id)[0] == 0
    published = hub.main_files(repo_id)
    theirs = {*names, *(f"mine/{name}" for name in folders)} - published.keys()
    added = {name: Blob(b"{}" if name.endswith(".json") else b"theirs") for name in theirs}
    hub.repos[repo_id].add_commit("main", {**published, **added}, "theirs")
    with (folder / "README.md").open("a") as card:
        card.write("\nMore.\n")
    status, output = command("publish", folder, repo_id)
    assert "Traceback" not in output, (theirs, output)
    remote = hub.main_files(repo_id)
    assert all(remote[name].content == blob.content for name, blob in added.items())
    assert (b"More." in remote["README.md"].content) == (status == 0), output
    refused = {"adapter_config.json", "training_args.bin", "NOTICE.bin"}
    assert (status == 1) == bool(refused & theirs), (theirs, output)
