"""README and documentation say only what runs: their snippets and commands, links, messages and tables are checked.

Pages on publishing, evaluation and so on are tested beside what they are about.
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers import LlavaConfig, dynamic_module_utils

from recoverable_llava import RecoverableLlavaConfig
from recoverable_llava.tools.command_line import main


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_PAGES = [
    page
    for page in PAGES
    if page.stem not in ("publishing", "evaluation", "ablations", "performance", "checkpoint")
]  # fmt: skip
# Not run: they need the Hub, a GPU, or the address of a repository that a test cannot know.
NOT_RUN = (
    "git clone <this repository>",
    "hf upload OWNER/NAME",
    "source .venv/bin/activate",
    'pip install -e ".[vllm]"',
    "vllm serve OWNER/NAME",
)

BUILT = "llava-1.5-7b-compressed"  # what README builds; here a tiny one stands for it


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def with_blocks(language):
    pages = [page for page in OWN_PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=[page.stem for page in pages])


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone's root, in which a snippet may write."""
    for name in ("demo", "checkpoints", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@with_blocks("python")
def test_snippets_run_one_after_the_other(page, clone):
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_swap_in_the_readme_runs(clone, repo_folder):
    (clone / BUILT).symlink_to(repo_folder)
    (diff,) = blocks(ROOT / "README.md", "diff")
    new = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    old = [line[1:] for line in diff.splitlines() if line.startswith("-")]
    assert len(old) == len(new) == 2
    assert all("llava-hf/llava-1.5-7b-hf" in line for line in old) and all(BUILT in line for line in new)
    exec("from transformers import AutoModelForImageTextToText, AutoProcessor\n" + "\n".join(new), {})


@with_blocks("bash")
def test_commands_are_those_that_exist(page, clone, repo_folder, pictures):
    """`recoverable-llava` is run here; scripts and modules have tests of their own, so here they must only be there."""
    (clone / BUILT).symlink_to(repo_folder)
    pictures[0].save(clone / "photo.jpg")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "\n".join(blocks(page, "bash")).splitlines():
        for command in filter(None, line.split("#")[0].split("&&")):
            words = shlex.split(command)
            if command.strip().startswith(NOT_RUN) or words[0] == "cd":
                continue
            if words[0] == "recoverable-llava":
                assert main(words[1:]) == 0, command
            elif words[0] == "make":
                assert set(words[1:]) <= targets, command
            elif words[:2] == ["python", "-m"]:
                assert importlib.util.find_spec(words[2]), command
            elif words[0] == ".ci/run":
                assert (ROOT / words[0]).is_file()
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), command
            else:
                pytest.fail(f"{page.name} has a command that no test knows: {command}")


def test_three_commands_to_a_llava_of_ones_own(tmp_path, llava_folder, clip_folder, pictures):
    """README's build, verify and ask, as written but for the names of the two models."""
    (road,) = (block for block in blocks(ROOT / "README.md", "bash") if "hub_upload build" in block)
    commands = road.strip().splitlines()
    assert len(commands) == 3
    pictures[0].save(tmp_path / "photo.jpg")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands:
        command = command.replace("llava-hf/llava-1.5-7b-hf", f"{llava_folder} --clip {clip_folder}")
        command = command.replace(" --clip-revision refs/pr/N", "")
        command = command.replace("recoverable-llava ask", "python -m recoverable_llava.tools.command_line ask")
        words = [sys.executable, *shlex.split(command)[1:]]
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "kept.png").is_file() and "of 36 visual tokens" in result.stderr


def test_newcomers_walk_from_an_empty_clone(tmp_path):
    """README's first commands, in a copy of the tracked files alone; the environment is the one that runs this test."""
    clone, environment = tmp_path / "clone", Path(sys.prefix)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    (first,) = (block for block in blocks(ROOT / "README.md", "bash") if "git clone" in block)
    lines = [line.split("#")[0].strip() for line in first.strip().splitlines()]
    assert lines[1:] == ["make demo", "source .venv/bin/activate", "make app"]

    (clone / ".venv").symlink_to(environment)
    done = " ".join(f"-o .venv/{name}" for name in (".installed", ".installed-app"))  # installing needs the network

    def bash(script):
        command = ["bash", "-ec", script]
        variables = {**os.environ, "PYTHONPATH": str(clone)}
        return subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True, timeout=500)

    demo = bash(f"make {done} demo")
    assert demo.returncode == 0 and "RAIN" in demo.stdout, demo.stderr
    assert (clone / "output" / "demo.png").is_file()
    asked = bash('source .venv/bin/activate; recoverable-llava ask demo/scene.png "What word is under the lemon?"')
    assert (asked.returncode, asked.stdout.strip()) == (0, "RAIN"), asked.stderr
    assert "drawn scenes only" not in asked.stderr
    app = bash(f"make -n {done} app")
    assert app.returncode == 0 and "-m app" in app.stdout


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    configuration = (tmp_path / "site/configuration/index.html").read_text()
    assert "visual_token_budget" in configuration and "fields of RecoverableLlavaConfig" not in configuration


def test_every_added_field_is_in_the_reference():
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs/scripts/configuration.py")
    configuration = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(configuration)
    documented = re.findall(r"^\| `(\w+)`", configuration.fields_table(), re.MULTILINE)
    stock = set(inspect.signature(LlavaConfig).parameters)
    added = [name for name in inspect.signature(RecoverableLlavaConfig).parameters if name not in stock]
    assert documented == added
    for name in documented:
        default = re.search(rf"^\| `{name}` \|.*?<br>default (\S+)", configuration.fields_table(), re.MULTILINE)
        expected = getattr(RecoverableLlavaConfig, name)
        assert expected is None if default is None else ast.literal_eval(default[1].strip("`")) == expected


def test_troubleshooting_quotes_real_messages():
    sources = [*(ROOT / "recoverable_llava").rglob("*.py"), Path(dynamic_module_utils.__file__)]
    sources.append(Path(transformers.__file__).parent / "generation" / "utils.py")
    constants = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                constants.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(node.value)
    text = "\n".join(constants).replace("`", "'")
    quoted = re.findall(r"\*\*`(.+?)`\*\*", (ROOT / "docs/troubleshooting.md").read_text())
    assert len(quoted) > 10
    missing = [message for message in quoted if message not in text]
    assert not missing


def test_the_table_in_the_readme_repeats_what_was_measured():
    measured = (ROOT / "docs/performance.md").read_text()
    section = (ROOT / "README.md").read_text().split("## What it saves")[1].split("##")[0]
    figures = re.findall(r"([\d.]+) (?:ms|GB|×)", section)
    assert len(figures) > 10
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", measured)] == []


def test_versions_are_those_that_are_tested():
    page, makefile = (ROOT / "docs/compatibility.md").read_text(), (ROOT / "Makefile").read_text()
    (pinned,) = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    (lowest,) = re.findall(r'"transformers>=(\S+)"', (ROOT / "pyproject.toml").read_text())
    tested = dict(re.findall(r"^test-(\w+): \$\(VENV\)-([\d.]+)/", makefile, re.MULTILINE))
    assert tested["lowest"] == f"{lowest}.0"
    assert f"{tested['lowest']} (the lowest declared), {tested['between']} (the model alone), {pinned} and" in page
