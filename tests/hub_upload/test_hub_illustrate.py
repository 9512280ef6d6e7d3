"""The overlay picture and its counts in the card."""

import re

import pytest
from batches import both_families
from PIL import Image

from hub_upload.illustrate import illustrate


@both_families
def test_card_shows_the_picture_and_what_was_counted(built, family, pictures, tmp_path):
    pictures[0].save(tmp_path / "photo.png")
    for question in ("what is the colour of the cat?", "where is the dog?"):  # a second one replaces the first
        overlay = illustrate(built, tmp_path / "photo.png", question)
    assert Image.open(overlay).size[0] > 100
    card = (built / "README.md").read_text()
    assert card.count("(recovery_overlay.png)") == 1
    assert "where is the dog?" in card and "the colour of the cat" not in card
    total, of, *counts = map(
        int,
        re.search(
            r"(\d+) of (\d+) visual tokens remain: (\d+) kept by vision, (\d+) recovered .*, (\d+) merged", card
        ).groups(),
    )
    assert total == sum(counts)
    # 120 x 100 pixels in four tiles of 6 x 6 patches: 12 columns and a new line, and 10 rows that hold a picture.
    assert of == {"llava": 36, "llava_next": 36 + 13 * 10}[family]
    assert "python -m hub_upload illustrate compressed --image photo.png" in card
    assert str(tmp_path) not in card


def test_wrong_arguments(built, tmp_path):
    with pytest.raises(ValueError, match="pass a folder made by"):
        illustrate(tmp_path, tmp_path / "none.png", "what?")
    with pytest.raises(ValueError, match="pass a picture file"):
        illustrate(built, tmp_path / "none.png", "what?")
