"""Retained accuracy, its intervals, and the table."""

import json

import numpy as np
import pytest

from evaluation.examples import Example, is_correct
from evaluation.report import ALL_TOKENS, Outcome, make_table, markdown, write_table
from evaluation.statistics import PairedBootstrap, interval, wilson


def make_outcome(name, correct, budget=None, tokens=10.0):
    correct = np.asarray(correct, dtype=bool)
    tokens = np.broadcast_to(np.asarray(tokens, dtype=float), correct.shape)
    return Outcome(name, budget, correct, correct, tokens, 0.5, ["" for _ in correct])


def test_retained_is_the_mean_over_kinds_of_ratios():
    kinds = np.array(["a"] * 4 + ["b"] * 2)
    full = np.array([1, 1, 1, 1, 1, 0], dtype=bool)
    less = np.array([1, 0, 0, 1, 1, 0], dtype=bool)
    ratios = PairedBootstrap(np.arange(6), kinds).retained(less, full)
    assert ratios[0].tolist() == [0.5, 1.0]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(100):
        correct = generator.random(200) < 0.7
        part = interval(PairedBootstrap(np.arange(200), np.zeros(200), seed=trial).accuracy(correct).mean(1))
        hits += part.low <= 0.7 <= part.high
    assert 88 <= hits <= 100


def test_questions_about_one_picture_widen_the_interval():
    generator = np.random.default_rng(2)
    correct = np.repeat(generator.random(50) < 0.5, 8)
    together = interval(PairedBootstrap(np.repeat(np.arange(50), 8), np.zeros(400)).accuracy(correct)[:, 0])
    apart = interval(PairedBootstrap(np.arange(400), np.zeros(400)).accuracy(correct)[:, 0])
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_wilson_against_known_values():
    assert wilson(0, 10).low == pytest.approx(0.0, abs=1e-9)
    assert wilson(0, 10).high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(81, 263).low == pytest.approx(0.2553, abs=1e-4)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


def test_table(tmp_path):
    rng = np.random.default_rng(0)
    examples = []
    for image in range(30):
        for kind in ("a", "b"):
            examples.append(Example(image, "q", "yes", kind, num_objects=image % 14))
        examples.append(Example(image, "q", "yes", "second turn", (("q", "a"),), num_objects=image % 14))
    objects = np.array([example.num_objects for example in examples])
    full = make_outcome(ALL_TOKENS, np.ones(90), tokens=576)
    ours = make_outcome("ours", rng.random(90) < 0.9, 58)
    adaptive = make_outcome("ours", rng.random(90) < 0.9, None, tokens=20 + objects)
    other = make_outcome("other", rng.random(90) < 0.3, 58)
    fewer, more = make_outcome("ours", np.zeros(90), 24), make_outcome("ours", np.zeros(90), 64)
    rows = make_table(examples, [full, ours, adaptive, other, fewer, more], reference="ours")
    assert rows[0].retained.value == rows[0].retained.low == 100
    assert rows[2].tokens_follow_objects == pytest.approx(1.0)
    assert rows[2].budget == "adaptive" and rows[1].behind is None
    assert rows[3].behind.low > 30
    assert set(rows[1].accuracy) == {"a", "b", "crowded", "second turn"}
    assert rows[1].questions == 60
    single = np.array([example.kind != "second turn" for example in examples])
    assert rows[1].retained.value == pytest.approx(100 * ours.correct[single].mean())
    # 58 is the smallest fixed number that is not below the adaptive mean of some 27.
    difference = 100 * (adaptive.correct[single].mean() - ours.correct[single].mean())
    assert rows[2].ahead_of_fixed.value == pytest.approx(difference)
    assert rows[2].ahead_of_fixed.low < difference < rows[2].ahead_of_fixed.high
    assert all(row.ahead_of_fixed is None for row in rows if row is not rows[2])
    assert rows[1].behind_adaptive == rows[2].ahead_of_fixed
    assert rows[3].behind_adaptive.value == pytest.approx(rows[2].retained.value - rows[3].retained.value)
    assert all(row.behind_adaptive is None for row in (rows[0], rows[2], rows[4], rows[5]))  # 24 is fewer, 64 too many
    stricter = make_outcome("ours, threshold 0.3", adaptive.correct, None, tokens=20 + objects)
    assert make_table(examples, [full, ours, stricter])[2].ahead_of_fixed == rows[2].ahead_of_fixed
    write_table(rows, {"model": "x"}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["retained"]["value"] == rows[1].retained.value
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 7
    assert markdown(rows).count("\n") == 7


def test_table_needs_the_run_with_all_tokens():
    with pytest.raises(ValueError, match="hold no 'all tokens'"):
        make_table([Example(0, "q", "a", "k")], [make_outcome("ours", [1])])


def test_answers_are_compared_without_case_spaces_and_full_stop():
    assert is_correct(" Top  Left.", "top left")
    assert not is_correct("top right", "top left")
