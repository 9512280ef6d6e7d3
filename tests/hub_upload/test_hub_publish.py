"""hub_upload.publish against a Hub on loopback: what arrives, what is not sent twice, every failure that it names."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from command_line import BASE_ID, CLIP_ID, REPO_ID, ROOT, run_hub_upload
from loopback_hub import Blob, Fault, LoopbackHub, Repo, wait_for

from hub_upload.__main__ import _build_or_reuse, parser
from hub_upload.checkpoint import read_json
from hub_upload.hub import HubFailure, explained


SECRET = "hf_SecretSecretSecretSecretSecret"
SETTINGS = [f"--{name.replace('_', '-')}={value}" for name, value in tiny.RECOVERY.items()]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model-question-tower.safetensors"]


def assert_published_whole(hub, folder: Path, repo_id: str = REPO_ID) -> None:
    remote = hub.main_files(repo_id)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "README.md":
            content = content.replace(b"OWNER/NAME", repo_id.encode())
        assert remote[path.relative_to(folder).as_posix()].content == content, path.name


def assert_main_untouched(hub, repo_id: str = REPO_ID) -> None:
    assert repo_id not in hub.repos or set(hub.main_files(repo_id)) == {".gitattributes"}


# ------------------------------------------------------------------------------------------------- what arrives


def test_publish_is_one_commit_with_everything(hub, command_line, built):
    run = command_line("publish", built, REPO_ID, "--commit-message", "Hello")
    assert run.returncode == 0, run.stderr
    repo = hub.repos[REPO_ID]
    assert [commit.title for commit in repo.commits.values()] == ["initial commit", "Hello"]
    assert not repo.private
    assert_published_whole(hub, built)
    assert f"{hub.endpoint}/{REPO_ID}" in run.stdout
    assert f"revision='{repo.refs['main']}'" in run.stdout
    assert f'repo = "{REPO_ID}"' in hub.main_files(REPO_ID)["README.md"].content.decode()


def test_repeated_publication_sends_nothing_and_a_changed_card_only_itself(hub, command_line, built):
    assert command_line("publish", built, REPO_ID).returncode == 0
    before, uploads = hub.repos[REPO_ID].refs["main"], hub.count("PUT", "/lfs/")
    again = command_line("publish", built, REPO_ID)
    assert again.returncode == 0 and "uploaded" not in again.stdout and before in again.stdout
    assert hub.repos[REPO_ID].refs["main"] == before
    with (built / "README.md").open("a") as card:
        card.write("\nMore.\n")
    changed = command_line("publish", built, REPO_ID)
    assert "uploaded: 1 files" in changed.stdout
    assert hub.repos[REPO_ID].refs["main"] != before
    assert hub.count("PUT", "/lfs/") == uploads


def test_private_branch_and_pull_request(hub, command_line, built):
    assert command_line("publish", built, REPO_ID, "--private").returncode == 0
    repo = hub.repos[REPO_ID]
    assert repo.private
    main = repo.refs["main"]
    with (built / "README.md").open("a") as card:
        card.write("\nMore.\n")
    branch = command_line("publish", built, REPO_ID, "--revision", "next")
    assert branch.returncode == 0, branch.stderr
    assert repo.refs["main"] == main and repo.commits[repo.refs["next"]].parent == main
    assert command_line("publish", built, REPO_ID, "--revision", "next").returncode == 0
    proposal = command_line("publish", built, REPO_ID, "--create-pr")
    assert proposal.returncode == 0, proposal.stderr
    assert repo.refs["main"] == main and b"More." in repo.commits[repo.refs["refs/pr/1"]].files["README.md"].content
    assert f"{hub.endpoint}/{REPO_ID}/discussions/1" in proposal.stdout


def test_new_repository_with_a_branch(hub, command_line, built):
    run = command_line("publish", built, REPO_ID, "--revision", "next")
    assert run.returncode == 0, run.stderr
    assert_main_untouched(hub)
    assert "config.json" in hub.repos[REPO_ID].commits[hub.repos[REPO_ID].refs["next"]].files


def test_dry_run_changes_nothing(hub, command_line, built):
    run = command_line("publish", built, REPO_ID, "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "nothing was sent" in run.stdout and "add    config.json" in run.stdout
    assert hub.repos == {}
    assert not [path for method, path in hub.requests if method in ("POST", "PUT")]


# ------------------------------------------------------------------------------------------- base on the same Hub


@pytest.fixture
def hub_with_sources(hub, base, clip):
    hub.add_folder(BASE_ID, base)
    hub.add_folder(CLIP_ID, clip)
    return hub


@pytest.fixture(scope="module")
def built_from_hub(tmp_path_factory, base, clip) -> Path:
    """Built from sources on a Hub whose commits every other loopback Hub has, too; its cache lies beside it."""
    folder = tmp_path_factory.mktemp("from-hub")
    with LoopbackHub() as hub:
        hub.add_folder(BASE_ID, base)
        hub.add_folder(CLIP_ID, clip)
        run = run_hub_upload(hub, folder, "build", BASE_ID, "--clip", CLIP_ID, "--output", "built", *SETTINGS)
        assert run.returncode == 0, run.stderr
    return folder / "built"


def test_push_copies_the_shards_of_a_base_on_the_hub_and_leaks_no_token(hub_with_sources, command_line, tmp_path):
    hub = hub_with_sources
    hub.tokens[SECRET] = "writer"
    run = command_line("push", BASE_ID, REPO_ID, "--clip", CLIP_ID, *SETTINGS, token=SECRET)
    assert run.returncode == 0, run.stderr
    assert "copied on the server: 2 files" in run.stdout
    assert hub.count("PUT", "/lfs/") == 1
    folder = tmp_path / REPO_ID.split("/")[1]
    assert_published_whole(hub, folder)
    provenance = read_json(folder / "provenance.json")
    assert provenance["base"] == {"repo_id": BASE_ID, "revision": hub.repos[BASE_ID].refs["main"]}
    card = hub.main_files(REPO_ID)["README.md"].content.decode()
    assert f"- {BASE_ID}" in card and "license: llama2" in card
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    assert not any(SECRET.encode() in blob.content for blob in hub.main_files(REPO_ID).values())
    assert SECRET not in run.stdout + run.stderr

    again = command_line("push", BASE_ID, REPO_ID, "--clip", CLIP_ID, *SETTINGS)
    assert again.returncode == 0 and "unchanged" in again.stdout and "copied" not in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", folder.name]


def test_push_never_takes_a_folder_that_was_built_from_something_else(tmp_path, base, clip, built):
    arguments = ["push", str(base), REPO_ID, "--clip", str(clip), *SETTINGS, "--lof-threshold", "2"]
    with pytest.raises(ValueError, match="was built from something else"):
        _build_or_reuse(parser().parse_args(arguments), built)
    assert [path.name for path in tmp_path.iterdir()] == [built.name]


@pytest.mark.parametrize("reason", ["no xet hash", "another region", "refused", "base is gone"])
def test_upload_where_a_server_side_copy_is_impossible(hub_with_sources, command_line, built_from_hub, reason):
    hub = hub_with_sources
    if reason == "no xet hash":
        hub.repos[BASE_ID].has_xet = False
    elif reason == "another region":
        hub.faults.append(Fault("POST", "/lfs-files/duplicate", 400, message="regions differ"))
    elif reason == "refused":
        hub.repos[BASE_ID].stored.clear()
    else:
        del hub.repos[BASE_ID]
    run = command_line("publish", built_from_hub, REPO_ID)
    assert run.returncode == 0, run.stderr
    assert hub.count("PUT", "/lfs/") == 3
    assert_published_whole(hub, built_from_hub)


def test_revisions_of_sources_are_pinned(hub_with_sources, command_line, tmp_path):
    hub = hub_with_sources
    first = hub.repos[BASE_ID].refs["main"]
    hub.repos[BASE_ID].add_commit("main", {"README.md": Blob(b"gone")}, "emptied")
    arguments = ["build", BASE_ID, "--clip", CLIP_ID, "--output", "out", *SETTINGS]
    assert "no safetensors weights, no weights at all" in command_line(*arguments).stderr
    run = command_line(*arguments, "--base-revision", first)
    assert run.returncode == 0, run.stderr
    assert read_json(tmp_path / "out" / "provenance.json")["base"]["revision"] == first
    arguments[arguments.index("out")] = "other"
    wrong = command_line(*arguments, "--base-revision", "nowhere")
    assert wrong.returncode == 1 and "the revision does not exist (404)" in wrong.stderr


def test_clip_without_safetensors_names_the_converted_revision(hub_with_sources, command_line, tmp_path, clip):
    hub = hub_with_sources
    repo = hub.repos[CLIP_ID]
    files = dict(repo.commits[repo.refs["main"]].files)
    pickled = {name: blob for name, blob in files.items() if name != "model.safetensors"}
    pickled["pytorch_model.bin"] = files["model.safetensors"]
    repo.add_commit("main", pickled, "as openai publishes it")
    arguments = ["build", BASE_ID, "--clip", CLIP_ID, "--output", "out", *SETTINGS]
    run = command_line(*arguments)
    assert run.returncode == 1
    assert "only pytorch_model.bin, a pickle" in run.stderr and "refs/pr" not in run.stderr

    for author in ("somebody", "SFconvertbot"):
        repo.refs[f"refs/pr/{len(repo.discussions) + 1}"] = repo.refs["main"]
        repo.add_commit(f"refs/pr/{len(repo.discussions) + 1}", files, "safetensors")
        repo.discussions.append(
            {
                "num": len(repo.discussions) + 1,
                "title": "Adding `safetensors` variant of this model",
                "author": {"name": author},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": CLIP_ID, "type": "model"},
                "isPullRequest": True,
            }
        )
    run = command_line(*arguments)
    assert "pass --clip-revision refs/pr/2" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "home").rglob("*.bin"))
    fixed = command_line(*arguments, "--clip-revision", "refs/pr/2")
    assert fixed.returncode == 0, fixed.stderr


def test_damaged_download_is_found(hub_with_sources, command_line, built_from_hub, tmp_path):
    shutil.copytree(built_from_hub.parent / "home", tmp_path / "home", symlinks=True)
    damaged = next((tmp_path / "home").rglob(SHARDS[0])).resolve()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    run = command_line("build", BASE_ID, "--clip", CLIP_ID, "--output", "out", *SETTINGS)
    assert run.returncode == 1
    assert f"{SHARDS[0]} of {BASE_ID} in the local cache differs from the Hub" in run.stderr, run.stderr
    assert not (tmp_path / "out").exists()
    shutil.rmtree(re.search(r"Delete (\S+) and run the command again", run.stderr).group(1))
    again = command_line("build", BASE_ID, "--clip", CLIP_ID, "--output", "out", *SETTINGS)
    assert again.returncode == 0, again.stderr


# ---------------------------------------------------------------------------------------------------- failures


def test_failures_of_other_transports_are_explained():
    """The storage backend xet is native code with errors of its own; the loopback Hub cannot speak its protocol."""
    disk = OSError(28, "No space left on device", "/cache/blob")
    for error, sentence in (
        (RuntimeError("CAS error"), "HF_HUB_DISABLE_XET=1"),
        (TimeoutError("slow"), "the connection to"),
        (disk, "No space left on device (/cache/blob)"),
    ):
        with pytest.raises(HubFailure) as raised, explained("Publishing"):
            raise error
        assert sentence in str(raised.value)
    with pytest.raises(KeyError), explained("Publishing"):
        raise KeyError("a mistake in this program stays one")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault("POST", "/api/repos/create", 403, message="not yours"), "write access to that namespace"),
        (Fault("POST", "/preupload/", 404, code="RepoNotFound"), "does not exist, or it is private"),
        (Fault("POST", "/commit/", 403, message="not yours"), "propose the change with --create-pr"),
        (Fault("POST", "/commit/", 409, message="busy"), "another operation on the repository is under way"),
        (Fault("POST", "/commit/", 412, message="moved on"), "was changed by someone else meanwhile"),
        (Fault("POST", "/commit/", 429, message="slow down"), "too many requests"),
        (Fault("POST", "/commit/", 500), "the Hub failed (500)"),
        (Fault("POST", "/commit/", 503), "the Hub failed (503)"),
        (Fault("POST", "/commit/", "reset"), "the connection to"),
        (Fault("PUT", "/lfs/", 400, message="storage refuses"), "the Hub refused the request (400)"),
    ],
    ids=lambda value: f"{value.path.strip('/').split('/')[-1]} {value.action}" if isinstance(value, Fault) else "",
)
def test_failures_are_explained_and_leave_main_untouched(hub, command_line, built, fault, sentence):
    hub.faults.append(fault)
    hub.tokens[SECRET] = "writer"
    run = command_line("publish", built, REPO_ID, token=SECRET)
    assert SECRET not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert run.returncode == 1
    assert sentence in run.stderr, run.stderr
    assert_main_untouched(hub)
    again = command_line("publish", built, REPO_ID)
    assert again.returncode == 0, again.stderr
    assert_published_whole(hub, built)


def test_repository_that_somebody_creates_meanwhile(hub, command_line, built):
    def created(_):
        hub.repos[REPO_ID] = Repo(REPO_ID)
        hub.repos[REPO_ID].add_commit("main", {".gitattributes": Blob(b"")}, "initial commit")
        return True

    hub.faults.append(Fault("POST", "/api/repos/create", created))  # and the Hub answers 409
    private = command_line("publish", built, REPO_ID, "--private")
    assert private.returncode == 1 and "exists and is public" in private.stderr
    assert_main_untouched(hub)
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 0, run.stderr
    assert_published_whole(hub, built)


def test_answer_that_is_no_hubs(hub, command_line, built):
    hub.faults.append(Fault("POST", "/preupload/", lambda handler: handler._body() and handler._send(b"<html>")))
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 1 and "did not answer like a Hub" in run.stderr, run.stderr
    assert_main_untouched(hub)


def test_commit_whose_answer_is_lost_is_not_published_twice(hub, command_line, built):
    """The commit happened, the client saw a dropped connection; the rerun finds everything in place."""

    def commit_then_drop(handler):
        handler._send = lambda *_, **__: None
        handler.close_connection = True
        return True

    hub.faults.append(Fault("POST", "/commit/", commit_then_drop))
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 1 and "run the same command again" in run.stderr, run.stderr
    assert_published_whole(hub, built)
    commits = len(hub.repos[REPO_ID].commits)
    assert command_line("publish", built, REPO_ID).returncode == 0
    assert len(hub.repos[REPO_ID].commits) == commits


@pytest.mark.parametrize("action", [503, "reset"])
def test_upload_that_fails_once_is_tried_again(hub, command_line, built, action):
    hub.faults.append(Fault("PUT", "/lfs/", action))
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 0, run.stderr
    assert_published_whole(hub, built)


def test_tokens(hub, command_line, built):
    nobody = command_line("publish", built, REPO_ID, token=None)
    assert nobody.returncode == 1 and "Log in with `hf auth login`" in nobody.stderr, nobody.stderr
    wrong = command_line("publish", built, REPO_ID, "--token", SECRET)
    assert wrong.returncode == 1 and "did not accept the token" in wrong.stderr
    foreign = command_line("publish", built, "somebody/else")
    assert foreign.returncode == 1 and "choose a namespace that is yours" in foreign.stderr
    hub.tokens[SECRET] = "reader"
    hub.add_folder("writer/other", built)
    reader = command_line("publish", built, "writer/other", "--token", SECRET)
    assert reader.returncode in (0, 1)
    for run in (nobody, wrong, foreign, reader):
        assert SECRET not in run.stdout + run.stderr


def test_token_is_hidden_even_where_the_hub_repeats_it(hub, command_line, built):
    hub.tokens[SECRET] = "writer"
    hub.faults.append(Fault("POST", "/commit/", 500, message=f"internal error for Bearer {SECRET}"))
    run = command_line("publish", built, REPO_ID, "--token", SECRET)
    assert run.returncode == 1
    assert SECRET not in run.stdout + run.stderr and "<token>" in run.stderr


def test_offline_and_unreachable(hub, command_line, built):
    offline = command_line("publish", built, REPO_ID, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "Unset HF_HUB_OFFLINE" in offline.stderr, offline.stderr
    gone = command_line("publish", built, REPO_ID, HF_ENDPOINT="http://127.0.0.1:9")
    assert gone.returncode == 1 and "the connection to http://127.0.0.1:9 failed" in gone.stderr, gone.stderr
    build = command_line("build", BASE_ID, "--clip", CLIP_ID, "--output", "out", HF_HUB_OFFLINE="1")
    assert build.returncode == 1 and "not all in the local cache" in build.stderr, build.stderr
    for run in (offline, gone, build):
        assert "Traceback" not in run.stderr


def test_building_offline_from_the_cache(hub, command_line, built_from_hub, tmp_path):
    shutil.copytree(built_from_hub.parent / "home", tmp_path / "home", symlinks=True)
    arguments = ["build", BASE_ID, "--clip", CLIP_ID, *SETTINGS, "--output", "offline"]
    run = command_line(*arguments, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert run.returncode == 0, run.stderr
    offline, online = (read_json(path / "provenance.json") for path in (tmp_path / "offline", built_from_hub))
    assert all(offline[name] == online[name] for name in ("base", "clip", "recovery"))


def test_publication_killed_while_uploading_can_be_repeated(hub, command_line, built, tmp_path):
    arrived = []

    def hold(handler):
        arrived.append(handler.path)
        time.sleep(30)
        return False

    hub.faults.append(Fault("PUT", "/lfs/", hold, times=1))
    process = subprocess.Popen(
        [sys.executable, "-m", "hub_upload", "publish", str(built), REPO_ID],
        env={**hub.environment(tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: bool(arrived))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_main_untouched(hub)
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 0, run.stderr
    assert_published_whole(hub, built)


def test_change_on_the_branch_meanwhile_is_not_overwritten(hub, command_line, built):
    assert command_line("publish", built, REPO_ID).returncode == 0
    with (built / "README.md").open("a") as card:
        card.write("\nMore.\n")

    def somebody_commits(_):
        hub.repos[REPO_ID].add_commit("main", {**hub.main_files(REPO_ID), "theirs.txt": Blob(b"theirs")}, "theirs")
        return True

    hub.faults.append(Fault("POST", "/commit/", somebody_commits))
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 1 and "was changed by someone else meanwhile" in run.stderr
    assert b"More." not in hub.main_files(REPO_ID)["README.md"].content
    assert command_line("publish", built, REPO_ID).returncode == 0
    assert "theirs.txt" in hub.main_files(REPO_ID)


def test_what_is_refused_before_anything_is_sent(hub, command_line, built, tmp_path, base):
    hub.add_folder("writer/foreign", base)
    hub.add_folder("writer/public", built)
    for arguments, sentence in (
        ((base, REPO_ID), "pass a folder made by"),
        ((built, "writer/foreign"), "holds a model that this tool did not publish"),
        ((built, "writer/public", "--private"), "exists and is public"),
        ((built, REPO_ID, "--create-pr", "--revision", "next"), "the Hub opens pull requests to main"),
        ((built, "not a repo id"), "Repo id must"),
    ):
        run = command_line("publish", *arguments)
        assert run.returncode == 1 and sentence in run.stderr, (arguments, run.stderr)
        assert "Traceback" not in run.stderr
    assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]
    (built / "config.json").rename(tmp_path / "config.json")
    (built / SHARDS[2]).write_bytes(b"other")
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 1 and "config.json is missing since the folder was built" in run.stderr, run.stderr
    (tmp_path / "config.json").rename(built / "config.json")
    run = command_line("publish", built, REPO_ID)
    assert run.returncode == 1 and f"{SHARDS[2]} cannot be read" in run.stderr, run.stderr
