"""The command line as a person uses it: answers, files, exit codes, and one readable line for each mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from PIL import Image

from recoverable_llava.tools import asking
from recoverable_llava.tools.command_line import main


@pytest.fixture
def picture(tmp_path, pictures):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path, pictures):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for name, image in zip(["a.png", "b.jpg", "deeper/c.webp"], pictures):
        image.save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ask_prints_the_answer_alone_on_stdout(capsys, repo_folder, picture, tmp_path):
    overlay = tmp_path / "kept.png"
    code, out, err = run(capsys, "ask", picture, "what is it?", "--model", repo_folder, "--max-new-tokens", 4,
                         "--overlay", overlay)  # fmt: skip
    assert code == 0
    model, processor = asking.load(repo_folder)
    expected = asking.ask(model, processor, [asking.user_turn("what is it?", Image.open(picture))], max_new_tokens=4)
    assert out.rstrip("\n") == expected.text
    assert f"{expected.num_tokens} of 36 visual tokens" in err
    assert Image.open(overlay).width > 600


@pytest.mark.parametrize(
    "arguments, tokens",
    [
        (["--no-compress"], "36 of 36"),
        (["--budget", "5"], "5 of 36"),
        (["--preset", "paper", "--threshold", "1e6"], "2 of 36"),
    ],
)
def test_compression_options(capsys, repo_folder, picture, arguments, tokens):
    code, _, err = run(capsys, "ask", picture, "why?", "--model", repo_folder, "--max-new-tokens", 2, *arguments)
    assert code == 0 and tokens in err


def test_batch_writes_a_line_per_picture_and_goes_on_after_a_stop(capsys, repo_folder, folder, tmp_path):
    output = tmp_path / "new" / "answers.jsonl"
    command = ["batch", folder, "what is it?", "--model", repo_folder, "--max-new-tokens", 3, "--output", output]
    code, _, err = run(capsys, *command)
    assert code == 0 and "3 answered" in err
    whole = lines(output)
    assert [line["image"] for line in whole] == ["a.png", "b.jpg", "deeper/c.webp"]
    assert all(0 < line["visual_tokens"] < 36 for line in whole)

    # Stopped in the middle of the second line.
    text = output.read_text()
    output.write_text(text[: text.index("\n") + 20])
    code, _, err = run(capsys, *command)
    assert code == 0 and "2 answered, 1 were answered before" in err
    assert [line["answer"] for line in lines(output)] == [line["answer"] for line in whole]

    code, _, err = run(capsys, *command)
    assert code == 0 and "an answer for all 3 pictures" in err
    command[2] = "another question?"
    assert run(capsys, *command)[0] == 0
    assert len(lines(output)) == 6


def test_batch_goes_on_after_a_broken_picture(capsys, repo_folder, folder, tmp_path):
    (folder / "a.png").write_bytes(b"no picture")
    output = tmp_path / "answers.jsonl"
    code, _, err = run(
        capsys, "batch", folder, "why?", "--model", repo_folder, "--max-new-tokens", 2, "--output", output
    )
    assert code == 1
    assert "a.png" in err and "1 unreadable" in err
    assert [line["image"] for line in lines(output)] == ["b.jpg", "deeper/c.webp"]


def test_broken_pictures(capsys, tmp_path, pictures):
    (tmp_path / "text.png").write_text("no picture")
    pictures[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    for name, message in [
        ("text.png", "is no picture"),
        ("cut.png", "cannot be read to the end"),
        ("none.png", "no file"),
    ]:
        code, out, err = run(capsys, "ask", tmp_path / name, "why?")
        assert (code, out) == (2, "")
        assert name in err and message in err and err.count("\n") == 1


def test_a_picture_is_turned_as_its_camera_says(tmp_path, pictures):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    pictures[0].save(tmp_path / "upright.jpg", exif=exif)
    assert asking.open_picture(tmp_path / "upright.jpg").size == pictures[0].size[::-1]


def test_mistakes_are_one_line_and_exit_code_2(
    capsys, repo_folder, llava_folder, picture, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text('{"something": "else"}\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (["ask", picture, "why?"], "There is no folder 'checkpoints/tiny' here.*--model"),
        (["ask", picture, "why?", "--model", "./nowhere"], "There is no folder './nowhere'"),
        (["ask", picture, "why?", "--model", "nobody/nothing"], "'nobody/nothing' is neither a folder"),
        (["ask", picture, "why?", "--model", str(empty)], "is not a LLaVA with recoverable compression"),
        (["ask", picture, "why?", "--model", llava_folder], "is a 'llava' checkpoint without recoverable compression"),
        (["ask", picture, " ", "--model", repo_folder], "QUESTION is empty"),
        (["ask", picture, "why?", "--model", repo_folder, "--budget", "37"], "visual_token_budget must be .*got 37"),
        (["ask", picture, "why?", "--model", repo_folder, "--threshold", "-1"], "novelty_threshold must be .*got -1"),
        (["ask", picture, "why?", "--overlay", "kept"], "--overlay is 'kept'"),
        (["ask", picture, "why?", "--overlay", "kept.png", "--no-compress"], "leave one out"),
        (["batch", "nowhere", "why?"], "There is no folder 'nowhere'"),
        (["batch", str(empty), "why?"], "has no pictures"),
        (["batch", str(folder), "why?", "--output", str(other)], "was not written by this command"),
    ]
    for arguments, message in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.count("\n") == 1, err
        assert re.search(message, err), err


def test_no_gpu(capsys, repo_folder, picture, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(capsys, "ask", picture, "why?", "--model", repo_folder, "--device", "cuda")
    assert code == 2 and "there is no CUDA GPU here" in err and "use cpu" in err


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"], ["batch", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "recoverable-llava" in capsys.readouterr().out


def test_bad_arguments_exit_2(capsys):
    for arguments in (["ask"], ["ask", "a", "b", "--budget", "0"], ["ask", "a", "b", "--budget", "3", "--no-compress"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


class _NoRepository(BaseHTTPRequestHandler):
    """A Hub that has no repository."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


def test_repository_that_the_hub_does_not_have(picture, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), _NoRepository)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    command = [
        sys.executable,
        "-m",
        "recoverable_llava.tools.command_line",
        "ask",
        picture,
        "why?",
        "--model",
        "nobody/nothing",
    ]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    assert result.returncode == 2
    assert result.stdout == ""
    assert "'nobody/nothing' is neither a folder with a checkpoint nor a Hub repo" in result.stderr
    assert "Traceback" not in result.stderr


def test_code_of_a_checkpoint_never_runs(repo_folder, tmp_path, capsys, picture):
    trap = tmp_path / "trap"
    shutil.copytree(repo_folder, trap)
    for path in trap.glob("*.py"):
        path.write_text("raise SystemExit('code of the checkpoint was run')")
    assert run(capsys, "ask", picture, "why?", "--model", trap, "--max-new-tokens", 2)[0] == 0


def test_settings_are_put_back_after_a_mistake(model_and_processor):
    model, _ = model_and_processor
    with pytest.raises(ValueError, match="lof_threshold"), asking.settings(model, compress=False, lof_threshold=-1):
        pass
    assert model.config.compress and model.config.lof_threshold == 1.5
    with pytest.raises(ValueError, match="no field 'budget'"), asking.settings(model, budget=3):
        pass
