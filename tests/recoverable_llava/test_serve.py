"""`transformers serve --trust-remote-code` answers about an image over HTTP, streaming and not, with compression."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import fresh_process
import pytest
from batches import both_families
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils.import_utils import is_serve_available

import recoverable_llava  # noqa: F401  (registers its classes)


MAX_TOKENS = 6
# The server is on this machine, whatever proxy the environment names.
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
pytestmark = [
    both_families,
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="needs the extra of transformers: transformers[serving]"),
]


@pytest.fixture(scope="module")
def served_folder(repo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "repo"
    shutil.copytree(repo_folder, folder)
    return folder


@pytest.fixture(scope="module")
def server(served_folder, tmp_path_factory):
    """The address of a server that lives as long as this module's tests."""
    home = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The command that `transformers` is, without this repository on the path.
    command = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    arguments = ["serve", str(served_folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1"]
    environment = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {"HF_HOME": str(home / "hf_home"), "HF_HUB_OFFLINE": "1"}
    log = (home / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", command, *arguments, "--port", str(port)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            try:
                direct.open(f"{address}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def ask(server, served_folder, picture, question, stream):
    data = io.BytesIO()
    picture.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {
        "model": str(served_folder),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": MAX_TOKENS,
        "stream": stream,
    }
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with direct.open(request, timeout=120) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


@pytest.fixture(scope="module")
def expected(repo_folder):
    """Picture, question and the answer with compression, which differs from the one without."""
    model = AutoModelForImageTextToText.from_pretrained(repo_folder)
    processor = AutoProcessor.from_pretrained(repo_folder)
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    for picture, chat in zip(fresh_process.pictures(), fresh_process.chats()):
        inputs = processor.apply_chat_template(chat, **settings)
        answers = []
        for compress in (True, False):
            model.config.compress = compress
            sequences = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            answers.append(processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        if answers[0] != answers[1]:
            return picture, chat[0]["content"][1]["text"], answers[0], inputs["input_ids"].shape[1]
    raise AssertionError("compression changes none of the answers: choose other pictures")


def complete(text):
    """Without what stands at either end and is white space (control characters count) or no complete character: the
    streamer holds that back, the decoder writes a replacement for it."""
    return text.replace("\ufffd", " ").strip()


def test_one_answer(server, served_folder, expected):
    picture, question, answer, length = expected
    reply = json.loads(ask(server, served_folder, picture, question, stream=False))
    assert reply["choices"][0]["message"]["content"].strip() == answer.strip()
    assert reply["usage"] == {
        **reply["usage"],
        "prompt_tokens": length,
        "completion_tokens": MAX_TOKENS,
        "total_tokens": length + MAX_TOKENS,
    }


def test_a_streamed_answer(server, served_folder, expected):
    picture, question, answer, _ = expected
    lines = ask(server, served_folder, picture, question, stream=True).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert sum(bool(part) for part in parts) >= 2
    assert complete("".join(parts)) == complete(answer)
