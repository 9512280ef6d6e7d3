"""`benchmarks.two_gpus`: two CPU processes here, two GPUs where there are some."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]


def same_answers(repo_folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    result = subprocess.run(
        [*command, "-m", "benchmarks.two_gpus", "--model", repo_folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if line.startswith("same")]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs, the test below runs on them")
def test_two_processes_answer_as_one(repo_folder):
    assert len(same_answers(repo_folder)) == 2  # accelerate, tensor parallel
    assert len(same_answers(str(ROOT / "checkpoints/tiny"))) == 1  # answers of several lengths; 5 heads


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_answer_as_one(repo_folder):
    assert len(same_answers(repo_folder)) == 3  # and device_map
    assert len(same_answers(str(ROOT / "checkpoints/tiny"))) == 2
