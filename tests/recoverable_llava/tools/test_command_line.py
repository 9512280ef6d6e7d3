"""The command line as a person uses it: answers, files, exit codes, and one readable line for each mistake."""

import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import tiny
from batches import both_families
from PIL import Image

from recoverable_llava import RecoverableLlavaForConditionalGeneration, RecoverableLlavaNextConfig
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


def num_uncompressed(family):
    """Of the picture of 120 x 100 pixels: for LLaVA-NeXT the base tile, and 10 rows of 12 patches and a new line."""
    return {"llava": 36, "llava_next": 36 + 10 * (12 + 1)}[family]


@both_families
def test_ask_prints_the_answer_alone_on_stdout(capsys, repo_folder, picture, tmp_path, family):
    overlay = tmp_path / "kept.png"
    code, out, err = run(capsys, "ask", picture, "what is it?", "--model", repo_folder, "--max-new-tokens", 4,
                         "--overlay", overlay)  # fmt: skip
    assert code == 0
    model, processor = asking.load(repo_folder)
    expected = asking.ask(model, processor, [asking.user_turn("what is it?", Image.open(picture))], max_new_tokens=4)
    assert out.rstrip("\n") == expected.text
    assert expected.num_uncompressed == num_uncompressed(family) > expected.num_tokens
    assert f"{expected.num_tokens} of {expected.num_uncompressed} visual tokens" in err
    assert Image.open(overlay).width > 600


@both_families
@pytest.mark.parametrize(
    "arguments, tokens",
    [(["--no-compress"], None), (["--budget", "5"], 5), (["--preset", "paper", "--threshold", "1e6"], 2)],
)
def test_compression_options(capsys, repo_folder, picture, arguments, tokens, family):
    total = num_uncompressed(family)
    code, _, err = run(capsys, "ask", picture, "why?", "--model", repo_folder, "--max-new-tokens", 2, *arguments)
    assert code == 0 and f"{tokens or total} of {total} visual tokens" in err


@pytest.fixture
def repo_with_a_budget(repo_folder, tmp_path):
    """A repo that has a budget of its own, in both of its files."""
    folder = tmp_path / "repo"
    shutil.copytree(repo_folder, folder)
    for file in ("config.json", "processor_config.json"):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "visual_token_budget": 7}))
    return folder


@pytest.mark.parametrize("arguments, tokens", [([], 7), (["--budget", "5"], 5), (["--no-compress"], 36)])
def test_a_repo_with_a_budget_takes_every_option(capsys, repo_with_a_budget, picture, arguments, tokens):
    command = ["ask", picture, "why?", "--model", repo_with_a_budget, "--max-new-tokens", 2]
    code, _, err = run(capsys, *command, *arguments)
    assert code == 0 and f"{tokens} of 36 visual tokens" in err


@pytest.mark.parametrize("family", ["llava_next"], indirect=True)
def test_a_picture_too_narrow_for_the_budget(capsys, repo_folder, tmp_path, pictures):
    """Named with what it has room for; the others of a batch are answered."""
    folder = tmp_path / "folder"
    folder.mkdir()
    pictures[0].save(folder / "a.png")
    Image.new("RGB", (1000, 21)).save(folder / "narrow.png")
    options = ["why?", "--model", repo_folder, "--max-new-tokens", 2, "--budget", tiny.NUM_PATCHES + 40]
    code, out, err = run(capsys, "ask", folder / "narrow.png", *options)
    assert (code, out) == (2, "") and re.search(r"visual_token_budget is 76, but image 0 .* has only \d+ patches", err)
    output = tmp_path / "answers.jsonl"
    code, _, err = run(capsys, "batch", folder, *options, "--output", output)
    assert code == 1 and "narrow.png: visual_token_budget is 76" in err and "1 could not be" in err
    (line,) = lines(output)
    assert (line["image"], line["visual_tokens"], line["visual_tokens_uncompressed"]) == ("a.png", 76, 166)


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


