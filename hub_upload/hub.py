"""Everything that talks to the Hub: fetching sources and repositories, reading a target, committing, and explaining
what went wrong. What is published is decided elsewhere, in `publish`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

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

from hub_upload.checkpoint import INDEX, WEIGHTS
from hub_upload.source import SOURCE_PATTERNS, Source


MAIN = "main"
CONVERSION_BOT = "SFconvertbot"
# By name, as huggingface_hub changes its HTTP library between versions.
NETWORK_ERRORS = {"NetworkError", "TimeoutException", "RemoteProtocolError", "ConnectionError", "TimeoutError"}


class HubFailure(RuntimeError):
    """The Hub did not do what was asked; the message says why and what to do."""


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


# ---------------------------------------------------------------------------------------------- target of a commit


@dataclass(frozen=True)
class Target:
    """Where a commit would go: `head` is None for a missing branch, `files` are what it would start from."""

    exists: bool
    private: bool
    head: str | None
    start: str | None
    files: dict[str, RepoFile]


@dataclass(frozen=True)
class ServerCopy:
    """A file of another repository that is copied on the server, and the same file on this disk."""

    repo_id: str
    revision: str
    path: str
    local: Path


def target_state(client: HfApi, repo_id: str, branch: str) -> Target:
    try:
        info = client.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401 and get_token() is None and client.token is None:
            raise
        return Target(False, False, None, None, {})
    head: str | None = info.sha
    if branch != MAIN:
        try:
            head = client.model_info(repo_id, revision=branch).sha
        except RevisionNotFoundError:
            head = None
    start = head or info.sha
    entries = client.list_repo_tree(repo_id, revision=start, recursive=True)
    files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    return Target(True, bool(info.private), head, start, files)


def create_repository(client: HfApi, repo_id: str, private: bool) -> None:
    client.create_repo(repo_id, private=private or None, exist_ok=True)  # None: the owner's default


def create_branch(client: HfApi, repo_id: str, branch: str) -> str:
    """Makes the branch from main and returns its commit."""
    client.create_branch(repo_id, branch=branch, exist_ok=True)
    return str(client.model_info(repo_id, revision=branch).sha)


def read_text(client: HfApi, repo_id: str, path: str, revision: str | None) -> str:
    """A small file of a repository; what is no text is read as far as it is one."""
    return Path(client.hf_hub_download(repo_id, path, revision=revision)).read_text(encoding="utf-8", errors="replace")


def copyable_files(client: HfApi, repo_id: str | None, revision: str | None) -> dict[str, str]:
    """Paths by SHA-256 of a repository's files that the server can copy: none if it is gone or stored otherwise."""
    if repo_id is None:
        return {}
    try:
        entries = list(client.list_repo_tree(repo_id, revision=revision))
    except HfHubHTTPError:
        return {}
    return {
        entry.lfs.sha256: entry.path
        for entry in entries
        if isinstance(entry, RepoFile) and entry.lfs is not None and entry.xet_hash
    }


def commit(
    client: HfApi,
    repo_id: str,
    *,
    add: dict[str, Path | bytes],
    copy: dict[str, ServerCopy],
    delete: list[str],
    **arguments: Any,
) -> Any:
    """One commit. Copies between storage regions are refused; then, and only then, those files are uploaded."""

    def changes() -> list[CommitOperationAdd | CommitOperationDelete]:
        """Made anew for each attempt, as the client notes in them what it did."""
        added = [CommitOperationAdd(path, content) for path, content in add.items()]
        return [*added, *(CommitOperationDelete(path) for path in delete)]

    copies = [_copy_operation(repo_id, path, source) for path, source in copy.items()]
    try:
        return client.create_commit(repo_id, operations=[*changes(), *copies], **arguments)
    except Exception as error:
        if not copies or not _copy_was_refused(error):
            raise
    uploads = [CommitOperationAdd(path, source.local) for path, source in copy.items()]
    return client.create_commit(repo_id, operations=[*changes(), *uploads], **arguments)


def _copy_operation(repo_id: str, path: str, source: ServerCopy) -> CommitOperationCopy:
    across = {} if source.repo_id == repo_id else {"src_repo_id": source.repo_id, "src_repo_type": "model"}
    return CommitOperationCopy(source.path, path, src_revision=source.revision, **across)


def _copy_was_refused(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return "/lfs-files/duplicate" in str(error.response.url) and error.response.status_code not in (401, 429)
    return isinstance(error, FileDuplicationError) or "no xet hash" in str(error)
