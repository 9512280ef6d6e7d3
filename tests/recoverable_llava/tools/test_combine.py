"""Building from parts, and loading: no key missing, unexpected or mismatched, whatever layout the checkpoint has."""

import json
import re
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CLIPModel,
    LlavaForConditionalGeneration,
)

from recoverable_llava import (
    RecoverableLlavaConfig,
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    RecoverableLlavaProcessor,
    RecoverableLlavaVisionModel,
)
from recoverable_llava.tools.combine import combine


def assert_complete(info):
    assert not any(info.values()), info


def states_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------- combine


def test_every_weight_is_that_of_the_checkpoints(llava_folder, clip_folder):
    model, processor = combine(llava_folder, clip_folder, **tiny.RECOVERY)
    stock, clip = LlavaForConditionalGeneration.from_pretrained(llava_folder), CLIPModel.from_pretrained(clip_folder)
    state = model.state_dict()
    taken = {}
    for name, weight in stock.state_dict().items():
        taken[name] = weight
    for name, weight in clip.text_model.state_dict().items():
        taken[f"model.question_tower.text_model.{name}"] = weight
    taken["model.question_tower.text_projection.weight"] = clip.text_projection.weight
    taken["model.visual_projection.weight"] = clip.visual_projection.weight
    assert states_equal(state, taken)
    assert not model.training and type(processor) is RecoverableLlavaProcessor
    assert model.generation_config.to_dict() == stock.generation_config.to_dict()


def test_settings_reach_config_and_processor(llava_folder, clip_folder):
    model, processor = combine(llava_folder, clip_folder, **tiny.RECOVERY, visual_token_budget=7, lof_threshold=2.0)
    assert model.config.visual_token_budget == processor.visual_token_budget == 7
    assert model.config.lof_threshold == 2.0
    stock = LlavaForConditionalGeneration.from_pretrained(llava_folder).config
    for name in ("vision_config", "text_config", "image_token_id", "vision_feature_layer", "image_seq_length"):
        ours, theirs = getattr(model.config, name), getattr(stock, name)
        assert getattr(ours, "to_dict", lambda ours=ours: ours)() == getattr(theirs, "to_dict", lambda t=theirs: t)()
    with pytest.raises(ValueError, match="text_relevance"):
        combine(llava_folder, clip_folder, **tiny.RECOVERY, text_relevance="none")


def test_the_question_tokenizer_has_the_length_of_the_text_tower(llava_folder, clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "clip")
    file = tmp_path / "clip" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 10**30}))
    _, processor = combine(llava_folder, str(tmp_path / "clip"), **tiny.RECOVERY)
    assert processor.question_tokenizer.model_max_length == 77


