"""Second answers on the returned cache, on a tiny model with random weights."""

import json

import pytest

from evaluation.conversations import answer_on_returned_cache, main
from evaluation.methods import METHODS
from evaluation.report import ALL_TOKENS
from evaluation.runner import Run


def test_with_all_tokens_cache_and_history_agree(setting):
    model, processor, images, examples = setting
    second = next(example for example in examples if example.history)
    names = {ALL_TOKENS: None, "ours": 5, "random": 5}
    runs = [Run(name, METHODS[name], budget) for name, budget in names.items()]
    everything, ours, random = answer_on_returned_cache(model, processor, images, second, runs, max_new_tokens=4)
    assert everything[0] == everything[1]
    assert random[0] == random[1]  # what does not depend on the question is the same either way
    assert all(answer for answer in ours)
    with pytest.raises(ValueError, match="must hold one turn, got 0"):
        answer_on_returned_cache(model, processor, images, examples[0], runs)


def test_command(repo_folder, questions_file, tmp_path, capsys):
    file = tmp_path / "conversations.json"
    places = ["--model", repo_folder, "--data", str(questions_file), "--output", str(file), "--device", "cpu"]
    main([*places, "--methods", "ours", "class attention", "--budget", "6"])
    assert [row["method"] for row in json.loads(file.read_text())["rows"]] == [ALL_TOKENS, "ours", "class attention"]
    assert "on the returned cache" in capsys.readouterr().out
