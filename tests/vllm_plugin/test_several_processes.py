"""One server of two processes: the language model cut in two, and two engines side by side."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from asked_server import AskedServer, for_transformers, url_part, user
from PIL import Image
from reference import Reference
from transformers import LlamaConfig, LlavaForConditionalGeneration

from demo.scene import ANSWERS, PICTURE
from recoverable_llava.tools.combine import combine


# vLLM binds each process to a NUMA node of its own, of which a small machine has one.
NO_BINDING = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture
def repo(tmp_path):
    """Random weights whose heads are of a size that vLLM's CPU attention takes, and in number even."""
    clip, llava, folder = (str(tmp_path / name) for name in ("clip", "llava", "repo"))
    tiny.save_tiny_clip(clip)
    tiny.save_tiny_llava(llava, clip)
    stock = LlavaForConditionalGeneration.from_pretrained(llava)
    text = stock.config.text_config.to_dict() | {"hidden_size": 128, "head_dim": 32}
    stock.config.text_config = LlamaConfig(**text)
    torch.manual_seed(0)
    larger = LlavaForConditionalGeneration(stock.config)
    larger.model.vision_tower.load_state_dict(stock.model.vision_tower.state_dict())
    larger.save_pretrained(llava)
    model, processor = combine(llava, clip, **tiny.RECOVERY)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def questions(server, reference, image, budget, texts):
    """The largest difference to transformers over questions that are asked at once."""
    options = {"extra_body": {"mm_processor_kwargs": {"visual_token_budget": budget}}}
    picture = url_part(image)  # once: a file that Pillow has yet to read is no thing for several threads
    with ThreadPoolExecutor(4) as clients:
        got = list(clients.map(lambda text: server.ask(user(picture, text), **options), texts))
    expected = [reference.chat(user(for_transformers(image), text), [image], budget) for text in texts]
    return max(one.difference(two) for one, two in zip(got, expected, strict=True))


def test_tensor_parallel(repo, tmp_path):
    server = AskedServer(tmp_path, "--tensor-parallel-size", "2", repo=repo, **NO_BINDING)
    try:
        texts = ["what colour is the cat ?", "where is the dog ?", "how many ?", "is there a photo ?"]
        assert questions(server, Reference(repo), Image.open(PICTURE), 12, texts) < 1e-4
        assert server.tower_passes() == 2  # the towers are whole on each rank
    finally:
        server.stop()


def test_data_parallel(tmp_path):
    server = AskedServer(tmp_path, "--data-parallel-size", "2", **NO_BINDING)
    try:
        assert questions(server, Reference(), Image.open(PICTURE).convert("RGB"), 33, list(ANSWERS)) < 1e-5
        assert server.tower_passes() == 2  # each engine has caches of its own
    finally:
        server.stop()
