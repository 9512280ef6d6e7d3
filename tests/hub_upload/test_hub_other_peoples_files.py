"""Publishing beside other people's files: what is sent, deleted, replaced and refused."""

import json
import shutil
from pathlib import Path

import pytest
from batches import both_families
from command_line import CommandWorker
from hostile import EVIL, EVIL_CODE, SECRET
from loopback_hub import Blob, LoopbackHub, Repo

from hub_upload.checkpoint import file_sha256, read_json, write_json
from hub_upload.inspection import inspect_files
from hub_upload.provenance import checked_provenance, is_same_build, is_same_model
from hub_upload.remote_code import package_auto_map, package_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with LoopbackHub() as hub, CommandWorker(hub, folder) as command:
        yield hub, command


@pytest.fixture
def repo_id(request) -> str:
    return f"writer/{request.node.name[5:80].replace('[', '-').replace(']', '').replace(' ', '-').strip('-.')}"


def add_by_hand(hub: LoopbackHub, repo_id: str, **files: bytes) -> None:
    """A commit of somebody's; in names, __ is a slash and _DOT_ a dot."""
    added = {name.replace("__", "/").replace("_DOT_", "."): Blob(content) for name, content in files.items()}
    hub.repos[repo_id].add_commit("main", {**hub.main_files(repo_id), **added}, "by hand")


