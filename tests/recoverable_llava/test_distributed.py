"""Training in two processes, replicated and sharded: the losses of a single process, and no parameter left behind."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import batch_of, both_families
from distributed_training import __file__ as WORKER
from transformers import AutoProcessor


ROOT = Path(__file__).parents[2]
WAYS = ("alone", "ddp", "fsdp", "lora_alone", "ddp_lora")
NEEDS_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def losses(repo_folder, tmp_path_factory, pictures):
    """Of each way to train, three steps."""
    return train_in_two_processes(WAYS, repo_folder, tmp_path_factory, pictures)


def train_in_two_processes(ways, repo_folder, tmp_path_factory, pictures):
    """All ways in one pair of processes, which take longest to start."""
    inputs = dict(batch_of(AutoProcessor.from_pretrained(repo_folder), pictures))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    torch.save(inputs, f"{repo_folder}/batch.pt")
    report = tmp_path_factory.mktemp("distributed") / "losses.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, repo_folder, rank, port, str(report), *ways],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=300)[1].decode() for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return json.loads(report.read_text())


@pytest.mark.slow
@both_families
@pytest.mark.parametrize(("way", "single"), [("ddp", "alone"), ("fsdp", "alone"), ("ddp_lora", "lora_alone")])
def test_two_processes_learn_what_one_does(losses, way, single):
    assert losses[way] == pytest.approx(losses[single], rel=1e-5)
    assert losses[way][0] > losses[way][-1] + 0.1


@pytest.mark.gpu
@NEEDS_GPUS
@pytest.mark.parametrize("way", ["fsdp1", "zero3"])
def test_older_sharding_on_two_gpus(way, repo_folder, tmp_path_factory, pictures):
    if way == "zero3":
        pytest.importorskip("deepspeed")
    losses = train_in_two_processes(("alone", way), repo_folder, tmp_path_factory, pictures)
    assert losses[way][0] == pytest.approx(losses["alone"][0], rel=1e-3) and losses[way][-1] < losses[way][0] - 0.1
    if way == "fsdp1":  # ZeRO steps as its own optimizer does, with compression off as well
        assert losses[way] == pytest.approx(losses["alone"], rel=1e-3)
