"""Everything that talks to the Hub: fetching sources, publishing a built folder in one commit, explaining failures.

A publication is one commit: whatever goes wrong before it, `main` stays as it was, and after it `main` is complete.
Files that the target already has are skipped, shards that the base repository has are copied on the server, the rest is
uploaded; an interrupted publication is therefore repeated by running the same command again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileDuplicationError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from hub_upload.checkpoint import INDEX, WEIGHTS, file_sha256, files_sha256, read_json
from hub_upload.model_card import published_card


PROVENANCE = "provenance.json"
CARD = "README.md"
MAIN = "main"
SOURCE_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "USE_POLICY*", "NOTICE*", "README.md")
# Left on the target from an earlier publication, these would be loaded instead of, or beside, what is published now.
STALE_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")
CONVERSION_BOT = "SFconvertbot"
# By name, as huggingface_hub changes its HTTP library between versions.
NETWORK_ERRORS = {"NetworkError", "TimeoutException", "RemoteProtocolError", "ConnectionError", "TimeoutError"}


class HubFailure(RuntimeError):
    """The Hub did not do what was asked; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk, and where on the Hub it came from, if it did."""

    folder: Path
    name: str
    repo_id: str | None = None
    commit: str | None = None
    hub_sha256: dict[str, str] = field(default_factory=dict)

    def provenance(self) -> dict[str, str | None]:
        if self.repo_id is None:
            return {"folder": self.folder.name}
        return {"repo_id": self.repo_id, "revision": self.commit}


@dataclass(frozen=True)
class PlannedFile:
    """`action` is one of add, copy, keep, delete."""

    path: str
    action: str
    size: int


@dataclass(frozen=True)
class Publication:
    repo_id: str
    url: str
    commit: str | None
    pull_request: str | None
    files: list[PlannedFile]
    dry_run: bool = False


# ---------------------------------------------------------------------------------------------------- failures


def redact(text: str, token: str | None = None) -> str:
    """`text` without any token that this process knows."""
    for secret in {token, get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}:
        if secret:
            text = text.replace(secret, "<token>")
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException, action: str) -> str | None:
    """One sentence for what happened and one for what to do; None if this is no failure of the Hub or of the disk."""
    for cause in _chain(error):
        if isinstance(cause, OfflineModeIsEnabled):
            return f"{action}: offline mode is on (HF_HUB_OFFLINE). Unset HF_HUB_OFFLINE and run the command again"
        if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
            return f"{action}: {_explain_response(cause)}"
        if NETWORK_ERRORS & {kind.__name__ for kind in type(cause).__mro__}:
            return (
                f"{action}: the connection to {constants.ENDPOINT} failed ({type(cause).__name__}). Check the network, "
                "then run the same command again: what was uploaded is not sent twice"
            )
        if isinstance(cause, json.JSONDecodeError):
            return f"{action}: {constants.ENDPOINT} did not answer like a Hub. Check HF_ENDPOINT, proxy and network"
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            return f"{action}: {cause.strerror} ({cause.filename or 'while writing'}). Free some space and run it again"
        if isinstance(cause, LocalEntryNotFoundError):
            return (
                f"{action}: {constants.ENDPOINT} did not answer and the files are not all in the local cache. "
                "Check the network, then run the same command again"
            )
    if isinstance(error, RuntimeError) or type(error).__module__ == "hf_xet":
        return (
            f"{action}: the transfer failed ({error}). Run the same command again; if it goes on failing, set "
            "HF_HUB_DISABLE_XET=1, which takes the Hub's older way of transfer"
        )
    return None


def _explain_response(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = getattr(error, "server_message", None) or ""
    said = f" The Hub says: {said.strip()}" if said.strip() else ""
    if isinstance(error, GatedRepoError):
        return f"the repository is gated. Accept its terms on its page and pass a token of that account.{said}"
    if isinstance(error, RevisionNotFoundError):
        return f"the revision does not exist (404). Check its spelling on the repository's page.{said}"
    if isinstance(error, EntryNotFoundError):
        return f"a file is missing on the Hub (404).{said}"
    if status == 401:
        return (
            "the Hub did not accept the token, or there is none and the repository is private or missing (401). "
            f"Log in with `hf auth login`, or set HF_TOKEN to a token that is valid.{said}"
        )
    if status == 403:
        return (
            "the token may not do this (403). Use a token with write access to that namespace, choose a namespace that "
            f"is yours, or propose the change with --create-pr.{said}"
        )
    if status == 404:
        return (
            "the repository does not exist, or it is private and the token cannot see it (404). Check the spelling and "
            f"that the token has access.{said}"
        )
    if status == 409:
        return f"another operation on the repository is under way (409). Wait a minute and run the command again.{said}"
    if status == 412:
        return (
            "the branch was changed by someone else meanwhile (412), so nothing was committed. Look at that change, "
            f"then run the command again.{said}"
        )
    if status == 429:
        return f"too many requests (429). Wait some minutes and run the command again.{said}"
    if status >= 500:
        return (
            f"the Hub failed ({status}). A commit is applied whole or not at all, so the branch is not half-published; "
            f"run the same command again.{said}"
        )
    return f"the Hub refused the request ({status}).{said}"


@contextmanager
def explained(action: str, token: str | None = None) -> Iterator[None]:
    """Turns the client's exceptions into HubFailure; the original, which may quote headers, is not chained."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{action}: {redact(str(error), token)}") from None
    except HubFailure:
        raise
    except Exception as error:
        sentence = explain(error, action)
        if sentence is None:
            raise
        raise HubFailure(redact(sentence, token)) from None


