"""Each check of `make release-check` finds what it is there for."""

import datetime
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci/release_check.py")
release_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_check)


@pytest.fixture
def release(tmp_path):
    """A small repository that is ready."""
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.3, 2026-01-31\n\n- A change.\n\n## 1.2.2, 2025-01-31\n")
    (tmp_path / "README.md").write_text("A package.\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: pages\nstrict: true\nvalidation: {links: {not_found: warn}}\n")
    (tmp_path / ".gitignore").write_text("build/\n*.egg-info/\n")
    for folder in ("recoverable_llava", "hub_upload", "checkpoints/tiny", "checkpoints/other", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "docs/index.md").write_text("# Pages\n")
    (tmp_path / "recoverable_llava/__init__.py").write_text('__version__ = "1.2.3"\n')
    for folder in ("recoverable_llava", "checkpoints/tiny", "checkpoints/other"):
        (tmp_path / folder / "modeling.py").write_text("x = 1\n")
    (tmp_path / "hub_upload/__init__.py").touch()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--message", "a")
    return tmp_path


def git(folder, *command):
    subprocess.run(["git", *command], cwd=folder, check=True)


def problems(check, folder):
    return list(getattr(release_check, check)(folder))


def test_nothing_is_said_of_what_is_ready(release):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    assert [list(check(release)) for check in release_check.CHECKS] == [[]] * len(release_check.CHECKS)


def tomorrow():
    return (datetime.date.today() + datetime.timedelta(days=1)).isoformat()


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "message"),
    [
        ("version_stands_once", "recoverable_llava/__init__.py", "1.2.3", "1.2", "'1.2': three numbers"),
        ("version_stands_once", "pyproject.toml", "[project]", '[project]\nversion = "1.2.3"', "a version of its own"),
        ("changelog_is_of_this_version", "CHANGELOG.md", "1.2.3, ", "1.2.4, ", "begins with 1.2.4"),
        ("changelog_is_of_this_version", "CHANGELOG.md", ", 2026-01-31", ", unreleased", "the day of the release"),
        ("changelog_is_of_this_version", "CHANGELOG.md", "2026-01-31", tomorrow(), "not yet"),
        ("checkpoints_have_this_code", "checkpoints/tiny/modeling.py", "1", "2", "make checkpoint-code"),
        ("checkpoints_have_this_code", "checkpoints/other/modeling.py", "1", "2", "checkpoints/other/modeling.py is"),
        ("commit_is_ready", "README.md", "A", "The", "Not everything is committed"),
        ("documentation_builds", "docs/index.md", "# Pages", "[a page](missing.md)", "missing.md"),
        ("wheel_is_complete", "pyproject.toml", '"hub_upload*", ', "", "lacks hub_upload/__init__.py"),
        ("wheel_is_complete", "pyproject.toml", "[project]", "[project", "does not build"),
    ],
)
def test_what_is_not_ready_is_named(release, check, file, old, new, message):
    if check == "documentation_builds":
        pytest.importorskip("mkdocs", reason="needs the extra docs")
    text = (release / file).read_text()
    assert old in text
    (release / file).write_text(text.replace(old, new, 1))
    (problem,) = problems(check, release)
    assert message in problem


def test_a_version_is_tagged_once(release):
    git(release, "tag", "v1.2.3")
    (problem,) = problems("commit_is_ready", release)
    assert "v1.2.3 is tagged already" in problem
