"""A checkpoint to build from, and the part of it that may enter a published folder.

A base can be anybody's folder: with links to other places of this disk, pipes, scripts, and configurations that name
code on the Hub. So nothing but its weights is read from where it lies: the files that a tokenizer, a processor and a
card are made of are copied first, regular files of the base alone, and lose every entry that would run code.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from hub_upload.checkpoint import PICKLED_WEIGHTS, read_json
from hub_upload.provenance import CARD
from hub_upload.remote_code import is_configuration, without_code


LICENSE_PATTERNS = ("LICENSE*", "USE_POLICY*", "NOTICE*")
SOURCE_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", *LICENSE_PATTERNS, CARD)
# A license is a text: nothing that a loader or a Python would read may come in under its name.
NOT_A_TEXT = ("*.py", "*.json", "*.jinja", "*.safetensors", *PICKLED_WEIGHTS)


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


def is_license(name: str) -> bool:
    return _matches(name, LICENSE_PATTERNS) and not _matches(name, NOT_A_TEXT) and name.isprintable()


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def copy_without_weights(source: Source, target: Path) -> Path:
    """Copies what `source` holds besides weights to the new folder `target`, and returns `target`.

    Only regular files directly in the source are copied, or links to such. In the Hub's cache every file is a link,
    to a place inside the repository's own folder there. A link that leads elsewhere is left out with a warning: its
    content would be published.
    """
    target.mkdir()
    inside = [source.folder.resolve()]
    if source.folder.parent.name == "snapshots" and source.folder.parents[1].name.startswith("models--"):
        inside.append((source.folder.parents[1] / "blobs").resolve())
    for path in sorted(source.folder.iterdir()):
        if not _matches(path.name, SOURCE_PATTERNS) or not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(folder) for folder in inside):
            warnings.warn(
                f"{path} is a link to a place outside of its checkpoint and is left out, as what lies there would be "
                "published. Put a copy of the file in its place if it belongs to the checkpoint",
                stacklevel=2,
            )
            continue
        content = read_json(path) if is_configuration(path.name) else None
        if content is not None and (cleaned := without_code(content)) != content:
            (target / path.name).write_text(json.dumps(cleaned, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)
    return target
