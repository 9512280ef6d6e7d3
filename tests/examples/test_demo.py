"""The demo on the embedded checkpoint, and on a LLaVA-NeXT."""

import runpy
import sys

import pytest
from PIL import Image
from transformers import ImageTextToTextPipeline

from demo.scene import ANSWERS, LARGE_ANSWERS, LARGE_PICTURE


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("demo", run_name="__main__")
    return end.value.code


def test_demo_on_the_embedded_checkpoint(tmp_path, monkeypatch, capsys):
    calls, call = [], ImageTextToTextPipeline.__call__

    def recorded(self, *arguments, **options):
        calls.append((self.model.config.compress, options["text"][0]["content"][0]["type"], "576 tokens" in printed()))
        return call(self, *arguments, **options)

    def printed():
        parts.append(capsys.readouterr().out)
        return "".join(parts)

    parts = []
    monkeypatch.setattr(ImageTextToTextPipeline, "__call__", recorded)
    output = tmp_path / "demo.png"
    assert run(monkeypatch, "--output", output) == 0
    assert printed().count("576 tokens") == len(ANSWERS)
    assert "576 tokens     RAIN" in printed()
    assert Image.open(output).width > 1500
    # Both kinds of answer were warmed up, with a picture, before any is timed.
    assert [kind for _, kind, _ in calls[:4]] == ["image"] * 4
    assert {compress for compress, _, _ in calls[:2]} == {compress for compress, _, _ in calls[2:4]} == {True, False}
    assert not any(shown for _, _, shown in calls[:4])
    assert len(calls) == 2 * len(ANSWERS) + 2


def test_a_model_that_sees_tiles_is_asked_about_a_larger_picture(tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo.png"
    assert run(monkeypatch, "--model", "checkpoints/tiny-next", "--output", output) == 0
    printed = capsys.readouterr().out
    assert f"{LARGE_PICTURE}, 1200 x 800 pixels" in printed
    num_tokens = 24 * 24 + 32 * (48 + 1)  # the base tile, and rows of patches with a new line
    for question, answer in LARGE_ANSWERS.items():
        assert f"{question}\n  to be seen      {answer}\n  {num_tokens} tokens     {answer}  (" in printed
    assert Image.open(output).width > 1500


def test_a_broken_picture_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.png").write_text("no picture")
    assert run(monkeypatch, "--image", tmp_path / "broken.png") == 2
    assert "broken.png' is no picture" in capsys.readouterr().err


def test_a_model_without_compression_is_said(monkeypatch, capsys, llava_folder):
    assert run(monkeypatch, "--model", llava_folder) == 2
    assert "is a 'llava' checkpoint without recoverable compression" in capsys.readouterr().err
