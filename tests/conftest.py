"""Fixtures: tiny checkpoints built once per session, and pictures."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

from recoverable_llava.tools.combine import combine  # noqa: E402


torch.set_num_threads(1)


def pytest_report_header():
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny.save_tiny_clip(folder)
    return str(folder)


@pytest.fixture(scope="session")
def family(request):
    """LLaVA-1.5, unless a test is marked with `batches.both_families`."""
    return getattr(request, "param", "llava")


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory, clip_folder, family):
    folder = tmp_path_factory.mktemp(family)
    tiny.save_tiny_llava(folder, clip_folder, family=family)
    return str(folder)


@pytest.fixture(scope="session")
def repo_folder(tmp_path_factory, llava_folder, clip_folder):
    """What the Hub gets: weights, config, processor and code in one folder."""
    folder = tmp_path_factory.mktemp("repo")
    model, processor = combine(llava_folder, clip_folder, **tiny.RECOVERY)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model_and_processor(llava_folder, clip_folder):
    """A fresh model, so that a test may change its config."""
    return combine(llava_folder, clip_folder, **tiny.RECOVERY)


@pytest.fixture
def model(model_and_processor):
    return model_and_processor[0]


@pytest.fixture
def processor(model_and_processor):
    return model_and_processor[1]


@pytest.fixture
def stock(llava_folder, family):
    return tiny.FAMILIES[family][1].from_pretrained(llava_folder)


@pytest.fixture(scope="session")
def pictures():
    """Random pictures of several sizes."""
    generator = np.random.default_rng(0)
    sizes = [(100, 120), (84, 84), (150, 90), (60, 200)]
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
