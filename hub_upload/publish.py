"""Publishes a built folder in one commit: looks at it, looks at the target, plans, sends.

What is sent is what the build wrote, and what is deleted is what an earlier publication wrote and this one does not;
other files on either side stay where they are. Whatever goes wrong before the commit, `main` stays as it was, and after
it `main` is complete. Files that the target already has are skipped, shards that the base repository has are copied on
the server, the rest is uploaded; an interrupted publication is therefore repeated by running the same command again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import RepoFile

from hub_upload import hub
from hub_upload.checkpoint import file_sha256
from hub_upload.hub import MAIN, ServerCopy, Target
from hub_upload.inspection import built_auto_map, inspect_files, pickled_files
from hub_upload.model_card import published_card
from hub_upload.provenance import (
    CARD,
    PROVENANCE,
    checked_provenance,
    is_same_model,
    read_provenance,
    source_name,
)
from hub_upload.remote_code import foreign_code, is_configuration, loaded_instead


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
    not_sent: list[str] = field(default_factory=list)  # what lies in the folder and was not built


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

    Raises:
        ValueError: if the folder is not what the build wrote, or the commit would replace something else, or leave a
            repository that `verify` would not pass.
        HubFailure: if the Hub does not do what is asked.
    """
    folder = Path(folder)
    if create_pr and revision not in (None, MAIN):
        raise ValueError(
            f"revision={revision!r} with create_pr=True: the Hub opens pull requests to main; leave one out"
        )
    provenance = read_unchanged(folder)
    not_sent = not_written(folder, provenance)
    auto_map = built_auto_map(folder)
    branch = revision or MAIN
    client = hub.hub_client(token)
    url = f"{constants.ENDPOINT}/{repo_id}"
    with hub.explained(f"Publishing to {repo_id}", token):
        source = provenance["base"]
        copyable = hub.copyable_files(client, source.get("repo_id"), source.get("revision"))

        def planned() -> tuple[Target, list[PlannedFile]]:
            target = hub.target_state(client, repo_id, branch)
            if private and target.exists and not target.private:
                raise ValueError(
                    f"private=True, but {repo_id} exists and is public: make it private in its settings first, or "
                    "choose another repo id"
                )
            earlier = earlier_provenance(client, repo_id, target)
            plan = make_plan(folder, repo_id, provenance, target.files, copyable, earlier)
            if not create_pr:
                refuse_replacing(client, repo_id, target, plan, provenance, earlier)
            refuse_leftovers(client, repo_id, target, plan, auto_map)
            return target, plan

        target, plan = planned()
        if dry_run:
            return Publication(repo_id, url, target.head, None, plan, dry_run=True, not_sent=not_sent)
        if not target.exists:
            hub.create_repository(client, repo_id, private)
            target, plan = planned()  # again: somebody else may have created it between the two calls
        head = target.head or hub.create_branch(client, repo_id, branch)
        if all(entry.action == "keep" for entry in plan):
            return Publication(repo_id, url, head, None, plan, not_sent=not_sent)
        by_action = {action: [entry.path for entry in plan if entry.action == action] for action in ("add", "copy")}
        hashes = provenance["files"]
        commit = hub.commit(
            client,
            repo_id,
            add={path: published_content(folder / path, repo_id) for path in by_action["add"]},
            copy={
                path: ServerCopy(source["repo_id"], source["revision"], copyable[hashes[path]], folder / path)
                for path in by_action["copy"]
            },
            delete=[entry.path for entry in plan if entry.action == "delete"],
            revision=branch,
            commit_message=commit_message or "Publish a LLaVA with recoverable visual token compression",
            create_pr=create_pr,
            parent_commit=head,
        )
    return Publication(repo_id, url, commit.oid, commit.pr_url, plan, not_sent=not_sent)


# -------------------------------------------------------------------------------------------------- the built folder


def read_unchanged(folder: Path) -> dict[str, Any]:
    """The provenance of `folder`, which must be what the build wrote and pass what `verify` sees without loading."""
    provenance = read_provenance(folder)
    if "config.json" not in provenance["files"]:
        raise ValueError(f"{folder} was built by an earlier version, which did not list all files: build it again")
    for name in (*provenance["files"], CARD, PROVENANCE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing since the folder was built: build it again")
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / name} is a link to a place outside of the folder: build it again")
    failed = [check for check in inspect_files(folder) if not check.passed]
    if failed:
        found = "; ".join(f"{check.name}: {check.detail}" for check in failed)
        raise ValueError(
            f"{folder} changed since it was built, and `python -m hub_upload verify` would not pass it ({found}). Take "
            "out what was added, or build it again; publish a changed model with its own push_to_hub"
        )
    return provenance


