"""The command line of hub_upload in a process of its own, and names on the Hub that the tests use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from loopback_hub import LoopbackHub


ROOT = Path(__file__).parents[2]
BASE_ID, CLIP_ID, REPO_ID = "maker/llava-tiny", "maker/clip-tiny", "writer/llava-tiny-compressed"


def run_hub_upload(
    hub: LoopbackHub, folder: Path, *arguments: object, token: str | None = "hf_writer", **environment: str
) -> subprocess.CompletedProcess:
    """`python -m hub_upload ...` as a user runs it in `folder`, against the Hub on loopback."""
    return subprocess.run(
        [sys.executable, "-m", "hub_upload", *map(str, arguments)],
        env={**hub.environment(folder / "home", token), "PYTHONPATH": str(ROOT), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


WORKER = """
import contextlib, io, json, sys
from hub_upload.__main__ import main
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        status = main(json.loads(line))
    print(json.dumps([status, output.getvalue()]), flush=True)
"""


class CommandWorker:
    """Runs one command line after the other in one process, as starting one takes longer than most commands."""

    def __init__(self, hub: LoopbackHub, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env={**hub.environment(folder / "home"), "PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> CommandWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def __call__(self, *arguments: object) -> tuple[int, str]:
        """Status and output of `python -m hub_upload` with these arguments."""
        self.process.stdin.write(json.dumps([*map(str, arguments)]) + "\n")
        self.process.stdin.flush()
        status, output = json.loads(self.process.stdout.readline())
        return status, output
