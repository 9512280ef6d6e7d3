"""The comparison on a tiny model with random weights: every method runs through the model's own path."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.__main__ import main
from evaluation.compared_model import gather_evidence
from evaluation.examples import Example, load_examples
from evaluation.methods import METHODS, TILED_METHODS, Method, find_methods
from evaluation.report import ALL_TOKENS
from evaluation.runner import Batches, Run, conversation, plan_runs, run_all
from recoverable_llava import RecoverableLlavaForConditionalGeneration, RecoverableLlavaNextForConditionalGeneration
from recoverable_llava.tools.settings import configured


# The tiny tower has 36 patches.
BUDGETS = [9, 4]
# Random patches differ widely: only a high threshold leaves some out.
STRICT = {"novelty_threshold": 0.9}


def test_every_method_answers_and_meets_its_budget(setting):
    methods = {name: method for name, method in METHODS.items() if "paper" not in name}
    runs = plan_runs(methods, [*BUDGETS, None])
    outcomes = run_all(*setting, runs, batch_size=4, max_new_tokens=3)
    for run, outcome in zip(runs, outcomes, strict=True):
        assert len(outcome.answers) == len(setting[3])
        if run.budget is not None:
            assert (outcome.num_tokens == run.budget).all(), run.name
        if run.name == ALL_TOKENS:
            assert (outcome.num_tokens == 36).all() and outcome.agrees.all()
    assert any(not outcome.agrees.all() for outcome in outcomes)


def test_all_tokens_and_our_own_method_are_the_plain_model(setting, repo_folder):
    model, processor, images, examples = setting
    runs = [
        Run(ALL_TOKENS, METHODS[ALL_TOKENS], None),
        Run("ours", METHODS["ours"], 7),
        Run("ours", Method(settings=STRICT), None),
    ]
    everything, fixed, adaptive = run_all(*setting, runs, batch_size=3, max_new_tokens=4)
    plain = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder).eval()
    for number, example in enumerate(examples):
        prompt = processor.apply_chat_template(conversation(example), add_generation_prompt=True)
        inputs = processor(images=images[example.image], text=prompt, return_tensors="pt")
        for outcome, settings in [
            (everything, {"compress": False}),
            (fixed, {"visual_token_budget": 7}),
            (adaptive, STRICT),
        ]:
            with configured(plain.config, **settings):
                sequence = plain.generate(**inputs, do_sample=False, max_new_tokens=4)[0]
            answer = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            assert outcome.answers[number] == answer
    assert (adaptive.num_tokens == adaptive.num_tokens[0]).sum() < len(examples)


@pytest.mark.parametrize("order", [[20, 9, None], [9, 20, None]])
def test_every_method_of_tiles_answers_and_meets_its_budget(tiled_setting, order):
    runs = plan_runs(TILED_METHODS, order)
    outcomes = run_all(*tiled_setting, runs, batch_size=4, max_new_tokens=3)
    by_run = {(run.name, run.budget): outcome for run, outcome in zip(runs, outcomes, strict=True)}
    for (name, budget), outcome in by_run.items():
        if budget is not None and name != "HiRED, with new lines":
            assert (outcome.num_tokens == budget).all(), name
        # What a larger budget has picked already costs a smaller one nothing, which is not its time.
        is_known = not (budget == 9 and any(peer in name for peer in ("DivPrune", "SCOPE", "CDPruner", "MMTok")))
        assert (outcome.selector_milliseconds is not None) == is_known, name
    assert by_run[ALL_TOKENS, None].num_tokens.min() > 36
    assert any(not outcome.agrees.all() for outcome in outcomes)


def test_all_tokens_and_our_own_method_are_the_plain_model_of_tiles(tiled_setting, tiled_repo_folder):
    model, processor, images, examples = tiled_setting
    runs = [
        Run(ALL_TOKENS, TILED_METHODS[ALL_TOKENS], None),
        Run("ours", TILED_METHODS["ours"], 17),
        Run("ours", Method(settings=STRICT), None),
        Run("paper", Method(settings={"selection": "paper", "text_relevance": "projected"}), 11),
    ]
    outcomes = run_all(*tiled_setting, runs, batch_size=3, max_new_tokens=4)
    plain = RecoverableLlavaNextForConditionalGeneration.from_pretrained(tiled_repo_folder).eval()
    all_settings = [
        {"compress": False},
        {"visual_token_budget": 17},
        STRICT,
        {"selection": "paper", "text_relevance": "projected", "visual_token_budget": 11},
    ]
    for number, example in enumerate(examples):
        prompt = processor.apply_chat_template(conversation(example), add_generation_prompt=True)
        inputs = processor(images=images[example.image], text=prompt, return_tensors="pt")
        for outcome, settings in zip(outcomes, all_settings, strict=True):
            with configured(plain.config, **settings):
                sequence = plain.generate(**inputs, do_sample=False, max_new_tokens=4)[0]
            answer = processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            assert outcome.answers[number] == answer


def test_answers_do_not_depend_on_the_batch_of_tiles(tiled_setting):
    names = ["ours", "HiRED, with new lines", "CDPruner", "MMTok", "VisionZip"]
    runs = plan_runs(find_methods(names, TILED_METHODS), [12, None])
    together = run_all(*tiled_setting, runs, batch_size=16, max_new_tokens=3)
    apart = run_all(*tiled_setting, runs, batch_size=1, max_new_tokens=3)
    for one, other in zip(together, apart, strict=True):
        assert one.answers == other.answers and np.array_equal(one.num_tokens, other.num_tokens)


def test_what_does_not_begin_in_time_is_not_asked(tiled_setting):
    runs = [Run(ALL_TOKENS, TILED_METHODS[ALL_TOKENS], None), Run("random", TILED_METHODS["random"], 9)]
    outcomes = run_all(*tiled_setting, runs, batch_size=4, max_new_tokens=1, seconds=0)
    assert [len(outcome.answers) for outcome in outcomes] == [4, 4]


def test_answers_do_not_depend_on_the_batch(setting):
    runs = plan_runs(find_methods(["ours", "CDPruner", "PruMerge"]), [9, None])
    together = run_all(*setting, runs, batch_size=16, max_new_tokens=3)
    apart = run_all(*setting, runs, batch_size=1, max_new_tokens=3)
    for one, other in zip(together, apart, strict=True):
        assert one.answers == other.answers and np.array_equal(one.num_tokens, other.num_tokens)


def test_the_question_that_guides_is_the_one_asked_for(setting):
    model, processor, images, examples = setting
    assert all(e.wrong_question for e in examples)
    runs = [
        Run(ALL_TOKENS, METHODS[ALL_TOKENS], None),
        *(
            Run(which, Method(settings={"selection": "paper"}, question=which), None)
            for which in ("own", "wrong", "none")
        ),
    ]
    _, own, wrong, none = run_all(*setting, runs, batch_size=4, max_new_tokens=2)
    assert not np.array_equal(own.num_tokens, none.num_tokens)
    assert not np.array_equal(own.num_tokens, wrong.num_tokens)


@torch.no_grad()
def test_evidence_agrees_with_the_towers_own_outputs(setting, repo_folder):
    """The class attention against an eager tower's, embeddings against CLIP's own path."""
    model, processor, images, examples = setting
    inputs = Batches(processor, images, examples, 4)[0]
    constant = processor.question_tokenizer("a", padding="max_length", return_tensors="pt")["input_ids"]
    evidence = gather_evidence(
        model.model,
        inputs["pixel_values"],
        inputs["question_input_ids"],
        inputs["question_attention_mask"],
        constant,
        inputs["row_of_question"],
    )
    eager = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder, attn_implementation="eager").eval()
    rows = inputs["row_of_question"]
    outputs = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    for scores, attention in [
        (evidence.class_attention, outputs.attentions[-1]),
        (evidence.previous_class_attention, outputs.attentions[-2]),
    ]:
        torch.testing.assert_close(scores, attention.mean(1)[rows, 0, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(evidence.patches, outputs.hidden_states[-2][rows, 1:], atol=1e-4, rtol=1e-4)
    assert evidence.undivided_class_attention.sum(1).max() <= 1.0001
    last = evidence.question_token_mask.sum(1)
    assert (last == inputs["question_attention_mask"].sum(1) - 2).all()
    for name in ("projected", "negated", "value"):
        with configured(model.config, text_relevance=name):
            vision = model.get_vision_features(inputs["pixel_values"])
        expected = (vision.relevance_embeds[rows] @ evidence.question_embedding[:, :, None]).squeeze(2)
        torch.testing.assert_close(evidence.relevance[name], expected)


def test_the_command_writes_its_files(repo_folder, questions_file, tmp_path, capsys):
    options = [
        "--methods",
        "ours",
        "random",
        "--budgets",
        "9",
        "adaptive",
        "--batch-size",
        "4",
        "--max-new-tokens",
        "2",
    ]
    places = ["--model", repo_folder, "--data", str(questions_file), "--output", str(tmp_path), "--device", "cpu"]
    main([*places, *options])
    document = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in document["rows"]] == [ALL_TOKENS, "ours", "ours", "random"]
    assert document["facts"]["questions"] == 11
    for name in ("results.csv", "results.md", "retained.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert "| ours | adaptive |" in capsys.readouterr().out


def test_scenes_have_all_kinds_and_wrong_questions_about_other_pictures():
    images, examples = load_examples("scenes", "validation", 6)
    assert len(images) == 6 and images[0].size == (336, 336)
    kinds = {example.kind for example in examples}
    assert {"existence", "attribute", "reading", "counting", "location", "relation", "choice", "second turn"} <= kinds
    by_question = {(e.kind, e.question): e.image for e in reversed(examples)}
    assert all(by_question[e.kind, e.wrong_question] != e.image for e in examples if e.kind == "existence")
    assert all(e.history for e in examples if e.kind == "second turn")
    assert load_examples("scenes", "validation", 6)[1] == examples


def test_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="Unknown methods .'none such'"):
        find_methods(["none such"])
    file = tmp_path / "questions.jsonl"
    file.write_text('{"image": "a.png", "question": "what ?"}')
    with pytest.raises(ValueError, match="without .'answer', 'kind'"):
        load_examples(str(file), "test", 1)
    with pytest.raises(ValueError, match="no fields .'no_such_field'"), configured(object(), no_such_field=1):
        pass


def test_conversation_has_the_picture_in_its_first_turn():
    messages = conversation(Example(0, "and then ?", "no", "second turn", (("what ?", "a dog"),)))
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in messages[2]["content"]] == ["text"]


def test_tiled_scenes_are_drawn_when_they_are_asked_for(monkeypatch):
    drawn = []

    class Drawn(SimpleNamespace):
        def image(self):
            drawn.append(self.question)
            return Image.new("RGB", (400, 340))

    def tiled_examples(split, count, kinds=None, seed=0):
        scene = SimpleNamespace(objects=[1, 2])
        for number in range(count):
            yield Drawn(scene=scene, kind="reading", question=f"{split} {seed} {number} ?", answer="a word")

    monkeypatch.setattr("training.examples.tiled_examples", tiled_examples, raising=False)
    images, examples = load_examples("tiled scenes", "test", 3, seed=5)
    assert len(images) == 3 and drawn == []
    assert images[1].size == (400, 340) and drawn == ["test 5 1 ?"]
    assert [example.image for example in examples] == [0, 1, 2]
    assert examples[2].answer == "a word" and examples[2].kind == "reading" and examples[2].num_objects == 2
    assert examples[0].wrong_question in ("test 5 1 ?", "test 5 2 ?")