def rewritten(folder: Path, name: str, content: str) -> None:
    """Changes a file of a built folder and its hash, as if the build had written it."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(content)
    provenance = read_json(folder / "provenance.json")
    provenance["files"][name] = file_sha256(folder / name)
    write_json(folder / "provenance.json", provenance)


def test_what_the_build_did_not_write_is_not_sent(world, built, repo_id, tmp_path):
    hub, command = world
    (tmp_path / "secret").write_text(SECRET)
    (built / ".env").write_text("HF_TOKEN=hf_secret")
    (built / ".git").mkdir()
    (built / ".git" / "config").write_text("[remote]")
    (built / "link.txt").symlink_to(tmp_path / "secret")
    (built / "question_tokenizer" / "notes.txt").write_text("mine")
    status, output = command("publish", built, repo_id, "--dry-run")
    assert status == 0, output
    not_sent = "Not sent, as the build did not write it: .env, .git/, link.txt, question_tokenizer/notes.txt\n"
    assert not_sent in output
    assert not [line for line in output.splitlines() if line.startswith("  ") and line.split()[1] in not_sent]
    status, output = command("publish", built, repo_id)
    assert status == 0 and not_sent.strip() in output, output
    sent = set(hub.main_files(repo_id))
    assert not {".env", ".git/config", "link.txt", "question_tokenizer/notes.txt"} & sent
    assert sent == {*read_json(built / "provenance.json")["files"], "README.md", "provenance.json", ".gitattributes"}


def test_other_peoples_files_stay_and_an_earlier_publications_go(world, built, repo_id):
    hub, command = world
    assert command("publish", built, repo_id)[0] == 0
    earlier = json.loads(hub.main_files(repo_id)["provenance.json"].content)
    earlier["files"] |= {"model-00009-of-00009.safetensors": "0" * 64, "old_code.py": "0" * 64}
    theirs = {
        "adapter__adapter_config_DOT_json": b"{}",
        "adapter__adapter_model_DOT_safetensors": b"adapter",
        "adapter_model_DOT_safetensors": b"adapter",
        "onnx__model_DOT_onnx": b"onnx",
        "onnx__weights_DOT_bin": b"onnx",
        "example_DOT_py": b"print()",
        "examples__ask_DOT_py": b"print()",
        "picture_DOT_txt": b"picture",
    }
    add_by_hand(hub, repo_id, **theirs)
    names = {name.replace("__", "/").replace("_DOT_", ".") for name in theirs}
    written = {"model-00009-of-00009_DOT_safetensors": b"old", "old_code_DOT_py": b"old"}
    add_by_hand(hub, repo_id, provenance_DOT_json=json.dumps(earlier).encode(), **written)
    status, output = command("publish", built, repo_id, "--dry-run")
    deleted = [line.split()[1] for line in output.splitlines() if line.startswith("  delete")]
    assert status == 0 and deleted == ["model-00009-of-00009.safetensors", "old_code.py"], output
    status, output = command("publish", built, repo_id)
    assert status == 0 and "removed: 2 files" in output, output
    assert names <= set(hub.main_files(repo_id))
    assert not {"model-00009-of-00009.safetensors", "old_code.py"} & set(hub.main_files(repo_id))


@pytest.mark.parametrize(
    "name",
    [
        "model_DOT_safetensors",
        "adapter_config_DOT_json",
        "custom_generate__generate_DOT_py",
        "pytorch_model_DOT_bin",
        "preprocessor_config_DOT_json",
        "question_tokenizer__config_DOT_broken_DOT_json",
    ],
)
def test_what_would_be_loaded_or_run_in_place_of_ours_is_refused(world, built, repo_id, name):
    hub, command = world
    assert command("publish", built, repo_id)[0] == 0
    content = json.dumps({"auto_map": {"AutoImageProcessor": EVIL}}) if "preprocessor" in name else EVIL_CODE
    add_by_hand(hub, repo_id, **{name: content.encode()})
    with (built / "README.md").open("a") as card:
        card.write("\nMore.\n")
    path = name.replace("__", "/").replace("_DOT_", ".")
    for more in ((), ("--dry-run",), ("--create-pr",)):
        status, output = command("publish", built, repo_id, *more)
        assert status == 1 and path in output and "Remove them there" in output, output
    assert path in hub.main_files(repo_id) and b"More." not in hub.main_files(repo_id)["README.md"].content


def test_another_model_is_not_replaced(world, built, repo_id):
    hub, command = world
    assert command("publish", built, repo_id)[0] == 0
    provenance = read_json(built / "provenance.json")
    for base in ({"folder": "another"}, {"repo_id": "maker/llava-tiny", "revision": "0" * 40}):
        write_json(built / "provenance.json", {**provenance, "base": base})
        status, output = command("publish", built, repo_id)
        assert status == 1 and "built from 'llava-tiny'" in output and "--create-pr" in output, output
        assert command("publish", built, repo_id, "--dry-run")[0] == 1
    before = hub.repos[repo_id].refs["main"]
    status, output = command("publish", built, repo_id, "--create-pr")
    assert status == 0 and "Pull request" in output and hub.repos[repo_id].refs["main"] == before, output
    write_json(built / "provenance.json", {**provenance, "vision_tower_differs": True})  # another build of the same
    assert command("publish", built, repo_id)[0] == 0


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}", "model.safetensors": b"another"},
        {"README.md": b"---\nlicense: mit\n---\n# My adapter\n", "adapter/adapter_model.safetensors": b"adapter"},
        {"README.md": b"# Notes\n"},
        {"provenance.json": b"not JSON"},
        {"provenance.json": b"[]"},
        {"provenance.json": b'{"files": {"../outside": "x"}, "base": {}, "clip": {}}'},
    ],
    ids=lambda files: " ".join(files).replace("/", "-"),
)
def test_a_repository_that_this_tool_did_not_publish(world, built, repo_id, files):
    hub, command = world
    repo = hub.repos[repo_id] = Repo(repo_id)
    repo.add_commit("main", {name: Blob(content) for name, content in files.items()}, "theirs")
    status, output = command("publish", built, repo_id)
    assert status == 1 and ("Choose another" in output or "choose another" in output), output
    assert {name: blob.content for name, blob in hub.main_files(repo_id).items()} == files


def test_a_repository_as_the_website_makes_it(world, built, repo_id):
    hub, command = world
    repo = hub.repos[repo_id] = Repo(repo_id)
    files = {".gitattributes": Blob(b""), "README.md": Blob(b"---\nlicense: mit\n---\n")}
    repo.add_commit("main", files, "initial commit")
    status, output = command("publish", built, repo_id)
    assert status == 0, output


# ------------------------------------------------------------------------------------------ what publish refuses


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [EVIL, EVIL]}}),
        ("question_tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, EVIL]}}),
        ("config.json", {"custom_pipelines": {"image-text-to-text": {"impl": EVIL}}}),
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": EVIL}}}),
        ("config.json", {"attn_implementation": "writer/evil-kernel"}),
        ("generation_config.json", {"custom_generate": "writer/evil"}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": EVIL}}),
    ],
)
def test_configurations_that_name_foreign_code_are_refused(world, built, repo_id, name, content):
    """Also where the hashes were changed with them, as in a folder that an earlier version built."""
    hub, command = world
    before = read_json(built / name) if (built / name).exists() else {}
    rewritten(built, name, json.dumps({**before, **content}))
    for words in (("verify", built), ("publish", built, repo_id), ("publish", built, repo_id, "--dry-run")):
        status, output = command(*words)
        assert status == 1 and "no other code is named" in output and name in output and "evil" in output, output
    assert repo_id not in hub.repos


@both_families
@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoProcessor"])
def test_code_of_the_other_family_is_foreign(built, family, name, auto_class):
    """Though it is the package's, a repository does not hold it."""
    assert [check for check in inspect_files(built) if not check.passed] == []
    other = package_auto_map("llava" if family == "llava_next" else "llava_next")[auto_class]
    settings = read_json(built / name)
    rewritten(built, name, json.dumps({**settings, "auto_map": {**settings.get("auto_map", {}), auto_class: other}}))
    failed = {check.name: check.detail for check in inspect_files(built) if not check.passed}
    assert failed["no other code is named"] == f"{name}: {auto_class}={other}"
    file = f"{other.split('.')[0]}.py"
    shutil.copyfile(package_folder() / file, built / file)
    assert file in {check.name: check.detail for check in inspect_files(built)}["code equals trust_remote_code.md"]


