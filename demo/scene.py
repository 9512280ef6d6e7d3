"""The picture that the demo asks about: a test scene that the embedded checkpoint was never trained on.

`scene.png` is the first one of the test split, drawn by `training.examples.scene_examples("test", 1)`; the pictures of
objects on it are Noto Emoji (SIL Open Font License). Questions and answers follow from the scene itself.
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
