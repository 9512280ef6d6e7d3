"""A folder of questions about random pictures, and a tiny model to compare methods on."""

import json

import pytest

from evaluation.compared_model import ComparedLlava
from evaluation.examples import load_examples
from recoverable_llava import RecoverableLlavaProcessor


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
    processor = RecoverableLlavaProcessor.from_pretrained(repo_folder)
    return ComparedLlava.from_pretrained(repo_folder).eval(), processor, images, examples
