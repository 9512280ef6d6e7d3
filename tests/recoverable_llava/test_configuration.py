"""The configuration: what it holds, refuses and writes, and that a change at run time counts from the next call on."""

import json

import pytest
import tiny
import torch
from transformers import AutoConfig, CLIPTextConfig, LlavaConfig, LlavaNextConfig, SiglipVisionConfig

from recoverable_llava import (
    RecoverableLlavaConfig,
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaNextConfig,
    configuration_recoverable_llava,
    configuration_recoverable_llava_next,
)


def tiny_config(config_class=RecoverableLlavaConfig, **settings):
    vision_config = {"model_type": "clip_vision_model", **tiny.vision_config()}
    return config_class(vision_config=vision_config, **{**tiny.RECOVERY, **settings})


of_both_families = pytest.mark.parametrize(
    ("config_class", "stock_class"),
    [(RecoverableLlavaConfig, LlavaConfig), (RecoverableLlavaNextConfig, LlavaNextConfig)],
    ids=tiny.FAMILIES,
)


# Every hyperparameter, with a value that is not its default.
OTHER_VALUES = {
    "compress": False,
    "attention_layer": -2,
    "selection": "paper",
    "novelty_threshold": 0.7,
    "text_share": 0.25,
    "text_reach": 0.5,
    "visual_lof_neighbors": 7,
    "text_lof_neighbors": 8,
    "merge_lof_neighbors": 9,
    "lof_threshold": 1.25,
    "text_relevance": "projected",
    "merge_neighbors": 3,
    "text_merge_weight": 5.5,
    "merge_remaining": False,
    "min_visual_tokens": 2,
    "max_visual_tokens": 20,
    "visual_token_budget": 9,
}

BY_NOVELTY = ("novelty_threshold", "text_share", "text_reach")  # without meaning in the paper's preset


@of_both_families
def test_every_hyperparameter_survives_a_round_trip(tmp_path, config_class, stock_class):
    own_fields = set(config_class().to_dict()) - set(stock_class().to_dict())
    assert own_fields == {*OTHER_VALUES, "question_config", "auto_map"}
    config = tiny_config(config_class, **OTHER_VALUES, question_config={"hidden_size": 24, "projection_dim": 16})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for name, value in OTHER_VALUES.items():
        assert written[name] == value and value != getattr(tiny_config(), name)
    for loaded in (config_class.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is config_class
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert isinstance(loaded.question_config, CLIPTextConfig) and loaded.question_config.projection_dim == 16


@pytest.mark.parametrize(
    ("config_class", "module", "model_type"),
    [
        (RecoverableLlavaConfig, configuration_recoverable_llava, "recoverable_llava"),
        (RecoverableLlavaNextConfig, configuration_recoverable_llava_next, "recoverable_llava_next"),
    ],
    ids=tiny.FAMILIES,
)
def test_written_config_names_the_code_of_every_class(tmp_path, config_class, module, model_type):
    tiny_config(config_class).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == module.AUTO_MAP and written["model_type"] == model_type
    tiny_config(config_class).save_pretrained(tmp_path)  # over itself
    assert json.loads((tmp_path / "config.json").read_text()) == written


def test_preset_of_the_paper():
    config = RecoverableLlavaConfig()
    config.use_preset("paper")
    settings = {name: getattr(config, name) for name in OTHER_VALUES if name not in BY_NOVELTY}
    assert settings == {
        "compress": True,
        "selection": "paper",
        "attention_layer": -1,
        "visual_lof_neighbors": 20,
        "text_lof_neighbors": 20,
        "merge_lof_neighbors": 10,
        "lof_threshold": 1.5,
        "text_relevance": "projected",
        "merge_neighbors": 32,
        "text_merge_weight": 50.0,
        "merge_remaining": True,
        "min_visual_tokens": 1,
        "max_visual_tokens": None,
        "visual_token_budget": None,
    }
    assert config.num_patches == 576
    assert config.vision_feature_layer == -2 and config.question_config.model_type == "clip_text_model"


@of_both_families
def test_a_stock_config_with_nothing_added_is_complete(config_class, stock_class):
    stock = stock_class().to_dict()
    stock.pop("model_type")
    config = config_class(**stock)
    assert {name: value for name, value in config.to_dict().items() if name in stock} == stock


WRONG_VALUES = [
    ("compress", 1, "compress must be True or False, got 1"),
    ("compress", "no", "compress must be True or False, got 'no'"),
    ("merge_remaining", None, "merge_remaining must be True or False, got None"),
    ("attention_layer", 3, r"attention_layer must be a whole number from -3 to 2 .*\(36 patches, 3 layers\), got 3"),
    ("attention_layer", -4, "attention_layer must be a whole number from -3 to 2 .*, got -4"),
    ("attention_layer", None, "attention_layer .* got None"),
    ("visual_lof_neighbors", 36, "visual_lof_neighbors must be a whole number from 1 to 35 .*, got 36"),
    ("text_lof_neighbors", 0, "text_lof_neighbors must be a whole number from 1 to 35 .*, got 0"),
    ("merge_lof_neighbors", 2.5, "merge_lof_neighbors .* got 2.5"),
    ("lof_threshold", 0.9, "lof_threshold must be a finite number of at least 1.0, got 0.9"),
    ("lof_threshold", float("nan"), "lof_threshold must be a finite number .* got nan"),
    ("lof_threshold", "1.5", "lof_threshold must be a finite number .* got '1.5'"),
    ("text_relevance", "cosine", r"text_relevance must be one of \('projected', 'negated', 'value'\), got 'cosine'"),
    ("text_relevance", None, "text_relevance must be one of .* got None"),
    ("merge_neighbors", -1, "merge_neighbors must be a whole number of at least 0 .*, got -1"),
    ("text_merge_weight", -0.5, "text_merge_weight must be a finite number of at least 0.0, got -0.5"),
    ("text_merge_weight", float("inf"), "text_merge_weight must be a finite number .* got inf"),
    ("min_visual_tokens", 0, "min_visual_tokens must be a whole number from 1 to 36 .*, got 0"),
    ("min_visual_tokens", 37, "min_visual_tokens must be a whole number from 1 to 36 .*, got 37"),
    ("max_visual_tokens", 0, "max_visual_tokens must be a whole number of at least 1 .*, got 0"),
    ("visual_token_budget", 0, "visual_token_budget must be a whole number from 1 to 36 .*, got 0"),
    ("visual_token_budget", 37, "visual_token_budget must be a whole number from 1 to 36 .*, got 37"),
    ("visual_token_budget", True, "visual_token_budget .* got True"),
    ("visual_token_budget", 4.0, r"visual_token_budget .* got 4\.0"),
    ("selection", "diversity", r"selection must be one of \('novelty', 'paper'\), got 'diversity'"),
    ("selection", None, r"selection must be one of .* got None"),
    ("novelty_threshold", -0.1, "novelty_threshold must be a finite number of at least 0.0, got -0.1"),
    ("text_share", 1.5, "text_share must be at most 1.0, got 1.5"),
    ("text_reach", True, "text_reach must be a finite number .* got True"),
]


@pytest.mark.parametrize("name, value, message", WRONG_VALUES)
def test_wrong_values_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**{name: value})
    changed_later = tiny_config()
    setattr(changed_later, name, value)
    with pytest.raises(ValueError, match=message):
        changed_later.validate_recovery()


