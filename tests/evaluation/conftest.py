"""A folder of questions about random pictures, and a tiny model to compare methods on."""

import json

import pytest
import tiny

from evaluation.compared_model import load_compared
from evaluation.examples import load_examples
from recoverable_llava.tools.combine import combine


QUESTIONS = ["what is this ?", "how many dog are there ?", "where is the cat ?", "describe the red picture please"]


@pytest.fixture(scope="module")
def questions_file(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
        for question in QUESTIONS[: 2 + number % 2]:
            text = {"question": f"{number} {question}", "answer": "a cat", "kind": question[:3]}
            lines.append({"image": f"{number}.png", **text})
    lines.append(
        {"image": "3.png", "question": "why ?", "answer": "no", "kind": "second turn", "history": [["what ?", "dog"]]}
    )
    file = folder / "questions.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture(scope="module")
def setting(repo_folder, questions_file):
    images, examples = load_examples(str(questions_file), "test", 10)
    return *load_compared(repo_folder), images, examples


@pytest.fixture(scope="module")
def tiled_repo_folder(tmp_path_factory, clip_folder):
    folder = tmp_path_factory.mktemp("tiled")
    tiny.save_tiny_llava(folder / "stock", clip_folder, family="llava_next")
    for part in combine(str(folder / "stock"), clip_folder, **tiny.RECOVERY):
        part.save_pretrained(folder / "repo")
    return str(folder / "repo")


@pytest.fixture(scope="module")
def tiled_setting(tiled_repo_folder, questions_file):
    """As `setting`, for LLaVA-NeXT."""
    images, examples = load_examples(str(questions_file), "test", 10)
    return *load_compared(tiled_repo_folder), images, examples
