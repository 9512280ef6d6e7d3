"""What must hold before a version is tagged. `make release-check` says what does not; CONTRIBUTING.md has the steps."""

import datetime
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]


def version_of(root: Path) -> str:
    """The version stands in the package alone; pyproject.toml reads it from there."""
    text = (root / "recoverable_llava/__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def version_stands_once(root: Path) -> Iterator[str]:
    if not re.fullmatch(r"\d+\.\d+\.\d+", version_of(root)):
        yield f"recoverable_llava.__version__ is {version_of(root)!r}: three numbers make a version."
    if re.search(r"^version = \"", (root / "pyproject.toml").read_text(), re.MULTILINE):
        yield "pyproject.toml has a version of its own: it must come from recoverable_llava.__version__."


def changelog_is_of_this_version(root: Path) -> Iterator[str]:
    heading = re.findall(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    version, _, date = heading.partition(", ")
    if version != version_of(root):
        yield f"CHANGELOG.md begins with {version}, the package is {version_of(root)}."
    try:
        is_future = datetime.date.fromisoformat(date) > datetime.date.today()
    except ValueError:
        yield f"CHANGELOG.md says {heading!r}: write the day of the release, as in '{version}, 2026-01-31'."
        return
    if is_future:
        yield f"CHANGELOG.md dates the release {date}, which is not yet."


def checkpoints_have_this_code(root: Path) -> Iterator[str]:
    for file in sorted((root / "checkpoints").glob("*/*.py")):
        if file.read_bytes() != (root / "recoverable_llava" / file.name).read_bytes():
            yield f"{file.relative_to(root)} is not that of the package: run `make checkpoint-code`."


def git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def commit_is_ready(root: Path) -> Iterator[str]:
    if changed := git(root, "status", "--porcelain"):
        yield f"Not everything is committed:\n{changed}"
    if git(root, "tag", "--list", f"v{version_of(root)}"):
        yield f"v{version_of(root)} is tagged already: raise recoverable_llava.__version__."


def documentation_builds(root: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode:
        yield f"The documentation does not build:\n{result.stderr}"


def wheel_is_complete(root: Path) -> Iterator[str]:
    names = git(root, "ls-files").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        # Elsewhere: what an earlier build left here would go into the wheel.
        source = Path(folder) / "source"
        for name in names:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, source / name)
        options = ["-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
        command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            yield f"The package does not build:\n{result.stderr}"
            return
        (wheel,) = Path(folder).glob("*.whl")
        packed = set(zipfile.ZipFile(wheel).namelist())
    if version_of(root) not in wheel.name:
        yield f"{wheel.name} is not of version {version_of(root)}."
    for name in names:
        if name.startswith(("recoverable_llava/", "hub_upload/")) and name not in packed:
            yield f"{wheel.name} lacks {name}."


CHECKS: list[Callable[[Path], Iterator[str]]] = [
    version_stands_once,
    changelog_is_of_this_version,
    checkpoints_have_this_code,
    commit_is_ready,
    documentation_builds,
    wheel_is_complete,
]


def main() -> int:
    problems = []
    for check in CHECKS:
        found = list(check(ROOT))
        print("no " if found else "yes", check.__name__.replace("_", " "))
        problems += found
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