def test_limits_that_contradict_are_refused():
    with pytest.raises(ValueError, match="max_visual_tokens must be a whole number of at least 12 .*, got 11"):
        tiny_config(min_visual_tokens=12, max_visual_tokens=11)


def test_the_class_token_counts_as_a_token():
    full = {"vision_feature_select_strategy": "full"}
    assert tiny_config(**full, visual_token_budget=37).num_class_tokens == 1
    with pytest.raises(ValueError, match="visual_token_budget must be a whole number from 2 to 37 .*, got 1"):
        tiny_config(**full, visual_token_budget=1)
    with pytest.raises(ValueError, match="max_visual_tokens must be a whole number of at least 2 .*, got 1"):
        tiny_config(**full, max_visual_tokens=1)


@of_both_families
def test_only_a_clip_vision_tower_will_do(config_class, stock_class):
    with pytest.raises(ValueError, match="needs a CLIP vision tower .* 'siglip_vision_model'"):
        config_class(vision_config=SiglipVisionConfig())


def test_an_image_has_the_patches_of_all_its_tiles():
    assert RecoverableLlavaNextConfig().num_patches == 5 * 576
    settings = {"config_class": RecoverableLlavaNextConfig, "image_grid_pinpoints": tiny.PINPOINTS}
    assert tiny_config(**settings).num_patches == 5 * 36
    assert tiny_config(**settings, visual_token_budget=180).visual_token_budget == 180
    with pytest.raises(ValueError, match=r"visual_token_budget must be a whole number from 1 to 180 .*, got 181"):
        tiny_config(**settings, visual_token_budget=181)
    with pytest.raises(ValueError, match=r"text_lof_neighbors must be a whole number from 1 to 179 .*, got 180"):
        tiny_config(**settings, text_lof_neighbors=180)
    wide = tiny_config(RecoverableLlavaNextConfig, image_grid_pinpoints=[[84, 168], [336, 252]])
    assert wide.num_patches == (1 + 12) * 36


@pytest.mark.parametrize(
    "name, value, message", WRONG_VALUES[3:4] + WRONG_VALUES[9:10] + WRONG_VALUES[12:13] + WRONG_VALUES[24:25]
)
def test_a_wrong_value_at_run_time_is_refused_by_the_next_call(model, processor, pictures, name, value, message):
    inputs = processor(images=pictures[0], text="USER: <image>\nwhy ? ASSISTANT:", return_tensors="pt")
    setattr(model.config, name, value)
    for call in (model, model.generate, model.recover_tokens):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