def test_batch_goes_on_only_with_what_made_the_file(capsys, repo_folder, folder, tmp_path, pictures, monkeypatch):
    """Other settings, another model, another folder: refused, with what differs, before any weight is loaded."""
    output = tmp_path / "answers.jsonl"
    command = ["batch", folder, "why?", "--model", repo_folder, "--max-new-tokens", 2, "--output", output]
    assert run(capsys, *command, "--preset", "paper")[0] == 0
    before = output.read_bytes()
    made_by = lines(output)[0]["made_by"]
    assert (made_by["preset"], made_by["model"]) == ("paper", repo_folder)

    moved, changed = tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(repo_folder, moved)
    shutil.copytree(repo_folder, changed)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    pictures[3].save(other_folder / "a.png")
    monkeypatch.setattr(RecoverableLlavaForConditionalGeneration, "from_pretrained", no_work)
    for replaced, message in [
        ([], 'preset was "paper", is null'),
        (["--preset", "default"], 'preset was "paper", is "default"'),
        (["--preset", "paper", "--threshold", "2"], "threshold was null, is 2.0"),
        (["--no-compress"], "no_compress was null, is true"),
        (["--preset", "paper", "--dtype", "bfloat16"], 'dtype was null, is "bfloat16"'),
        (["--preset", "paper", "--max-new-tokens", "3"], "max_new_tokens was 2, is 3"),
        (["--preset", "paper", "--model", changed], "version was"),
    ]:
        code, _, err = run(capsys, *command, *replaced)
        assert code == 2 and f"{output}' has answers to this question that were made otherwise" in err, err
        assert message in err
    command[1] = other_folder
    code, _, err = run(capsys, *command, "--preset", "paper")
    assert code == 2 and f"{output}' has an answer about 'a.png' as it was before" in err

    command[1] = folder
    code, _, err = run(capsys, *command, "--preset", "paper", "--model", moved)  # the same model elsewhere
    assert code == 0 and "an answer for all 3 pictures" in err
    assert output.read_bytes() == before


