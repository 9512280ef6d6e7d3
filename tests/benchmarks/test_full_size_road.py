"""The road of publishing, from random checkpoints to a table, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import full_size_road


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_whole_road_at_a_small_size(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.full_size_road", "--size", "tiny", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    page = (tmp_path / "table.md").read_text()
    for words in (
        "| build |",
        "| verify |",
        "| load, stock LLaVA |",
        "| load, built repository |",
        "all checks passed",
    ):
        assert words in page and words in run.stdout, page
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert all(step["seconds"] > 0 and step["resident"] > 2**26 for step in steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]


def test_full_size_is_llava_15_7b():
    """In the shapes that are published: 7.06 billion parameters in the base, 428 million in CLIP."""
    size = full_size_road.SIZES["7B"]
    with torch.device("meta"):
        base = full_size_road.LlavaForConditionalGeneration(full_size_road.base_config(size))
        clip = full_size_road.CLIPModel(full_size_road.clip_config(size))
    assert round(sum(weight.numel() for weight in base.parameters()) / 1e7) == 706
    assert round(sum(weight.numel() for weight in clip.parameters()) / 1e6) == 428


def test_shards_are_written_one_by_one_and_hold_every_weight(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(full_size_road, "SHARD_BYTES", 200_000)
    size = full_size_road.SIZES["tiny"]
    full_size_road.write_weights(
        tmp_path / "base", full_size_road.LlavaForConditionalGeneration, full_size_road.base_config(size), torch.float16
    )
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    found = {}
    for path in (tmp_path / "base").glob("*.safetensors"):
        found |= dict.fromkeys(load_file(path), path.name)
    assert found == index["weight_map"] and len(set(found.values())) > 3