def hub_client(token: str | None = None) -> HfApi:
    return HfApi(token=token, library_name="recoverable-llava")


# ------------------------------------------------------------------------------------------------------ sources


def fetch_source(name: str, revision: str | None = None, token: str | None = None, role: str = "base") -> Source:
    """The checkpoint `name`, a folder or a repo id, with safetensors weights and configuration on this disk."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"{role}_revision={revision!r} belongs to a repo id, but {role}={name!r} is a folder: leave it out"
            )
        return Source(folder.resolve(), name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{role}={name!r}: there is no such folder, and it is no repo id (owner/name)")
    client = hub_client(token)
    action = f"Fetching {name}" + (f" at {revision}" if revision else "")
    with explained(action, token):
        if constants.is_offline_mode():
            return _cached_source(name, revision)
        commit = client.model_info(name, revision=revision).sha
        entries = [entry for entry in client.list_repo_tree(name, revision=commit) if isinstance(entry, RepoFile)]
        weights = _safetensors(entries)
        if not weights:
            raise ValueError(_no_safetensors(client, name, revision, role, [entry.path for entry in entries]))
        wanted = weights | {
            entry.path for entry in entries if any(fnmatch(entry.path, pattern) for pattern in SOURCE_PATTERNS)
        }
        snapshot = snapshot_download(name, revision=revision, allow_patterns=sorted(wanted), token=token)
        if Path(snapshot).name != commit:  # the branch moved between the two calls
            snapshot = snapshot_download(name, revision=commit, allow_patterns=sorted(wanted), token=token)
    sha256 = {entry.path: entry.lfs.sha256 for entry in entries if entry.path in weights and entry.lfs is not None}
    return Source(Path(snapshot), name, name, commit, sha256)


def _cached_source(name: str, revision: str | None) -> Source:
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        raise LocalEntryNotFoundError(f"{name} is not in the cache")
    return Source(Path(config).parent, name, name, Path(config).parent.name)


def _safetensors(entries: list[RepoFile]) -> set[str]:
    paths = {entry.path for entry in entries}
    if WEIGHTS in paths:
        return {WEIGHTS}
    return {path for path in paths if path.endswith(".safetensors")} if INDEX in paths else set()


def _no_safetensors(client: HfApi, name: str, revision: str | None, role: str, paths: list[str]) -> str:
    pickled = [path for path in paths if path.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    where = f"{name} at revision {revision or MAIN!r}"
    reason = f"only {', '.join(pickled)}, a pickle that can run code when read" if pickled else "no weights at all"
    found = _converted_revision(client, name)
    remedy = (
        f"The Hub's conversion bot has published the same weights as safetensors: pass --{role}-revision {found}. Or "
        "use"
        if found
        else "Use"
    )
    return (
        f"{where} has no safetensors weights, {reason}. {remedy} another repository of the same model that holds "
        "safetensors, or convert a copy that you trust, AutoModel.from_pretrained(NAME, weights_only=True)"
        f".save_pretrained(FOLDER), add its tokenizer, and pass --{role} FOLDER"
    )


def _converted_revision(client: HfApi, name: str) -> str | None:
    """The bot's pull request that adds safetensors; anyone else's is not proposed: its weights could be anything."""
    try:
        for discussion in client.get_repo_discussions(name, author=CONVERSION_BOT, discussion_type="pull_request"):
            if discussion.author != CONVERSION_BOT or not discussion.is_pull_request:
                continue
            revision = discussion.git_reference or f"refs/pr/{discussion.num}"
            entries = client.list_repo_tree(name, revision=revision)
            if _safetensors([entry for entry in entries if isinstance(entry, RepoFile)]):
                return revision
    except (HfHubHTTPError, OSError):
        pass
    return None


def fetch_repository(repo_id: str, revision: str | None = None, token: str | None = None) -> tuple[Path, str]:
    """All files of a published repository, and the commit they are from."""
    with explained(f"Fetching {repo_id}" + (f" at {revision}" if revision else ""), token):
        if constants.is_offline_mode():
            snapshot = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
            return snapshot, snapshot.name
        commit = str(hub_client(token).model_info(repo_id, revision=revision).sha)
        return Path(snapshot_download(repo_id, revision=commit, token=token)), commit


# --------------------------------------------------------------------------------------------------- publication


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publishes a folder made by `hub_upload.build` to `repo_id` in one commit.

    Args:
        private: make a new repository private; refused if the repository exists and is public.
        revision: branch to commit to, created from main if it does not exist; default main.
        create_pr: open a pull request instead of committing.
        dry_run: only say what would be sent; nothing is created or changed.
    """
    folder = Path(folder)
    if create_pr and revision not in (None, MAIN):
        raise ValueError(
            f"revision={revision!r} with create_pr=True: the Hub opens pull requests to main; leave one out"
        )
    provenance = _checked_provenance(folder)
    branch = revision or MAIN
    client = hub_client(token)
    action = f"Publishing to {repo_id}"
    with explained(action, token):
        base = _base_files(client, provenance)
        target = _target_state(client, repo_id, branch, private, create_pr)
        plan = _plan(folder, repo_id, provenance, target.files, base)
        if dry_run:
            return Publication(repo_id, f"{constants.ENDPOINT}/{repo_id}", target.head, None, plan, dry_run=True)
        if not target.exists:
            client.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the owner's default
            # Looked at again: somebody else may have created it between the two calls.
            target = _target_state(client, repo_id, branch, private, create_pr)
            plan = _plan(folder, repo_id, provenance, target.files, base)
        head = target.head
        if head is None:
            client.create_branch(repo_id, branch=branch, exist_ok=True)
            head = client.model_info(repo_id, revision=branch).sha
        if all(entry.action == "keep" for entry in plan):
            return Publication(repo_id, f"{constants.ENDPOINT}/{repo_id}", head, None, plan)
        commit = _commit_with_fallback(
            client,
            plan,
            lambda entries: _operations(folder, repo_id, entries, base),
            repo_id=repo_id,
            revision=branch,
            commit_message=commit_message or "Publish a LLaVA with recoverable visual token compression",
            create_pr=create_pr,
            parent_commit=head,
        )
    return Publication(repo_id, f"{constants.ENDPOINT}/{repo_id}", commit.oid, commit.pr_url, plan)


