"""The server of `make serve`, asked over HTTP: many clients at once, bad requests, clients that hang up."""

import base64
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from asked_server import AskedServer, for_transformers, url_part, user
from PIL import Image
from reference import REPO, Reference

from demo.scene import ANSWERS, PICTURE
from training.examples import scene_examples
from vllm_plugin.image_embeds import ImageEmbedder, image_embeds_part


TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = AskedServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def reference():
    return Reference()


@pytest.fixture(scope="module")
def scene():
    return Image.open(PICTURE).convert("RGB")


def test_eight_clients_ask_sixty_questions_about_one_image(server, reference, scene):
    questions = [*ANSWERS, *dict.fromkeys(example.question for example in scene_examples("test", 104))][:60]
    expected = [reference.chat(user(for_transformers(scene), question), [scene], 64) for question in questions]
    picture = url_part(scene)
    passes = server.tower_passes()
    with ThreadPoolExecutor(8) as clients:
        for _ in range(2):
            got = list(clients.map(lambda question: server.ask(user(picture, question)), questions))
            assert max(one.difference(two) for one, two in zip(got, expected)) < TOLERANCE
            # The first time once for all; the second time not at all.
            assert server.tower_passes() == passes + 1


def test_chats_of_every_form_answer_as_transformers_does(server, reference, scene):
    other = next(scene_examples("test", 1)).image()
    first, second = list(ANSWERS)[:2]
    forms = {
        "question before image": lambda part: user(first, part(scene)),
        "two images, one question": lambda part: user(part(scene), part(other), first),
        "system prompt": lambda part: [{"role": "system", "content": "Answer briefly."}, *user(part(scene), first)],
        "two turns": lambda part: [
            *user(part(scene), first),
            {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[first]}]},
            *user(second),
        ],
        "an image in each turn": lambda part: [
            *user(part(scene), first),
            {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[first]}]},
            *user(part(other), second),
        ],
        "no question": lambda part: user(part(scene)),
    }
    images = {"two images, one question": [scene, other], "an image in each turn": [scene, other]}
    for name, form in forms.items():
        expected = reference.chat(form(for_transformers), images.get(name, [scene]), 64)
        assert server.ask(form(url_part)).difference(expected) < TOLERANCE, name


def test_a_chat_without_an_image_is_stock(server, reference):
    """Which is to say without the start token, which vLLM leaves to chat templates."""
    question = "What color is the sky?"
    answer = server.ask(user(question))
    assert answer.difference(reference.text(f"USER: {question} ASSISTANT:", add_special_tokens=False)) < TOLERANCE


def test_a_budget_for_one_request(server, reference, scene):
    question = next(iter(ANSWERS))
    for budget in (16, 33):
        got = server.ask(
            user(url_part(scene), question), extra_body={"mm_processor_kwargs": {"visual_token_budget": budget}}
        )
        assert got.difference(reference.chat(user(for_transformers(scene), question), [scene], budget)) < TOLERANCE


def test_visual_tokens_of_a_client(server, reference, scene):
    embedder = ImageEmbedder(server.model, dtype="float32")
    for question in list(ANSWERS)[:2]:
        expected = reference.chat(user(for_transformers(scene), question), [scene], None)
        got = server.ask(user(image_embeds_part(embedder(scene, question)), question))
        assert got.difference(expected) < TOLERANCE


def test_bad_requests_are_refused_and_the_server_goes_on(server, reference, scene):
    question = next(iter(ANSWERS))
    good = user(url_part(scene), question)
    expected = reference.chat(user(for_transformers(scene), question), [scene], 64)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"none").decode()}}
    cut = url_part(scene)["image_url"]["url"][:2000]

    def budget(value):
        return {"extra_body": {"mm_processor_kwargs": {"visual_token_budget": value}}}

    requests = {
        "no image at all": (user(broken, question), {}),
        "half an image": (user({"type": "image_url", "image_url": {"url": cut}}, question), {}),
        "5,000 x 1 pixels": (user(url_part(Image.new("RGB", (5000, 1))), question), {}),
        "more images than allowed": (user(*[url_part(scene)] * 5, question), {}),
        "budget 0": (good, budget(0)),
        "budget 1,000,000": (good, budget(1_000_000)),
        "budget as text": (good, budget("many")),
        "a placeholder typed by the user": (user(url_part(scene), "<image> What is this?"), {}),
        "unknown option": (good, {"extra_body": {"mm_processor_kwargs": {"budget": 58}}}),
        "prompt too long": (user(url_part(scene), "What? " * 3000), {}),
        "visual tokens of another size": (user(image_embeds_part(torch.zeros(4, 3)), question), {}),
    }
    for name, (messages, options) in requests.items():
        with pytest.raises(openai.APIStatusError) as refusal:
            server.ask(messages, **options)
        assert 400 <= refusal.value.status_code < 500, name
        assert server.ask(good).difference(expected) < TOLERANCE, name


def test_a_client_that_hangs_up(server, reference, scene):
    question = next(iter(ANSWERS))
    good = user(url_part(scene), question)
    for _ in range(3):
        stream = server.client.chat.completions.create(
            model=server.model, messages=good, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    expected = reference.chat(user(for_transformers(scene), question), [scene], 64)
    assert server.ask(good).difference(expected) < TOLERANCE


def test_fifty_requests_at_once(server, reference):
    examples = list(scene_examples("test", 50))
    images = [example.image() for example in examples]
    with ThreadPoolExecutor(50) as clients:
        requests = [user(url_part(image), example.question) for image, example in zip(images, examples)]
        got = list(clients.map(server.ask, requests))
    for answer, image, example in zip(got, images, examples):
        expected = reference.chat(user(for_transformers(image), example.question), [image], 64)
        assert answer.difference(expected) < TOLERANCE


def test_example_with_a_server(server):
    command = [sys.executable, ROOT / "examples" / "ask_vllm.py", "--server", f"{server.address}/v1"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(ANSWERS)
    for line, (question, answer) in zip(lines, ANSWERS.items()):
        found = re.fullmatch(r"(.+\?)  (.+)  \((\d+) prompt tokens\)", line)
        assert found.group(1, 2) == (question, answer) and 64 < int(found[3]) < 84
    short = subprocess.run(
        [*command, "--budget", "16", "Where is the cactus?"], cwd=ROOT, capture_output=True, text=True
    )
    assert re.search(r"\((2\d) prompt tokens\)", short.stdout)
    question, answer = next(iter(ANSWERS.items()))
    adaptive = subprocess.run([*command, "--adaptive", REPO, question], cwd=ROOT, capture_output=True, text=True)
    assert adaptive.stdout.startswith(f"{question}  {answer}  (")


def test_example_without_a_server():
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, ROOT / "examples" / "ask_vllm_offline.py"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment).stdout
    assert re.search(r"What word is under the lemon\?  RAIN  \(76 prompt tokens\)", output)
