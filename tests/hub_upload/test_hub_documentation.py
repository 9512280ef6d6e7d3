"""Every command in docs/publishing.md runs, word for word, against a Hub on loopback that has tiny stand-ins."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command_line import ROOT
from loopback_hub import LoopbackHub


BASE, CLIP, AUTHOR = "llava-hf/llava-1.5-7b-hf", "openai/clip-vit-large-patch14-336", "SFconvertbot"
NEXT_BASE = "llava-hf/llava-v1.6-mistral-7b-hf"


def commands() -> list[list[str]]:
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)).splitlines()
    lines = [line.replace("refs/pr/N", "refs/pr/1").replace("your-name/", "writer/") for line in lines]
    lines = [line for line in lines if line]
    others = {line for line in lines if not line.startswith("python -m hub_upload ")}
    # The second at a small size in tests/benchmarks/test_full_size_road.py.
    assert others == {"hf auth login", "python -m benchmarks.full_size_road --out output/full_size_road"}
    return [shlex.split(line)[3:] for line in lines if line not in others]


def run_in_one_process(hub: LoopbackHub, folder: Path, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Status and output of each command line; one process, as importing torch takes longer than the commands."""
    script = """
import contextlib, io, json, sys
from hub_upload.__main__ import main
runs = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        status = main(command)
    runs.append((status, output.getvalue()))
print(json.dumps(runs))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)],
        env={**hub.environment(folder / "home"), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_commands_of_the_page(hub, base, clip, pictures, tmp_path):
    tiny.save_tiny_llava(tmp_path / "next", clip, family="llava_next", language_model="mistral")
    hub.add_folder(BASE, base)
    hub.add_folder(NEXT_BASE, tmp_path / "next")
    repo = hub.add_folder(CLIP, clip)
    safetensors = repo.commits[repo.refs["main"]].files
    repo.refs["refs/pr/1"] = repo.refs["main"]
    pickled = {name: blob for name, blob in safetensors.items() if not name.endswith(".safetensors")}
    repo.add_commit("main", {**pickled, "pytorch_model.bin": safetensors["model.safetensors"]}, "as published")
    repo.discussions.append(
        {
            "num": 1,
            "title": "Adding `safetensors` variant of this model",
            "author": {"name": AUTHOR},
            "createdAt": "2026-01-01T00:00:00.000Z",
            "status": "open",
            "repo": {"name": CLIP, "type": "model"},
            "isPullRequest": True,
        }
    )
    pictures[0].save(tmp_path / "photo.jpg")

    without_revision = ["build", BASE, "--output", "llava-1.5-7b-compressed"]
    runs = run_in_one_process(hub, tmp_path, [without_revision, *commands()])
    status, output = runs.pop(0)
    assert status == 1 and "--clip-revision refs/pr/1" in output
    for command, (status, output) in zip(commands(), runs):
        assert status == 0, f"{command}\n{output}"
        if command[0] == "push":  # built and illustrated above: the same things are taken again
            assert "Built llava-1.5-7b-compressed" in output
    built = tmp_path / "llava-1.5-7b-compressed"
    assert json.loads((built / "config.json").read_text())["text_relevance"] == "negated"
    assert (tmp_path / "llava-v1.6-mistral-7b-compressed" / "modeling_recoverable_llava_next.py").is_file()
    published = hub.main_files("writer/llava-1.5-7b-compressed")
    assert hub.repos["writer/llava-1.5-7b-compressed"].private
    assert "recovery_overlay.png" in published
    assert b"What colour is the car?" in published["README.md"].content


def test_every_option_of_publishing_is_explained():
    page = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
    from hub_upload.__main__ import parser
    from hub_upload.build import RECOVERY_SETTINGS

    recovery = {f"--{name.replace('_', '-')}" for name in RECOVERY_SETTINGS}
    for command in parser()._subparsers._group_actions[0].choices.values():
        for action in command._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help" and option not in recovery:
                    assert option in page, option