def _checked_provenance(folder: Path) -> dict[str, Any]:
    if not (folder / PROVENANCE).is_file():
        raise ValueError(
            f"folder={str(folder)!r} has no {PROVENANCE}: pass a folder made by `python -m hub_upload build`"
        )
    provenance = read_json(folder / PROVENANCE)
    for name in provenance["files"]:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing since the folder was built: build it again")
    actual = files_sha256(folder, provenance["files"], "Checking files")
    changed = sorted(name for name, digest in provenance["files"].items() if actual[name] != digest)
    if changed:
        raise ValueError(
            f"{', '.join(changed)} in {folder} changed since the folder was built: build it again, and publish a "
            "changed model with its own push_to_hub"
        )
    return provenance


@dataclass(frozen=True)
class _Target:
    """Where a commit would go: `head` is None for a missing branch, `files` are what it would start from."""

    exists: bool
    head: str | None
    files: dict[str, RepoFile]


def _target_state(client: HfApi, repo_id: str, branch: str, private: bool, create_pr: bool) -> _Target:
    try:
        info = client.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 and get_token() is None and client.token is None:
            raise
        return _Target(False, None, {})
    if private and not info.private:
        raise ValueError(
            f"private=True, but {repo_id} exists and is public: make it private in its settings first, or choose "
            "another repo id"
        )
    head: str | None = info.sha
    if branch != MAIN:
        try:
            head = client.model_info(repo_id, revision=branch).sha
        except RevisionNotFoundError:
            head = None
    entries = client.list_repo_tree(repo_id, revision=head or info.sha, recursive=True)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    if "config.json" in files and PROVENANCE not in files and not create_pr:
        raise ValueError(
            f"repo_id={repo_id!r} holds a model that this tool did not publish; committing would replace it. Choose "
            "another repo id, or propose the replacement with --create-pr"
        )
    return _Target(True, head, files)


