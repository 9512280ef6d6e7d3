"""The pictures that the demo asks about: scenes of the kinds that the embedded checkpoints were trained on, held out.

`training/` drew both as test scenes: `scene.png` for LLaVA-1.5 (commit 5312e3e), `large_scene.png` for LLaVA-NeXT
(commit f12b126, number 272 of `tiled_examples("test", 273)`). The pictures of objects on them are Noto Emoji (SIL Open
Font License). The answers are what a picture shows.
"""

from pathlib import Path


PICTURE = Path(__file__).parent / "scene.png"
ANSWERS = {
    "What word is under the lemon?": "RAIN",
    "What color is the plate of the penguin?": "red",
    "Where is the cactus?": "bottom right",
    "How many pictures of a whale are there?": "2",
    "Is there an airplane in the picture?": "no",
}

LARGE_PICTURE = Path(__file__).parent / "large_scene.png"
LARGE_ANSWERS = {
    "What word is under the fox?": "HAM",
    "What color is the plate of the bee?": "purple",
    "Where is the clock?": "top right",
    "How many pictures of a train are there?": "3",
    "Is there a rocket in the picture?": "no",
}
