"""Fixtures: a base as it is published, its CLIP, a built folder, a Hub on loopback, and the command line against it.

All of one family, LLaVA-1.5 where a test is not marked with `both_families`.
"""

import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
from command_line import run_hub_upload
from layouts import save_layout
from loopback_hub import LoopbackHub

from hub_upload.build import build


@pytest.fixture(scope="session")
def base(tmp_path_factory, llava_folder, family) -> Path:
    """A stock LLaVA in the published layout: old names, two shards, card and license."""
    name = family.replace("_", "-")
    folder = save_layout(Path(llava_folder), tmp_path_factory.mktemp("base") / f"{name}-tiny", "as published", shards=2)
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n\n# A base\n", encoding="utf-8")
    (folder / "LICENSE.txt").write_text("The license of the base.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder) -> Path:
    return Path(clip_folder)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory, base, clip) -> Path:
    return build(str(base), tmp_path_factory.mktemp("built") / "compressed", clip=str(clip), **tiny.RECOVERY)


@pytest.fixture
def built(tmp_path, built_once) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built_once, tmp_path / "compressed"))


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def command_line(hub, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    return partial(run_hub_upload, hub, tmp_path)
