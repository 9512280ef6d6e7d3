"""The Python files that the Hub executes: which they are, the page that names them with their hashes, and every other
way in which a repository could make transformers run code.

The Hub loads remote code from one flat folder and follows `from .sibling import name`; the list is found the same way,
from the files that the `auto_map` of a family points to, so that it cannot miss a file or carry one that is not
executed, such as another family's.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from hub_upload.checkpoint import file_sha256


PAGE = "trust_remote_code.md"
HASH_LINE = re.compile(r"^([0-9a-f]{64}) [ *]([\w.-]+\.py)$", flags=re.MULTILINE)


# One for each family, with the model_type of the stock configuration behind it.
CONFIGURATION = "configuration_recoverable_"
SETTINGS = "recovery_settings.py"

# Entries of a configuration, at any depth, that make transformers run code of a repository: classes, pipelines, a
# generation loop; and one that has another file read in place of config.json.
NAMES_CODE = {"auto_map", "custom_pipelines", "custom_generate", "configuration_files"}
# These name a compiled kernel on the Hub when they hold an "owner/name".
NAMES_KERNEL = {
    f"{prefix}{kind}_implementation{suffix}"
    for kind in ("attn", "experts")
    for prefix, suffix in (("", ""), ("_", ""), ("_", "_internal"))
}
# Read by from_pretrained before, or in place of, what a build writes: weights of another model, the base model that an
# adapter names, and a generation loop.
LOADED_INSTEAD = ("model.safetensors", "adapter_config.json", "custom_generate/*")
# Where from_pretrained looks for configurations.
CONFIGURATION_FOLDERS = ("", "question_tokenizer")


def package_folder() -> Path:
    """Found without importing the package, which would import torch for commands that only send files."""
    specification = importlib.util.find_spec("recoverable_llava")
    if specification is None or specification.origin is None:
        raise ImportError(
            "hub_upload needs the package recoverable_llava: install it, or run from the repository's root"
        )
    return Path(specification.origin).parent


@cache
def _parsed(name: str) -> ast.Module:
    return ast.parse((package_folder() / name).read_text(encoding="utf-8"))


def configuration_fields() -> dict[str, type]:
    """Every recovery setting and its type, read from the source: no second list to keep."""
    classes = {node.name: node for node in _parsed(SETTINGS).body if isinstance(node, ast.ClassDef)}
    kinds = {"bool": bool, "int": int, "float": float, "str": str}
    annotated = [node for node in classes["RecoverySettings"].body if isinstance(node, ast.AnnAssign)]
    types = {ast.unparse(node.target): ast.unparse(node.annotation).split(" | ")[0] for node in annotated}
    return {name: kinds[kind] for name, kind in types.items()}


def package_auto_map(model_type: str) -> dict[str, str]:
    """AUTO_MAP of the family that a `model_type`, stock's or ours, belongs to.

    Raises:
        ValueError: if there is no such family.
    """
    family = model_type.removeprefix("recoverable_")
    paths = sorted(package_folder().glob(f"{CONFIGURATION}*.py"))
    files = {path.stem.removeprefix(CONFIGURATION): path.name for path in paths}
    if family not in files:
        raise ValueError(f"model_type is {model_type!r}: the families that can be built are {(*files,)}")
    return _auto_map(files[family])


@cache
def _auto_map(configuration: str) -> dict[str, str]:
    """Read from the source, as importing it takes torch."""
    for node in _parsed(configuration).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AUTO_MAP":
            return dict(ast.literal_eval(node.value))
    raise ImportError(f"{configuration} holds no AUTO_MAP")


# -------------------------------------------------------------------------------------- code that is not the package's


def is_configuration(path: str) -> bool:
    """Whether from_pretrained would read the file at this path of a repository for settings."""
    folder, _, name = path.rpartition("/")
    return folder in CONFIGURATION_FOLDERS and fnmatch(name, "*config*.json") and not name.endswith(".index.json")


def without_code(settings: Any) -> Any:
    """A copy of a configuration without the entries that make transformers run code."""
    if isinstance(settings, list):
        return [without_code(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {name: without_code(value) for name, value in settings.items() if name not in NAMES_CODE | NAMES_KERNEL}


def foreign_code(settings: Any, auto_map: dict[str, str]) -> list[str]:
    """The entries of a configuration that would run other code than `auto_map` names, as `name=value`.

    Args:
        settings: what the configuration holds.
        auto_map: of the repository's family, as `package_auto_map` returns it; another family's classes are foreign.
    """
    if isinstance(settings, list):
        return [entry for value in settings for entry in foreign_code(value, auto_map)]
    if not isinstance(settings, dict):
        return []
    found = []
    for name, value in settings.items():
        if name == "auto_map":
            classes = value if isinstance(value, dict) else {name: value}
            found += [f"{key}={where}" for key, where in classes.items() if auto_map.get(key) != where]
        elif (name in NAMES_CODE and value) or (name in NAMES_KERNEL and "/" in str(value)):
            found.append(f"{name}={value}")
        else:
            found += foreign_code(value, auto_map)
    return found


def loaded_instead(paths: Iterable[str]) -> list[str]:
    """Those of the files in a repository that from_pretrained reads before, or in place of, what a build writes."""
    return sorted(path for path in paths if any(fnmatch(path, pattern) for pattern in LOADED_INSTEAD))


# --------------------------------------------------------------------------------------------- the package's own files


def executed_files(folder: Path, auto_map: dict[str, str]) -> list[str]:
    """Names of the files that `auto_map` and their sibling imports reach in `folder`."""
    from transformers.dynamic_module_utils import get_relative_import_files

    files: set[str] = set()
    for module in {reference.split(".")[0] for reference in auto_map.values()}:
        entry = folder / f"{module}.py"
        try:
            reached = [entry, *map(Path, get_relative_import_files(entry))]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{entry} or a file that it imports cannot be read ({error}): auto_map names it. Build the folder again"
            ) from None
        files |= {path.name for path in reached}
    return sorted(files)


def _purpose(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")


def imported_libraries(path: Path) -> list[str]:
    imports = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            imports.add(node.module.split(".")[0])
    return sorted(imports - {"__future__"})


def remote_code_page(folder: Path, auto_map: dict[str, str]) -> str:
    """Markdown; its code block is what `sha256sum --check` reads."""
    files = executed_files(folder, auto_map)
    hashes = "\n".join(f"{file_sha256(folder / name)}  {name}" for name in files)
    rows = "\n".join(
        f"| `{name}` | {_purpose(folder / name)} | {', '.join(imported_libraries(folder / name)) or 'nothing'} |"
        for name in files
    )
    return f"""# What `trust_remote_code=True` runs

Loading this repository with `trust_remote_code=True` executes these {len(files)} Python files and no others. They are
byte for byte the files of the package that built the repository. The weights are safetensors, which hold no code.

| file | what it does | imports |
|---|---|---|
{rows}

Their SHA-256:

```
{hashes}
```

To check a download, save that block as `hashes.txt` beside the files and run `sha256sum --check hashes.txt`, or run
`python -m hub_upload verify REPO_OR_FOLDER`. To make sure that code and weights never change under you, load a commit:
`from_pretrained(repo_id, revision="<commit>", trust_remote_code=True)`; code and weights are in the same repository, so
one revision pins both.
"""


def listed_hashes(page: str) -> dict[str, str]:
    """SHA-256 by name, as the page lists them."""
    return {name: digest for digest, name in HASH_LINE.findall(page)}
