"""The command line of hub_upload in a process of its own, and names on the Hub that the tests use."""

from __future__ import annotations

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