def _base_files(client: HfApi, provenance: dict[str, Any]) -> dict[str, RepoFile]:
    """The base's files by SHA-256, if the base is on the Hub, still there, and stored so that it can be copied."""
    base = provenance["base"]
    if not base.get("repo_id"):
        return {}
    try:
        entries = list(client.list_repo_tree(base["repo_id"], revision=base["revision"]))
    except HfHubHTTPError:
        return {}
    files = [entry for entry in entries if isinstance(entry, RepoFile) and entry.lfs is not None and entry.xet_hash]
    return {entry.lfs.sha256: entry for entry in files if entry.lfs is not None}


def published_content(path: Path, repo_id: str) -> Path | bytes:
    """What is sent for a file: the file itself, but the card with the repository's name filled in."""
    if path.name != CARD:
        return path
    return published_card(path.read_text(encoding="utf-8"), repo_id).encode()


def _local_files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths if ".cache" not in path.parts)


def _unchanged(content: Path | bytes, digest: str | None, remote: RepoFile | None) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None and isinstance(content, Path):
        return remote.lfs.sha256 == (digest or file_sha256(content))
    content = content.read_bytes() if isinstance(content, Path) else content
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _plan(
    folder: Path,
    repo_id: str,
    provenance: dict[str, Any],
    remote: dict[str, RepoFile],
    base: dict[str, RepoFile],
) -> list[PlannedFile]:
    hashes = provenance["files"]
    plan = []
    for name in _local_files(folder):
        path = folder / name
        if _unchanged(published_content(path, repo_id), hashes.get(name), remote.get(name)):
            action = "keep"
        else:
            action = "copy" if hashes.get(name) in base else "add"
        plan.append(PlannedFile(name, action, path.stat().st_size))
    local = {entry.path for entry in plan}
    stale = (path for path in remote if path not in local and any(fnmatch(path, pattern) for pattern in STALE_PATTERNS))
    return plan + [PlannedFile(path, "delete", remote[path].size) for path in sorted(stale)]


Operation: TypeAlias = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


def _operations(folder: Path, repo_id: str, plan: list[PlannedFile], base: dict[str, RepoFile]) -> list[Operation]:
    provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    source, commit = provenance["base"].get("repo_id"), provenance["base"].get("revision")
    across = {} if source == repo_id else {"src_repo_id": source, "src_repo_type": "model"}
    operations: list[Operation] = []
    for entry in plan:
        if entry.action == "add":
            operations.append(CommitOperationAdd(entry.path, published_content(folder / entry.path, repo_id)))
        elif entry.action == "copy":
            original = base[provenance["files"][entry.path]].path
            operations.append(CommitOperationCopy(original, entry.path, src_revision=commit, **across))
        elif entry.action == "delete":
            operations.append(CommitOperationDelete(entry.path))
    return operations


def _commit_with_fallback(
    client: HfApi,
    plan: list[PlannedFile],
    operations: Callable[[list[PlannedFile]], list[Operation]],
    **arguments: Any,
) -> Any:
    """Server-side copies are refused across storage regions; then, and only then, the shards are uploaded."""
    try:
        return client.create_commit(operations=operations(plan), **arguments)
    except Exception as error:
        if not any(entry.action == "copy" for entry in plan) or not _copy_was_refused(error):
            raise
    uploads = [PlannedFile(entry.path, "add", entry.size) if entry.action == "copy" else entry for entry in plan]
    return client.create_commit(operations=operations(uploads), **arguments)


def _copy_was_refused(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return "/lfs-files/duplicate" in str(error.response.url) and error.response.status_code not in (401, 429)
    return isinstance(error, FileDuplicationError) or "no xet hash" in str(error)