# How each hyperparameter is changed, and what it changes.
EFFECTS = [
    ("attention_layer", 0, "chosen_by_vision"),
    ("visual_lof_neighbors", 2, "chosen_by_vision"),
    ("text_lof_neighbors", 2, "chosen_by_text"),
    ("merge_lof_neighbors", 1, "centres"),
    ("lof_threshold", 1.05, "chosen_by_vision"),
    ("text_relevance", "value", "chosen_by_text"),
    ("text_relevance", "negated", "chosen_by_text"),
    ("selection", "novelty", "chosen_by_vision"),
    ("novelty_threshold", 0.9, "chosen_by_vision"),
    ("text_share", 0.1, "chosen_by_text"),
    ("text_reach", 0.0, "chosen_by_text"),
    ("merge_neighbors", 1, "merge_weights"),
    ("text_merge_weight", 0.0, "merge_weights"),
    ("merge_remaining", False, "merges_remaining"),
    ("min_visual_tokens", 20, "chosen_by_vision"),
    ("max_visual_tokens", 3, "num_tokens"),
    ("visual_token_budget", 30, "num_tokens"),
]


@pytest.mark.parametrize("name, value, changes", EFFECTS)
def test_a_change_at_run_time_counts_from_the_next_call_on(model, processor, pictures, name, value, changes):
    prompts = ["USER: <image>\nwhat is the colour of the cat ? ASSISTANT:"] * 4
    inputs = processor(images=[[picture] for picture in pictures], text=prompts, padding=True, return_tensors="pt")
    if name not in BY_NOVELTY:
        model.config.use_preset("paper")
    model.config.lof_threshold = 1.1  # so that every step has something to do

    def recovered():
        recovery = model.recover_tokens(**inputs)
        return getattr(recovery.selection, changes, None), getattr(recovery.assembly, changes, None)

    first, first_logits = recovered(), model(**inputs).logits
    before = getattr(model.config, name)
    setattr(model.config, name, value)
    second, second_logits = recovered(), model(**inputs).logits
    for old, new in zip(first, second):
        assert old is None or old.shape != new.shape or not torch.equal(old, new)
    assert not torch.equal(first_logits, second_logits)
    setattr(model.config, name, before)
    for old, new in zip(first, recovered()):
        assert old is None or torch.equal(old, new)
    assert torch.equal(first_logits, model(**inputs).logits)


def test_presets():
    config = tiny_config(text_share=0.25)
    config.use_preset("paper")
    assert config.selection == "paper" and config.text_relevance == "projected"
    config.use_preset("default")
    assert config == tiny_config(text_share=0.25)
    with pytest.raises(ValueError, match="no preset 'papers'"):
        config.use_preset("papers")


def test_from_pretrained_takes_hyperparameters(repo_folder):
    model = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder, lof_threshold=1.75, compress=False)
    assert model.config.lof_threshold == 1.75 and model.config.compress is False


@pytest.mark.parametrize(
    "old, selection",
    [
        ({"diversity": False, "merge_centres": True}, "paper"),
        ({"diversity": False}, "paper"),
        ({"diversity": True, "merge_centres": False}, "novelty"),
        ({"merge_centres": False}, "novelty"),
        ({}, "novelty"),
    ],
    ids=str,
)
def test_configurations_from_before_there_was_a_selection(tmp_path, old, selection):
    written = tiny_config().to_dict()
    del written["selection"]
    (tmp_path / "config.json").write_text(json.dumps({**written, **old}))
    for load in (RecoverableLlavaConfig, AutoConfig):
        config = load.from_pretrained(tmp_path)
        assert config.selection == selection
        assert config.to_diff_dict() == tiny_config(selection=selection).to_diff_dict()
        config.save_pretrained(tmp_path / "again")
        again = json.loads((tmp_path / "again" / "config.json").read_text())
        assert again["selection"] == selection and not {"diversity", "merge_centres"} & set(again)
    assert RecoverableLlavaConfig(**old).selection == selection


def test_settings_of_a_call_are_those_of_its_beginning():
    config = tiny_config(text_share=0.25)
    settings = config.recovery_settings()
    own_fields = set(RecoverableLlavaConfig().to_dict()) - set(LlavaConfig().to_dict())
    assert set(vars(settings)) == own_fields - {"question_config", "auto_map"}
    assert all(value == getattr(config, name) for name, value in vars(settings).items())
    config.text_share = 0.75
    assert settings.text_share == 0.25 and config.recovery_settings().text_share == 0.75


def test_without_compression_its_settings_have_no_say():
    config = tiny_config()
    config.visual_token_budget, config.compress = 1000, False
    assert config.recovery_settings().compress is False
    config.compress = "no"
    with pytest.raises(ValueError, match="compress must be True or False, got 'no'"):
        config.recovery_settings()
    config.compress = True
    with pytest.raises(ValueError, match="visual_token_budget .* got 1000"):
        config.recovery_settings()