@pytest.mark.parametrize("dtype, expected", [("auto", torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_dtype(llava_folder, clip_folder, dtype, expected):
    model, _ = combine(llava_folder, clip_folder, dtype=dtype, **tiny.RECOVERY)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_a_clip_of_another_width_is_refused(llava_folder, tmp_path):
    tiny.save_tiny_clip(tmp_path, hidden_size=48)
    with pytest.raises(ValueError, match=f"{llava_folder} has 32 channels, the one of {tmp_path} 48: pass the CLIP"):
        combine(llava_folder, str(tmp_path), **tiny.RECOVERY)


@pytest.mark.parametrize("part", ["llava", "clip"])
def test_an_incomplete_checkpoint_is_refused(llava_folder, clip_folder, tmp_path, part):
    folders = {"llava": llava_folder, "clip": clip_folder}
    broken = tmp_path / "broken"
    shutil.copytree(folders[part], broken)
    state = load_file(broken / "model.safetensors")
    lost = next(name for name in state if name.endswith(("mlp.fc1.weight", "q_proj.weight")))
    del state[lost]
    save_file({**state, "something.else": torch.zeros(2)}, broken / "model.safetensors", metadata={"format": "pt"})
    folders[part] = str(broken)
    with pytest.raises(ValueError, match=f"{broken} does not load completely .*missing_keys.*unexpected_keys"):
        combine(folders["llava"], folders["clip"], **tiny.RECOVERY)


@pytest.mark.parametrize("language_model", ["mistral", "qwen2"])
def test_other_language_models(clip_folder, tmp_path, pictures, language_model):
    tiny.save_tiny_llava(tmp_path, clip_folder, language_model=language_model)
    model, processor = combine(str(tmp_path), clip_folder, **tiny.RECOVERY)
    inputs = processor(images=pictures[0], text="USER: <image>\nwhy ? ASSISTANT:", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    model.config.compress = False
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    plain = {name: value for name, value in inputs.items() if "question" not in name}
    assert torch.equal(model(**inputs).logits, stock(**plain).logits)


# -------------------------------------------------------------------------------------------------------------- loading


CLASSES = [
    RecoverableLlavaForConditionalGeneration,
    RecoverableLlavaModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModel,
]


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
def test_a_repo_loads_completely(repo_folder, model_class):
    model, info = model_class.from_pretrained(repo_folder, output_loading_info=True)
    if isinstance(model, RecoverableLlavaModel):
        # The base model has no use for the head, stock's neither.
        assert all(name.endswith("lm_head.weight") for name in info.pop("unexpected_keys"))
    assert_complete(info)
    full = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder)
    expected = full.state_dict() if isinstance(model, type(full)) else full.model.state_dict()
    assert states_equal(model.state_dict(), expected)


def test_a_subclass_of_a_user_loads_the_same_weights(repo_folder):
    class InnerModel(RecoverableLlavaModel):
        pass

    class OuterModel(RecoverableLlavaForConditionalGeneration):
        def __init__(self, config):
            super().__init__(config)
            self.model = InnerModel(config)

    model, info = OuterModel.from_pretrained(repo_folder, output_loading_info=True)
    assert_complete(info)
    expected = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder)
    assert states_equal(model.state_dict(), expected.state_dict())


def test_no_weight_of_a_repo_is_random(repo_folder):
    """Loaded twice under different seeds: what the files lack would differ."""
    torch.manual_seed(1)
    first = RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder).state_dict()
    torch.manual_seed(2)
    assert states_equal(first, RecoverableLlavaForConditionalGeneration.from_pretrained(repo_folder).state_dict())


# How weights are named in files, now and by older transformers; `llava-hf/llava-1.5-7b-hf` has the last layout.
LAYOUTS = {
    "flat towers": {},
    "nested towers": {r"^(model\.)?vision_tower\.": r"\1vision_tower.vision_model."},
    "before 4.52": {
        r"^lm_head\.": "language_model.lm_head.",
        r"^model\.language_model\.": "language_model.model.",
        r"^model\.vision_tower\.": "vision_tower.vision_model.",
        r"^model\.multi_modal_projector\.": "multi_modal_projector.",
    },
}


def rewrite(source, target, layout):
    """Copy a repo with its weights renamed; the starting point is the model's own names, not those of its files."""
    shutil.copytree(source, target)
    state = RecoverableLlavaForConditionalGeneration.from_pretrained(source).state_dict()
    renamed = {}
    for name, weight in state.items():
        new = name
        for pattern, replacement in LAYOUTS[layout].items():
            new = re.sub(pattern, replacement, new)
        renamed[new] = weight.clone()
    assert len(renamed) == len(state)
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return state, renamed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda model_class: model_class.__name__)
def test_weights_of_every_layout_load_completely(repo_folder, tmp_path, layout, model_class):
    state, renamed = rewrite(repo_folder, tmp_path / "repo", layout)
    assert layout == "flat towers" or renamed.keys() != state.keys()
    model, info = model_class.from_pretrained(tmp_path / "repo", output_loading_info=True)
    if isinstance(model, RecoverableLlavaModel):
        assert all(name.endswith("lm_head.weight") for name in info.pop("unexpected_keys"))
        state = {name.removeprefix("model."): weight for name, weight in state.items() if name.startswith("model.")}
    assert_complete(info)
    assert states_equal(model.state_dict(), state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_vision_half_of_every_layout_loads_completely(repo_folder, tmp_path, layout):
    state, _ = rewrite(repo_folder, tmp_path / "repo", layout)
    model, info = RecoverableLlavaVisionModel.from_pretrained(tmp_path / "repo", output_loading_info=True)
    assert_complete(info)
    ours = {name for name in state if "language_model." not in name and "lm_head." not in name}
    assert states_equal(model.state_dict(), {name.removeprefix("model."): state[name] for name in ours})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_checkpoints_of_every_layout_combine(llava_folder, clip_folder, tmp_path, layout):
    """Also shows that the layouts above are ones that stock LLaVA reads."""
    shutil.copytree(llava_folder, tmp_path / "llava")
    state = LlavaForConditionalGeneration.from_pretrained(llava_folder).state_dict()
    renamed = {}
    for name, weight in state.items():
        for pattern, replacement in LAYOUTS[layout].items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight.clone()
    save_file(renamed, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    model, _ = combine(str(tmp_path / "llava"), clip_folder, **tiny.RECOVERY)
    expected, _ = combine(llava_folder, clip_folder, **tiny.RECOVERY)
    assert states_equal(model.state_dict(), expected.state_dict())


def test_a_stock_checkpoint_lacks_the_question_tower_alone(llava_folder, repo_folder, tmp_path):
    """Loaded without `combine`, all of LLaVA is there, and what is missing is reported."""
    shutil.copytree(llava_folder, tmp_path / "llava")
    shutil.copy(f"{repo_folder}/config.json", tmp_path / "llava" / "config.json")
    model, info = RecoverableLlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    missing = info.pop("missing_keys")
    assert missing and all(name.startswith(("model.question_tower.", "model.visual_projection.")) for name in missing)
    assert_complete(info)
    stock = LlavaForConditionalGeneration.from_pretrained(llava_folder).state_dict()
    state = model.state_dict()
    assert all(torch.equal(state[name], stock[name]) for name in stock)


def test_saved_weights_are_read_by_stock_llava(repo_folder, llava_folder, tmp_path):
    """Whoever wants the plain model back: the same file, less the question's part."""
    shutil.copytree(llava_folder, tmp_path / "llava")
    shutil.copy(f"{repo_folder}/model.safetensors", tmp_path / "llava" / "model.safetensors")
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    unexpected = info.pop("unexpected_keys")
    assert all("question_tower" in name or "visual_projection" in name for name in unexpected)
    assert_complete(info)
    assert states_equal(model.state_dict(), LlavaForConditionalGeneration.from_pretrained(llava_folder).state_dict())


def test_a_config_alone_builds_a_model():
    vision_config = {"model_type": "clip_vision_model", **tiny.vision_config()}
    text_config = tiny.LANGUAGE_MODELS["llama"](
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=99
    )
    config = RecoverableLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        question_config={"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "projection_dim": 16},
        **tiny.RECOVERY,
    )
    model = RecoverableLlavaForConditionalGeneration(config)
    assert model.model.visual_projection.weight.shape == (16, 32)
    assert sum("language_model" in name and "embed_tokens" in name for name in model.state_dict()) == 1
