"""What can be known about a built folder or a downloaded repository by looking at its files: nothing is executed.

`verify` looks before it loads anything, and `publish` before it sends anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hub_upload.checkpoint import PICKLED_WEIGHTS, files_sha256, read_checkpoint, read_json
from hub_upload.provenance import read_provenance
from hub_upload.remote_code import (
    PAGE,
    executed_files,
    foreign_code,
    is_configuration,
    listed_hashes,
    loaded_instead,
    package_auto_map,
)


CONFIG, PROCESSOR_CONFIG = "config.json", "processor_config.json"


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def _check(name: str, wrong: Iterable[str], otherwise: str) -> Check:
    wrong = sorted(set(wrong))
    return Check(name, not wrong, ", ".join(wrong) or otherwise)


def inspect_files(folder: Path, is_published: bool = False) -> list[Check]:
    """Looks at the files of `folder`, a build or, with `is_published`, a download of one.

    A published repository may hold more than was built, such as examples or an adapter in a folder of its own. Of a
    build, no other Python file is accepted.

    Raises:
        ValueError: where a file that is needed is missing or cannot be read.
    """
    provenance = read_provenance(folder)
    listed = read_listed_hashes(folder)
    expected = {**provenance["files"], **listed}
    present = [name for name in expected if (folder / name).is_file()]
    actual = files_sha256(folder, present, "Hashing files")
    differing = {name for name in expected if actual.get(name) != expected[name]}
    weights = {name for name in expected if name.endswith((".safetensors", ".safetensors.index.json"))}
    settings = expected.keys() - listed.keys() - weights
    paths = visible_files(folder)
    others = [path for path in paths if path not in expected]
    auto_map = built_auto_map(folder)
    reached = {name for name in executed_files(folder, auto_map) if name not in listed}
    own_code = [] if is_published else [path for path in others if path.endswith(".py")]
    pickles = pickled_files(others if is_published else paths, is_published)
    foreign = {path: foreign_code(read_json(folder / path), auto_map) for path in paths if is_configuration(path)}
    tensors = len(read_checkpoint(folder).tensors)
    return [
        _check(
            "code equals trust_remote_code.md",
            {*differing & listed.keys(), *reached, *own_code},
            f"{len(listed)} files",
        ),
        _check(
            "no other code is named",
            [f"{path}: {entry}" for path in foreign for entry in foreign[path]],
            "in any configuration",
        ),
        _check("weights equal provenance.json", differing & weights, f"{len(weights)} files"),
        _check("settings equal provenance.json", differing & settings, f"{len(settings)} files"),
        _check("index and shards agree", [], f"{tensors} tensors"),
        _check("nothing else is loaded", loaded_instead(others), "by from_pretrained"),
        _check("no pickles", pickles, "safetensors only"),
        _check("auto_map is complete", missing_classes(folder, auto_map), f"{len(auto_map)} classes"),
    ]


def read_listed_hashes(folder: Path) -> dict[str, str]:
    if not (folder / PAGE).is_file():
        raise ValueError(f"{folder} has no {PAGE}: it was not built by `python -m hub_upload build`")
    return listed_hashes((folder / PAGE).read_text(encoding="utf-8", errors="replace"))


def visible_files(folder: Path) -> list[str]:
    """Paths in `folder` of all that is no folder, except inside hidden folders such as .git and .cache."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts[:-1]))


def pickled_files(paths: Iterable[str], is_published: bool) -> list[str]:
    """Files that can run code when read; in a published repository, those beside the model and not in other folders."""
    beside = [path for path in paths if not (is_published and "/" in path)]
    return [path for path in beside if any(fnmatch(path, pattern) for pattern in PICKLED_WEIGHTS)]


def built_auto_map(folder: Path) -> dict[str, str]:
    """AUTO_MAP of the family that the config.json in `folder` belongs to; ValueError if there is none."""
    model_type = str(read_json(folder / CONFIG).get("model_type"))
    try:
        return package_auto_map(model_type)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def missing_classes(folder: Path, auto_map: dict[str, str]) -> list[str]:
    """Classes in `auto_map` that the configurations in `folder` do not map to the package's files."""
    model_map, processor_map = (read_json(folder / name).get("auto_map") for name in (CONFIG, PROCESSOR_CONFIG))
    model_map, processor_map = (found if isinstance(found, dict) else {} for found in (model_map, processor_map))
    found = {**processor_map, **model_map}
    missing = [name for name, where in auto_map.items() if found.get(name) != where]
    return missing + ([] if "AutoProcessor" in processor_map else [f"AutoProcessor in {PROCESSOR_CONFIG}"])


def changed_code(folder: Path) -> list[str]:
    """Listed files that are not byte for byte those of the installed package."""
    from hub_upload.remote_code import package_folder

    own = {path.name: path for path in package_folder().glob("*.py")}
    listed = read_listed_hashes(folder)
    hashes = files_sha256(package_folder(), [name for name in listed if name in own], "Hashing code")
    return sorted(name for name, digest in listed.items() if hashes.get(name) != digest)


def table(checks: list[Check]) -> str:
    width = max(len(check.name) for check in checks)
    rows = [f"{check.name:<{width}}  {'ok    ' if check.passed else 'FAILED'}  {check.detail}" for check in checks]
    failed = sum(not check.passed for check in checks)
    return "\n".join([*rows, f"{failed} of {len(checks)} checks failed" if failed else "all checks passed"])
