"""Fixtures: a base of each family as it is published, their CLIP, built folders, a Hub on loopback, and the command
line against it."""

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


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def family(request) -> str:
    """For tests of every family: the model_type of its stock configuration."""
    return request.param


def as_published(stock: Path, folder: Path) -> Path:
    """A stock LLaVA in the published layout: old names, two shards, card and license."""
    save_layout(stock, folder, "as published", shards=2)
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n\n# A base\n", encoding="utf-8")
    (folder / "LICENSE.txt").write_text("The license of the base.\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory, llava_folder) -> Path:
    return as_published(Path(llava_folder), tmp_path_factory.mktemp("base") / "llava-tiny")


@pytest.fixture(scope="session")
def next_folder(tmp_path_factory, clip_folder) -> Path:
    folder = tmp_path_factory.mktemp("llava_next")
    tiny.save_tiny_llava(folder, clip_folder, family="llava_next")
    return folder


@pytest.fixture(scope="session")
def next_base(tmp_path_factory, next_folder) -> Path:
    return as_published(next_folder, tmp_path_factory.mktemp("next_base") / "llava-next-tiny")


@pytest.fixture(scope="session")
def base_of_family(family, request) -> Path:
    return request.getfixturevalue({"llava": "base", "llava_next": "next_base"}[family])


@pytest.fixture(scope="session")
def clip(clip_folder) -> Path:
    return Path(clip_folder)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory, base, clip) -> Path:
    return build(str(base), tmp_path_factory.mktemp("built") / "compressed", clip=str(clip), **tiny.RECOVERY)


@pytest.fixture(scope="session")
def built_of_family(tmp_path_factory, base_of_family, clip) -> Path:
    output = tmp_path_factory.mktemp("built_of_family") / "compressed"
    return build(str(base_of_family), output, clip=str(clip), **tiny.RECOVERY)


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