def not_written(folder: Path, provenance: dict[str, Any]) -> list[str]:
    """What lies in `folder` and was not built, and so stays there; a folder is one entry."""
    written = {*provenance["files"], CARD, PROVENANCE}
    folders = {Path(name).parent for name in written}
    found = []
    for inside in sorted(folders):
        for path in (folder / inside).iterdir():
            name = path.relative_to(folder)
            if name.as_posix() not in written and name not in folders:
                found.append(name.as_posix() + ("/" if path.is_dir() and not path.is_symlink() else ""))
    return sorted(found)


def published_content(path: Path, repo_id: str) -> Path | bytes:
    """What is sent for a file: the file itself, but the card with the repository's name filled in."""
    if path.name != CARD:
        return path
    return published_card(path.read_text(encoding="utf-8"), repo_id).encode()


# ------------------------------------------------------------------------------------------------------------ the plan


def make_plan(
    folder: Path,
    repo_id: str,
    provenance: dict[str, Any],
    remote: dict[str, RepoFile],
    copyable: dict[str, str],
    earlier: dict[str, Any] | None,
) -> list[PlannedFile]:
    """What happens to each file that this build or an earlier publication wrote; to others, nothing.

    Args:
        remote: the target's files by path.
        copyable: paths in the base's repository by SHA-256.
        earlier: the provenance of what the target holds.
    """
    hashes = provenance["files"]
    written = sorted({*hashes, CARD, PROVENANCE})
    plan = []
    for name in written:
        path = folder / name
        if _is_unchanged(published_content(path, repo_id), hashes.get(name), remote.get(name)):
            action = "keep"
        else:
            action = "copy" if hashes.get(name) in copyable else "add"
        plan.append(PlannedFile(name, action, path.stat().st_size))
    stale = {*(earlier or {}).get("files", {})} & remote.keys() - {*written}
    return plan + [PlannedFile(path, "delete", remote[path].size) for path in sorted(stale)]


def _is_unchanged(content: Path | bytes, digest: str | None, remote: RepoFile | None) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None and isinstance(content, Path):
        return remote.lfs.sha256 == (digest or file_sha256(content))
    content = content.read_bytes() if isinstance(content, Path) else content
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---------------------------------------------------------------------------------------------------------- the target


def earlier_provenance(client: HfApi, repo_id: str, target: Target) -> dict[str, Any] | None:
    """What the target says of itself, if this tool published it."""
    if PROVENANCE not in target.files:
        return None
    content = _parsed(hub.read_text(client, repo_id, PROVENANCE, target.start))
    try:
        return checked_provenance(content if isinstance(content, dict) else {}, repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r}: {error}; or choose another repo id") from None


def _parsed(text: str) -> Any:
    """The JSON in `text`, or None."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None


def refuse_replacing(
    client: HfApi,
    repo_id: str,
    target: Target,
    plan: list[PlannedFile],
    provenance: dict[str, Any],
    earlier: dict[str, Any] | None,
) -> None:
    """A repository is updated only if it holds the same model, or none; a pull request may propose anything."""
    remedy = "Choose another repo id, or propose the replacement with --create-pr"
    if earlier is None:
        replaced = [entry.path for entry in plan if entry.action != "keep" and entry.path in target.files]
        if replaced == [CARD] and _has_no_text(hub.read_text(client, repo_id, CARD, target.start)):
            return  # the website makes such a card when it makes a repository
        if replaced:
            raise ValueError(
                f"repo_id={repo_id!r} holds a model that this tool did not publish; committing would replace it "
                f"({', '.join(replaced)}). {remedy}"
            )
    elif not is_same_model(earlier, provenance):
        raise ValueError(
            f"repo_id={repo_id!r} holds a model built from {source_name(earlier['base'])!r}, and this folder was built "
            f"from {source_name(provenance['base'])!r}; committing would replace the one by the other. {remedy}"
        )


def _has_no_text(card: str) -> bool:
    """Whether a card is metadata alone."""
    start, _, rest = card.partition("---\n")
    return not start.strip() and not rest.partition("---")[2].strip()


def refuse_leftovers(
    client: HfApi, repo_id: str, target: Target, plan: list[PlannedFile], auto_map: dict[str, str]
) -> None:
    """Other people's files stay on the target, so none may be loaded or run in place of what is published."""
    left = target.files.keys() - {entry.path for entry in plan}
    wrong = {*loaded_instead(left), *pickled_files(left, is_published=True)}
    for path in filter(is_configuration, left - wrong):
        settings = _parsed(hub.read_text(client, repo_id, path, target.start))
        wrong |= {f"{path} ({entry})" for entry in foreign_code(settings, auto_map)}
        wrong |= set() if isinstance(settings, dict) else {f"{path} (not a JSON object)"}
    if wrong:
        raise ValueError(
            f"repo_id={repo_id!r} holds files that would be loaded or run in place of this model, and that this tool "
            f"did not publish: {', '.join(sorted(wrong))}. Remove them there, or choose another repo id"
        )