def test_two_runs_on_one_file(repo_folder, folder, tmp_path):
    """Started at once: one answers, the other is refused, and no picture is answered twice."""
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "recoverable_llava.tools.command_line", "batch", str(folder), "why?"]
    command += ["--model", repo_folder, "--max-new-tokens", "2", "--output", str(output)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    refused = [error for error in errors if f"{output}' is being written by another run" in error]
    assert sorted(run.returncode for run in runs) == ([0, 2] if refused else [0, 0]), errors
    assert sorted(line["image"] for line in lines(output)) == ["a.png", "b.jpg", "deeper/c.webp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "folder"]


def test_a_file_in_use_is_refused_and_a_killed_run_leaves_it_free(capsys, repo_folder, folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    command = ["batch", folder, "why?", "--model", repo_folder, "--max-new-tokens", 2, "--output", output]
    script = (
        "import sys, time; from pathlib import Path; from recoverable_llava.tools.answers_file import AnswersFile\n"
        "with AnswersFile(Path(sys.argv[1]), 'why?', {}): print('open', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        code, _, err = run(capsys, *command)
        assert code == 2 and f"{output}' is being written by another run" in err
    finally:
        holder.kill()
        holder.wait()
    assert run(capsys, *command)[0] == 0
    assert len(lines(output)) == 3


def test_a_failed_start_leaves_nothing_behind(capsys, repo_folder, folder, tmp_path):
    output = tmp_path / "answers.jsonl"
    command = ["batch", folder, "why?", "--model", repo_folder, "--device", "tpu9", "--output", output]
    assert run(capsys, *command)[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_pictures_that_the_checkpoint_was_not_made_for(capsys, repo_folder, folder, tmp_path):
    """One warning, whatever the number of pictures; none for a drawn scene, none for a model of photos."""
    drawn = tmp_path / "drawn"
    shutil.copytree(repo_folder, drawn)
    config = json.loads((drawn / "config.json").read_text())
    (drawn / "config.json").write_text(json.dumps({**config, "picture_domain": asking.DRAWN_SCENES}))
    options = ["why?", "--max-new-tokens", 2, "--model"]
    scene = tmp_path / "scene.png"
    Image.new("RGB", (84, 84)).save(scene)
    assert "knows drawn scenes only" in run(capsys, "ask", folder / "a.png", *options, drawn)[2]
    assert "knows drawn scenes only" not in run(capsys, "ask", scene, *options, drawn)[2]
    assert "knows drawn scenes only" not in run(capsys, "ask", folder / "a.png", *options, repo_folder)[2]
    err = run(capsys, "batch", folder, *options, drawn, "--output", tmp_path / "answers.jsonl")[2]
    assert err.count("knows drawn scenes only") == 1 and "a.png" in err


def test_scenes_of_several_sizes():
    """A checkpoint whose scenes are larger says of which height and width they are."""
    config = RecoverableLlavaNextConfig(picture_domain=asking.DRAWN_SCENES, picture_sizes=[[800, 1200], [336, 336]])
    sizes = [(1200, 800), (800, 1200), (336, 336)]
    assert [asking.is_unfamiliar(config, Image.new("RGB", size)) for size in sizes] == [False, True, False]


def test_a_full_disk_is_said_with_the_file(capsys, repo_folder, folder, picture, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    (tmp_path / "kept.png").symlink_to("/dev/full")
    monkeypatch.setattr("recoverable_llava.tools.command_line._check_overlay", lambda path: None)
    code, _, err = run(
        capsys,
        "ask",
        picture,
        "why?",
        "--model",
        repo_folder,
        "--max-new-tokens",
        2,
        "--overlay",
        tmp_path / "kept.png",
    )
    assert code == 2 and "kept.png' cannot be written: No space left" in err


def test_batch_goes_on_after_a_broken_picture(capsys, repo_folder, folder, tmp_path):
    (folder / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    Image.new("RGB", (12_000, 1)).save(folder / "strip.png")
    output = tmp_path / "answers.jsonl"
    code, _, err = run(
        capsys, "batch", folder, "why?", "--model", repo_folder, "--max-new-tokens", 2, "--output", output
    )
    assert code == 1
    assert "a.png" in err and "strip.png' has 12000 × 1 pixels" in err and "2 could not be" in err
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


def no_work(*_, **__):
    pytest.fail("the weights were loaded for a call that was wrong from the start")


def test_mistakes_are_one_line_and_exit_code_2(
    capsys, repo_folder, llava_folder, picture, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text('{"something": "else"}\n')
    binary, pipe = tmp_path / "binary.jsonl", tmp_path / "pipe.jsonl"
    binary.write_bytes(b"\xff\xfe\n")
    os.mkfifo(pipe)
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "empty.png").mkdir()
    monkeypatch.setattr(RecoverableLlavaForConditionalGeneration, "from_pretrained", no_work)
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
        (["batch", str(folder), " "], "QUESTION is empty"),
        (["ask", picture, "why?", "--overlay", "nowhere/kept.png"], "kept.png': there is no folder 'nowhere'"),
        (["ask", picture, "why?", "--overlay", str(empty) + ".png"], "empty.png' is no file"),
        (["ask", picture, "why?", "--model", repo_folder, "--budget", "5", "--threshold", "1"], "decides nothing"),
        (["ask", picture, "why?", "--model", repo_folder, "--no-compress", "--preset", "paper"], "leave one out"),
        (["ask", picture, "why?", "--model", repo_folder, "--device", "tpu9"], "device='tpu9'"),
        *(
            (
                ["batch", str(folder), "why?", "--model", repo_folder, "--output", str(output)],
                f"{output.name}' {message}",
            )
            for output, message in [
                (other, "was not written by this command"),
                (binary, "was not written by this command"),
                (pipe, "is no file"),
                (empty, "is no file"),
            ]
        ),
        (["batch", str(folder), "why?", "--model", repo_folder, "--output", str(other / "a")], "other.jsonl"),
    ]
    for arguments, message in cases:
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.count("\n") == 1, err
        assert re.search(message, err), err


def test_damaged_weights(capsys, repo_folder, picture, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(repo_folder, damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    code, out, err = run(capsys, "ask", picture, "why?", "--model", damaged)
    assert (code, out) == (2, "") and f"The weights of '{damaged}' are damaged" in err and err.count("\n") == 1


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
