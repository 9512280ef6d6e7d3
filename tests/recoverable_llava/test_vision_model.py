"""The vision half alone: the weights, features and tokens of the whole model, without its language model."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from recoverable_llava import RecoverableLlavaForConditionalGeneration, RecoverableLlavaVisionModel


KEY_LISTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
FEATURES = ("patches", "class_tokens", "visual_scores", "keys", "relevance_embeds", "last_hidden_state")
BUDGET = 7


def load_both(repo_folder, **settings):
    whole = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder, **settings)
    half, info = RecoverableLlavaVisionModel.from_pretrained(repo_folder, output_loading_info=True, **settings)
    assert not any(info.get(name) for name in KEY_LISTS), info
    return whole.eval(), half.eval()


@pytest.fixture
def inputs(processor, pictures):
    prompts = ["USER: <image>\nwhat is it ? ASSISTANT:", "USER: <image>\nhow many dog are there ? ASSISTANT:"]
    return processor(images=[[picture] for picture in pictures[:2]], text=prompts, padding=True, return_tensors="pt")


def questions_of(inputs):
    return {name: inputs[name] for name in ("question_input_ids", "question_attention_mask")}


def test_its_weights_are_those_of_the_whole_model_but_the_language_model(repo_folder):
    whole, half = load_both(repo_folder)
    expected = {
        name.removeprefix("model."): weight
        for name, weight in whole.state_dict().items()
        if "language_model." not in name and "lm_head." not in name
    }
    weights = half.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    for part in ("vision_tower.", "multi_modal_projector.", "question_tower.", "visual_projection."):
        assert any(name.startswith(part) for name in weights), part
    assert not hasattr(half, "language_model") and not hasattr(half, "lm_head")


def test_saving_it_loses_nothing(repo_folder, tmp_path):
    _, half = load_both(repo_folder)
    half.save_pretrained(tmp_path)
    saved = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
    assert saved and not any("language_model" in name for name in saved)
    again, info = RecoverableLlavaVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.get(name) for name in KEY_LISTS), info
    weights = half.state_dict()
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())


SETTINGS = [
    {},
    {"selection": "paper", "text_relevance": "projected"},
    {"text_relevance": "negated", "attention_layer": 0},
    {"vision_feature_select_strategy": "full"},
    {"merge_remaining": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_features_and_tokens_are_those_of_the_whole_model(repo_folder, inputs, settings):
    whole, half = load_both(repo_folder, visual_token_budget=BUDGET, **settings)
    pixels, questions = inputs["pixel_values"], questions_of(inputs)
    features = [model.get_vision_features(pixels) for model in (whole, half)]
    for name in FEATURES:
        values = [getattr(each, name) for each in features]
        assert (values[0] is None and values[1] is None) or torch.equal(*values), name
    embeds = [model.get_question_embeds(questions["question_input_ids"]) for model in (whole, half)]
    assert torch.equal(*embeds)

    tokens = {}
    for name, given in {"questions": questions, "embeds": {"question_embeds": embeds[1]}, "none": {}}.items():
        theirs, ours = (model.get_image_features(pixels, **given) for model in (whole, half))
        assert [tuple(each.shape) for each in ours.pooler_output] == [(BUDGET, 32)] * 2
        assert all(torch.equal(a, b) for a, b in zip(theirs.pooler_output, ours.pooler_output, strict=True)), name
        assert torch.equal(theirs.last_hidden_state, ours.last_hidden_state)
        tokens[name] = torch.stack(list(ours.pooler_output))
    assert torch.equal(tokens["questions"], tokens["embeds"]) and not torch.equal(tokens["questions"], tokens["none"])

    # These are the tokens that the language model reads.
    seen = []
    whole.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    ids = inputs["input_ids"]
    is_surplus = (ids == whole.config.image_token_id) & ((ids == whole.config.image_token_id).cumsum(1) > BUDGET)
    for row in range(2):
        short = ids[row : row + 1, ~is_surplus[row]]
        given = {name: value[row : row + 1] for name, value in questions.items()}
        whole(input_ids=short, pixel_values=pixels[row : row + 1], **given)
        visual = seen[-1][0, short[0] == whole.config.image_token_id]
        torch.testing.assert_close(visual, tokens["questions"][row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"compress": False, "visual_token_budget": BUDGET}], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
@torch.no_grad()
def test_without_a_budget_every_patch_is_a_token_as_in_stock(repo_folder, llava_folder, inputs, settings, strategy):
    """A number of tokens that depends on the image cannot be told to an engine that asks for features."""
    settings = {**settings, "vision_feature_select_strategy": strategy}
    whole, half = load_both(repo_folder, **settings)
    stock = LlavaForConditionalGeneration.from_pretrained(llava_folder, vision_feature_select_strategy=strategy)
    pixels = inputs["pixel_values"]
    expected = stock.get_image_features(pixels)
    for model in (whole, half):
        found = model.get_image_features(pixels)
        assert len(found.pooler_output) == 2
        assert all(torch.equal(a, b) for a, b in zip(expected.pooler_output, found.pooler_output, strict=True))
        assert torch.equal(expected.last_hidden_state, found.last_hidden_state)


@torch.no_grad()
def test_adaptive_tokens_step_by_step(repo_folder, inputs):
    """Without a budget the steps are called one by one, and the caller reads how many tokens there are."""
    whole, half = load_both(repo_folder)
    settings = half.config.recovery_settings()
    vision = half.get_vision_features(inputs["pixel_values"])
    questions = half.embed_questions(2, **questions_of(inputs))
    recovery = half.recover(
        vision,
        questions,
        settings,
        lambda selection: (int(selection.num_tokens.max()), int(selection.num_merged.max())),
    )
    expected = whole.recover_tokens(**inputs)
    assert torch.equal(recovery.selection.num_tokens, expected.selection.num_tokens)
    assert torch.equal(recovery.assembly.token_index, expected.assembly.token_index)
    assert torch.equal(recovery.assembly.merge_weights, expected.assembly.merge_weights)
    assert half.project(vision, recovery.assembly).shape[1] == int(recovery.selection.num_tokens.max()) < 36


def test_questions_that_are_not_one_per_image_are_an_error(repo_folder, inputs):
    _, half = load_both(repo_folder, visual_token_budget=BUDGET)
    questions = {name: value[:1] for name, value in questions_of(inputs).items()}
    with pytest.raises(ValueError, match="question_input_ids has 1 rows, but there are 2"):
        half.get_image_features(inputs["pixel_values"], **questions)
