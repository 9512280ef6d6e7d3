"""The picture that the demo asks about: a scene of the kind that the embedded checkpoint was trained on, held out.

`scene.png` was drawn as a test scene by `training/` (commit 5312e3e). The pictures of objects on it are Noto Emoji (SIL
Open Font License). The answers are what the picture shows.
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
