"""The Python files that the Hub executes: which they are, and the page that names them with their hashes.

The Hub loads remote code from one flat folder and follows `from .sibling import name`; the list is found the same way,
from the files that `auto_map` points to, so that it cannot miss a file or carry one that is not executed.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from hub_upload.checkpoint import file_sha256


PAGE = "trust_remote_code.md"
HASH_LINE = re.compile(r"^([0-9a-f]{64}) [ *](\S+\.py)$", flags=re.MULTILINE)


SETTINGS = "recovery_settings.py"


def package_folder() -> Path:
    """Found without importing the package, which would import torch for commands that only send files."""
    specification = importlib.util.find_spec("recoverable_llava")
    if specification is None or specification.origin is None:
        raise ImportError(
            "hub_upload needs the package recoverable_llava: install it, or run from the repository's root"
        )
    return Path(specification.origin).parent


def configuration_fields() -> dict[str, type]:
    """Every recovery setting and its type, read from the source: no second list to keep."""
    source = ast.parse((package_folder() / SETTINGS).read_text(encoding="utf-8"))
    classes = {node.name: node for node in source.body if isinstance(node, ast.ClassDef)}
    kinds = {"bool": bool, "int": int, "float": float, "str": str}
    annotated = [node for node in classes["RecoverySettingsMixin"].body if isinstance(node, ast.AnnAssign)]
    types = {ast.unparse(node.target): ast.unparse(node.annotation).split(" | ")[0] for node in annotated}
    return {name: kinds[kind] for name, kind in types.items()}


def executed_files(folder: Path) -> list[str]:
    """Names of the files that `auto_map` and their sibling imports reach in `folder`."""
    from transformers.dynamic_module_utils import get_relative_import_files

    from recoverable_llava.configuration_recoverable_llava import AUTO_MAP

    files: set[str] = set()
    for module in {reference.split(".")[0] for reference in AUTO_MAP.values()}:
        entry = folder / f"{module}.py"
        if not entry.is_file():
            raise ValueError(f"{entry} is missing: auto_map names it. Build the folder again")
        files |= {entry.name, *(Path(path).name for path in get_relative_import_files(entry))}
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


def remote_code_page(folder: Path) -> str:
    """Markdown; its code block is what `sha256sum --check` reads."""
    files = executed_files(folder)
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
    return {name: digest for digest, name in HASH_LINE.findall(page)}
