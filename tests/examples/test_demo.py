"""The demo on the embedded checkpoint."""

import runpy
import sys

from PIL import Image

from demo.scene import ANSWERS


def test_demo_on_the_embedded_checkpoint(tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(output)])
    runpy.run_module("demo", run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("576 tokens") == len(ANSWERS)
    assert "576 tokens     RAIN" in out
    assert Image.open(output).width > 1500
