"""vLLM has an environment of its own, `make test-vllm`; without it there is nothing to collect here."""

import importlib.util
import os
from pathlib import Path

import pytest


# The sampler compiles one function, for as long as all these tests take.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# The engine in this process, where tests can look at the model.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
