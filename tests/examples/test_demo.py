"""The demo on the embedded checkpoint, and the truth of what it says about its picture."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from demo.scene import ANSWERS, PICTURE
from training.examples import scene_examples


@pytest.fixture(scope="module")
def scene():
    return next(iter(scene_examples("test", 1)))


def test_picture_is_the_first_test_scene(scene):
    assert np.array_equal(np.asarray(Image.open(PICTURE).convert("RGB")), np.asarray(scene.image()))


def test_answers_follow_from_the_scene(scene):
    from training.vocabulary import CLASSES, COLORS, COLUMNS, ROWS, WORDS

    def the(name):
        (item,) = [item for item in scene.scene.objects if CLASSES[item.class_index] == name]
        return item

    row, column = the("cactus").coarse_place
    counts = {CLASSES[index]: count for index, count in scene.scene.counts().items()}
    assert list(ANSWERS.values()) == [
        WORDS[the("lemon").word],
        list(COLORS)[the("penguin").color],
        f"{ROWS[row]} {COLUMNS[column]}",
        str(counts["whale"]),
        "yes" if "airplane" in counts else "no",
    ]


def test_demo_on_the_embedded_checkpoint(tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(output)])
    runpy.run_module("demo", run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("576 tokens") == len(ANSWERS)
    assert "576 tokens     RAIN" in out
    assert Image.open(output).width > 1500
