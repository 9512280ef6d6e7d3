"""What a built folder says of itself: `provenance.json` names its sources and every file that the build wrote."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from hub_upload.checkpoint import read_json


PROVENANCE = "provenance.json"
# The one file that people edit afterwards; all others are listed with their SHA-256.
CARD = "README.md"
# Drawn into the folder after the build, by `illustrate`, which adds it to the list.
OVERLAY = "recovery_overlay.png"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of `provenance.json` in `folder`; ValueError if `build` cannot have written it."""
    if not (folder / PROVENANCE).is_file():
        raise ValueError(
            f"folder={str(folder)!r} has no {PROVENANCE}: pass a folder made by `python -m hub_upload build`"
        )
    return checked_provenance(read_json(folder / PROVENANCE), str(folder))


def checked_provenance(provenance: dict[str, Any], where: str) -> dict[str, Any]:
    """`provenance`, whose names lie inside the folder and whose fields have the types that the build writes."""
    files, sources = provenance.get("files"), [provenance.get("base"), provenance.get("clip")]
    if not isinstance(files, dict) or not all(map(_is_inside, files)) or not all(map(_is_sha256, files.values())):
        raise ValueError(f"{PROVENANCE} of {where} lists no files with their SHA-256: it is damaged, build it again")
    if not all(isinstance(source, dict) and source_name(source) for source in sources):
        raise ValueError(f"{PROVENANCE} of {where} names no base or no CLIP: it is damaged, build it again")
    return provenance


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def source_name(source: dict[str, Any]) -> str | None:
    """The repo id of a base or a CLIP, or the name of its folder."""
    name = source.get("repo_id") or source.get("folder")
    return name if isinstance(name, str) else None


def is_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both were built from the base of one name: the same repository, at any commit, or a folder so called."""
    return all(one["base"].get(key) == other["base"].get(key) for key in ("repo_id", "folder"))


def is_same_build(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both list the same sources, settings and files; a picture drawn since does not count."""

    def without_picture(provenance: dict[str, Any]) -> dict[str, Any]:
        return {**provenance, "files": {name: sha for name, sha in provenance["files"].items() if name != OVERLAY}}

    return without_picture(one) == without_picture(other)