def test_a_class_of_the_other_family_on_the_target_is_refused(world, built, repo_id):
    hub, command = world
    assert command("publish", built, repo_id)[0] == 0
    settings = json.dumps({"auto_map": {"AutoProcessor": package_auto_map("llava_next")["AutoProcessor"]}}).encode()
    add_by_hand(hub, repo_id, preprocessor_config_DOT_json=settings)
    status, output = command("publish", built, repo_id)
    assert status == 1 and "preprocessor_config.json (AutoProcessor=processing_recoverable_llava_next" in output


@pytest.mark.parametrize("name", ["more.py", "custom_generate/generate.py", "deep/er/more.py", "training_args.bin"])
def test_other_code_in_the_folder_is_refused(world, built, repo_id, name):
    hub, command = world
    (built / name).parent.mkdir(parents=True, exist_ok=True)
    (built / name).write_text(EVIL_CODE)
    status, output = command("publish", built, repo_id)
    assert status == 1 and name in output and "Take out what was added" in output, output
    assert command("verify", built)[0] == 1
    assert repo_id not in hub.repos


def test_changed_missing_and_linked_files_are_refused(world, built, built_once, repo_id, tmp_path):
    hub, command = world
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for name in ("README.md", "tokenizer.json", "chat_template.jinja"):
        content = (built / name).read_bytes()
        (built / name).unlink()
        status, output = command("publish", built, repo_id)
        assert status == 1 and f"{name} is missing since the folder was built" in output, output
        (built / name).symlink_to(secret)
        status, output = command("publish", built, repo_id)
        assert status == 1 and "is a link to a place outside of the folder" in output, output
        (built / name).unlink()
        (built / name).write_bytes(content)
    (built / "generation_config.json").write_text("{}")
    status, output = command("publish", built, repo_id)
    assert status == 1 and "settings equal provenance.json: generation_config.json" in output, output
    assert repo_id not in hub.repos


def test_a_folder_of_an_earlier_version_is_built_again(world, built, repo_id):
    _, command = world
    provenance = read_json(built / "provenance.json")
    provenance["files"] = {name: sha for name, sha in provenance["files"].items() if name.endswith((".py", "tensors"))}
    write_json(built / "provenance.json", provenance)
    status, output = command("publish", built, repo_id)
    assert status == 1 and "was built by an earlier version" in output, output


# --------------------------------------------------------------------------------------------------------- provenance


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../b", "", "a\\b"])
def test_names_in_provenance_lie_inside(name):
    content = {"files": {name: "0" * 64}, "base": {"folder": "base"}, "clip": {"folder": "clip"}}
    with pytest.raises(ValueError, match="lists no files"):
        checked_provenance(content, "a folder")


@pytest.mark.parametrize(
    "changed", [{"files": []}, {"files": {"a": 1}}, {"base": None}, {"clip": {}}, {"base": {"folder": 1}}]
)
def test_damaged_provenance_is_refused(changed):
    content = {"files": {"a": "0" * 64}, "base": {"folder": "base"}, "clip": {"folder": "clip"}}
    assert checked_provenance(content, "a folder") == content
    with pytest.raises(ValueError, match="build it again"):
        checked_provenance({**content, **changed}, "a folder")


def test_same_model_and_same_build():
    one = {"files": {"a": "0" * 64}, "base": {"repo_id": "a/b", "revision": "1"}, "recovery": {}}
    assert is_same_model(one, {**one, "base": {"repo_id": "a/b", "revision": "2"}})
    assert not is_same_model(one, {**one, "base": {"folder": "a/b"}})
    assert is_same_build(one, {**one, "files": {"a": "0" * 64, "recovery_overlay.png": "1" * 64}})
    assert not is_same_build(one, {**one, "files": {"a": "1" * 64}})
    assert not is_same_build(one, {**one, "recovery": {"compress": False}})
