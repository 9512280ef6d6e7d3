"""The plug-in for lmms-eval; runs where lmms-eval is installed (extra `eval`)."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("lmms_eval")

from evaluation.lmms_eval_plugin.model import (  # noqa: E402
    RecoverableLlavaForLmmsEval,
    generation_options,
    until_stop,
)
from evaluation.lmms_eval_tasks.__main__ import write_tasks  # noqa: E402


@pytest.fixture(scope="module")
def model(repo_folder):
    return RecoverableLlavaForLmmsEval(repo_folder, batch_size=3, device="cpu", visual_token_budget=9)


def requests(model, pictures, *second):
    documents = [{"picture": picture, "answer": "yes" if i % 2 else "no dog"} for i, picture in enumerate(pictures)]
    model.task_dict = {"task": {"test": documents}}
    contexts = ["what is this ?", "how many dog are there ?\nAnswer the question using a single word.", "why ?", "no"]
    return [
        SimpleNamespace(args=(context, *second, lambda document: [document["picture"]], number, "task", "test"))
        for number, context in enumerate(contexts)
    ]


def test_batches_answer_as_single_questions(model, pictures):
    options = {"max_new_tokens": 4, "temperature": 0}
    together = model.generate_until(requests(model, pictures, options))
    model.batch_size = 1
    apart = model.generate_until(requests(model, pictures, options))
    model.batch_size = 3
    assert [result.text for result in together] == [result.text for result in apart]
    assert model.meter.facts()["mean_visual_tokens"] == 9.0


def test_log_likelihood_agrees_with_a_forward_pass(model, pictures):
    wanted = requests(model, pictures, lambda document: document["answer"])
    scores = [result.text for result in model.loglikelihood(wanted)]
    for request, (score, is_greedy) in zip(wanted, scores, strict=True):
        context, target, to_visual, number, *_ = request.args
        document = model.task_dict["task"]["test"][number]
        inputs = model._inputs([context], [to_visual(document)])
        ids = model.processor.tokenizer(target(document), add_special_tokens=False, return_tensors="pt")["input_ids"]
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model.model(**inputs).logits[:, length - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits[0], ids[0])
        assert score == pytest.approx(float(expected), abs=1e-4)
        assert is_greedy == bool((logits.argmax(-1) == ids).all())


@pytest.mark.parametrize(
    "context, question",
    [
        ("<image>\nIs it red?\nAnswer the question using a single word.", "Is it red?"),
        ("Whose is it (asked by USER: 7) ?\nA. red\nB. blue", "Whose is it (asked by USER: 7) ? A. red B. blue"),
        ("Answer yes.", "Answer yes."),
        ("", ""),
    ],
)
def test_the_question_is_that_of_an_ordinary_call(model, pictures, context, question):
    """The context without the lines that only say how to answer; nothing else about the prompt differs."""
    picture, processor = pictures[0], model.processor
    inputs = model._inputs([context], [[picture]])
    text = context.replace("<image>", "").strip()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    ordinary = processor(images=picture, text=prompt, return_tensors="pt")
    assert set(inputs) == set(ordinary)
    assert all(torch.equal(inputs[name], ordinary[name]) for name in inputs)
    assert torch.equal(inputs["question_input_ids"], processor.question_inputs([question], "pt")["question_input_ids"])


def test_options_of_generation():
    assert generation_options({"temperature": 0, "top_p": 1.0}) == {
        "max_new_tokens": 128, "num_beams": 1, "do_sample": False
    }  # fmt: skip
    assert generation_options({"temperature": 0.5})["do_sample"]
    assert until_stop("a\n\nb", ["\n\n", ""]) == "a"


def test_unknown_setting_is_an_error(repo_folder):
    with pytest.raises(ValueError, match="no field of the model's configuration"):
        RecoverableLlavaForLmmsEval(repo_folder, device="cpu", no_such_field=1)


@pytest.mark.slow
def test_lmms_eval_itself_runs_both_tasks(repo_folder, tmp_path):
    write_tasks(tmp_path, "test", 2)
    command = [sys.executable, "-m", "lmms_eval", "--model", "recoverable_llava", "--tasks", "scenes,scenes_choice"]
    command += ["--model_args", f"pretrained={repo_folder},visual_token_budget=9", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "output")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "scenes_choice" in result.stdout and list((tmp_path / "output").rglob("*results.json"))
