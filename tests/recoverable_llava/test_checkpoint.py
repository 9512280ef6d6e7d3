"""The embedded checkpoint: complete, current, and able to answer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import recoverable_llava
from recoverable_llava import RecoverableLlavaConfig, RecoverableLlavaForConditionalGeneration
from training.examples import scene_examples


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def loaded():
    model, info = RecoverableLlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), AutoProcessor.from_pretrained(CHECKPOINT)


def test_code_is_that_of_the_package():
    """`make checkpoint-code` copies it."""
    package = Path(recoverable_llava.__file__).parent
    files = sorted(CHECKPOINT.glob("*.py"))
    assert {"modeling_recoverable_llava.py", "novelty_selection.py", "paper_selection.py"} <= {
        file.name for file in files
    }
    for file in files:
        assert file.read_bytes() == (package / file.name).read_bytes(), f"{file.name}: run make checkpoint-code"


def test_files_fit_a_git_host():
    weights = list(CHECKPOINT.glob("*.safetensors"))
    assert weights and all(file.stat().st_size <= 15_000_000 for file in weights)
    assert sum(file.stat().st_size for file in weights) <= 40_000_000
    assert not [file for file in CHECKPOINT.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ttf")]


def test_it_runs_with_the_defaults(loaded):
    names = ("selection", "novelty_threshold", "text_share", "text_reach", "text_relevance", "merge_remaining")
    config, defaults = loaded[0].config, RecoverableLlavaConfig()
    assert {name: getattr(config, name) for name in names} == {name: getattr(defaults, name) for name in names}


def test_auto_classes_find_it(loaded):
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32)
    assert type(model) is RecoverableLlavaForConditionalGeneration


def test_answers_survive_compression(loaded):
    """Of 14 held-out questions, two of each kind, at most one may be lost, with all tokens and with a tenth of them."""
    model, processor = loaded
    examples = list(scene_examples("test", 14, seed=11))
    prompts = [f"USER: <image>\n{example.question} ASSISTANT:" for example in examples]
    inputs = processor(
        images=[[example.image()] for example in examples], text=prompts, padding=True, return_tensors="pt"
    )
    for compress in (False, True):
        model.config.compress = compress
        sequences = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        texts = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = sum(text.strip() == example.answer for text, example in zip(texts, examples))
        assert right >= 13, (compress, texts, [example.answer for example in examples])
    kept = model.recover_tokens(**inputs).selection.num_tokens.float().mean()
    assert kept < 0.25 * 576
