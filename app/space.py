"""`python -m app.space FOLDER`: everything that a Hub Space with this app needs, ready for `hf upload`.

hf upload OWNER/NAME FOLDER --repo-type space
"""

import argparse
import shutil
import sys
from pathlib import Path

import gradio

from recoverable_llava.tools.command_line import EMBEDDED_CHECKPOINT


ROOT = Path(__file__).parents[1]
README = f"""---
title: Recoverable LLaVA
emoji: 🔎
colorFrom: yellow
colorTo: blue
sdk: gradio
sdk_version: {gradio.__version__}
app_file: start.py
license: apache-2.0
short_description: A LLaVA that reads only the tokens your question needs
---

Upload a picture, ask, and see which visual tokens stay: kept by vision, recovered for the question, or merged.
"""
START = """import sys

from app.__main__ import main

sys.exit(main([*{arguments!r}, *sys.argv[1:]]))
"""


def build_space(folder: Path, model: str = EMBEDDED_CHECKPOINT) -> None:
    """Writes the Space; a checkpoint in a folder is copied into it, one on the Hub is named.

    Raises:
        ValueError: if the folder exists.
    """
    if folder.exists():
        raise ValueError(f"The folder {str(folder)!r} exists: name a new one.")
    without = shutil.ignore_patterns("__pycache__", "*.pyi")
    for package in ("app", "recoverable_llava"):
        shutil.copytree(ROOT / package, folder / package, ignore=without)
    if Path(model).is_dir():
        shutil.copytree(model, folder / "model", ignore=without)
        model = "model"
    (folder / "README.md").write_text(README, encoding="utf-8")
    requirements = ["torch", "transformers>=5.12", "accelerate", "pillow>=10.1", "numpy", "tqdm", "filelock"]
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    (folder / "start.py").write_text(START.format(arguments=["--model", model]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app.space", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="folder or Hub repo (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        build_space(arguments.folder, arguments.model)
    except ValueError as error:
        print(f"python -m app.space: {error}", file=sys.stderr)
        return 2
    print(f"Built {arguments.folder}; publish it with: hf upload OWNER/NAME {arguments.folder} --repo-type space")
    return 0


if __name__ == "__main__":
    sys.exit(main())
