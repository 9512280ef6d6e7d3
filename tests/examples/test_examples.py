"""Every example runs as it stands, in a folder laid out like a clone, and does what its first lines promise."""

import io
import json
import re
import runpy
import socket
import subprocess
import sys
import time
from difflib import ndiff
from pathlib import Path

import pytest
from batches import both_families
from PIL import Image


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def clone(tmp_path, repo_folder, monkeypatch):
    """A folder with the demo's picture and an embedded checkpoint (a tiny one with random weights)."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny").symlink_to(repo_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(clone, monkeypatch, capsys):
    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        result = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out, result

    return run_example


def test_every_example_has_a_test():
    tests = [Path(__file__), *(ROOT / "tests" / "vllm_plugin").glob("test_*.py")]
    tested = set(re.findall(r'"(\w+\.py)"', "".join(path.read_text() for path in tests)))
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested


def refusal(name, monkeypatch, *arguments):
    """What a script ends with instead of a traceback."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return end.value.code


@pytest.mark.parametrize(
    "path", sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "ask_vllm_offline.py"}), ids=lambda path: path.stem
)
def test_each_says_what_it_needs(path, tmp_path, monkeypatch):
    """Somewhere else than in a clone, without arguments."""
    monkeypatch.chdir(tmp_path)
    assert refusal(path.name, monkeypatch).startswith(("Usage: python", "Run this from the root of the repository"))


@pytest.mark.parametrize(
    "name, package",
    [
        ("ask_a_server.py", "openai"),
        ("ask_vllm.py", "openai"),
        ("ask_vllm_offline.py", "vllm"),
        ("fine_tune_lora.py", "peft"),
        ("load_quantised.py", "bitsandbytes"),
    ],
)
def test_each_says_which_package_it_needs(name, package, clone, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as on a machine that does not have it
    message = refusal(name, monkeypatch)
    assert message.startswith("This needs") and "pip install" in message


def test_no_server(clone, monkeypatch):
    pytest.importorskip("openai", reason='needs pip install "transformers[serving]"')
    message = refusal("ask_a_server.py", monkeypatch, "checkpoints/tiny", "http://127.0.0.1:9/v1")
    assert message.startswith("No server answers at http://127.0.0.1:9/v1")
    message = refusal("ask_vllm.py", monkeypatch, "--server", "http://127.0.0.1:9/v1")
    assert message.startswith("No server answers at http://127.0.0.1:9/v1")


@both_families
def test_swap_is_a_diff_of_two_lines(run, llava_folder, repo_folder):
    stock, swapped = (
        (EXAMPLES / name).read_text().splitlines()[1:] for name in ("stock_script.py", "swapped_script.py")
    )
    changed = [line for line in ndiff(stock, swapped) if line.startswith("+ ")]
    assert len(stock) == len(swapped) and len(changed) == 2
    run("stock_script.py", llava_folder)
    run("swapped_script.py", repo_folder)


@both_families
def test_pipeline(run):
    assert run("ask_with_pipeline.py")[0]


@both_families
def test_batch_folder_goes_on_after_a_stop(run, clone, pictures):
    (clone / "pictures").mkdir()
    for number in range(10):
        pictures[number % 4].save(clone / "pictures" / f"{number}.png")
    command = ["batch_folder.py", clone / "pictures", clone / "answers.jsonl", "what is it?"]
    run(*command)
    whole = (clone / "answers.jsonl").read_text()
    assert [json.loads(line)["image"] for line in whole.splitlines()] == [f"{number}.png" for number in range(10)]
    (clone / "answers.jsonl").write_text("".join(whole.splitlines(keepends=True)[:4]))
    run(*command)
    assert (clone / "answers.jsonl").read_text() == whole
    (clone / "pictures" / "broken.png").write_text("no picture")
    run(*command[:3], "another question?")
    lines = (clone / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 20 and not any("broken" in line for line in lines)


@both_families
@pytest.mark.parametrize("end", ["\n", ""], ids=["empty line", "end of input"])
def test_streaming_chat(run, monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is the cactus?\nand the whale?\n" + end))
    _, result = run("streaming_chat.py")
    assert [message["role"] for message in result["messages"]] == ["user", "assistant"] * 2


@both_families
def test_several_turns(run):
    out, result = run("several_turns.py")
    assert result["first"].past_key_values.get_seq_length() < result["ids"].shape[1]
    assert "in the cache" in out


@both_families
def test_multiple_images(run):
    out, _ = run("multiple_images.py")
    assert len(re.search(r"\[(.*)\]", out)[1].split(",")) == 2


@both_families
def test_many_questions_run_the_vision_tower_once(run, monkeypatch):
    from transformers.models.clip.modeling_clip import CLIPVisionModel

    calls, forward = [], CLIPVisionModel.forward
    monkeypatch.setattr(CLIPVisionModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    out, _ = run("many_questions.py")
    assert len(calls) == 1
    assert out.count("visual tokens") == 3


@both_families
def test_inspect_recovery(run, clone, family):
    out, _ = run("inspect_recovery.py")
    total = {"llava": 36, "llava_next": 36 + 12 * (12 + 1)}[family]
    assert out.count(f"of {total} visual tokens") == out.count("kept by vision") == 2
    assert Image.open(clone / "recovery.png").width > 1000


@both_families
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_fine_tune_lora(run, clone):
    _, result = run("fine_tune_lora.py")
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    assert (clone / "output/lora/adapter/adapter_model.safetensors").exists()
    assert not any("lora" in name for name, _ in result["merged"].named_parameters())


def test_load_quantised(run):
    pytest.importorskip("bitsandbytes", reason="needs pip install bitsandbytes")
    _, result = run("load_quantised.py", ROOT / "checkpoints" / "tiny")
    kinds = {name: type(module).__name__ for name, module in result["model"].named_modules()}
    quantised = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert quantised and all("language_model" in name or "multi_modal_projector" in name for name in quantised)


@both_families  # the vLLM plugin sends who has a LLaVA-NeXT here
def test_ask_a_server(run, clone):
    pytest.importorskip("openai", reason='needs pip install "transformers[serving]"')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = clone / "server.log"
    command = [Path(sys.executable).parent / "transformers", "serve", "checkpoints/tiny", "--trust-remote-code"]
    with log.open("w") as file:
        server = subprocess.Popen([*command, "--port", str(port), "--host", "127.0.0.1"], stdout=file, stderr=file)
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        run("ask_a_server.py", "checkpoints/tiny", f"http://127.0.0.1:{port}/v1")
    finally:
        server.terminate()
        server.wait(20)
    assert 'POST /v1/chat/completions HTTP/1.1" 200' in log.read_text()
