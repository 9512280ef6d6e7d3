"""The paper's table from results files of lmms-eval."""

import json

import pytest

from evaluation.paper_table import PUBLISHED, main, read_results, retained


def results_file(tmp_path, name, results, **more):
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps({"results": results, "config": {"model_args": name}, **more}))
    return file


def test_published_rows_give_the_published_mean():
    everything, *_, ours = PUBLISHED.values()
    assert retained(ours, everything) == pytest.approx(90.5, abs=0.1)


def test_our_row_stands_beside_the_published_ones(tmp_path, capsys):
    throughput = {"avg_mean_visual_tokens": 57.9}
    scores = {
        "pope": {"pope_f1_score,none": 0.8},
        "gqa": {"exact_match,none": 0.5},
        "mme": {"mme_perception_score,none": 1200},
    }
    ours = results_file(tmp_path, "ours", scores, throughput=throughput)
    full = results_file(tmp_path, "full", {"pope": {"pope_f1_score,none": 0.9}, "gqa": {"exact_match,none": 0.6}})
    assert read_results(ours).scores == {"POPE": 80.0, "GQA": 50.0, "MME": 1200}
    main([str(ours), "--everything", str(full)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(PUBLISHED) + 2
    assert lines[-1].startswith("| ours | 57.9 |") and lines[-1].endswith("| 86.1 |")


def test_a_file_without_the_papers_tasks_is_an_error(tmp_path):
    file = results_file(tmp_path, "other", {"scenes": {"choice,none": 1.0}})
    with pytest.raises(ValueError, match="none of the paper's tasks"):
        read_results(file)
