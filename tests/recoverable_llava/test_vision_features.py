"""What compression reads off the vision tower: class attention, keys, relevance and features, in one pass."""

import copy

import pytest
import tiny
import torch
from batches import both_families, images_of
from torch import nn
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, LlavaForConditionalGeneration

from recoverable_llava import recoverable_vision
from recoverable_llava.tools.combine import combine


@pytest.fixture
def pixels(processor, pictures):
    return processor.image_processor(pictures[:3], return_tensors="pt")["pixel_values"]


@pytest.fixture
def inputs(processor, pictures):
    text = ["USER: <image> and <image>\nwhat is it ? ASSISTANT:", "USER: <image>\nhow many dog ? ASSISTANT:"]
    return processor(images=[pictures[:2], pictures[2:3]], text=text, padding=True, return_tensors="pt")


class Nested(nn.Module):
    """A vision tower one level deeper, as transformers up to 5.4 and CLIPVisionModelWithProjection have it."""

    def __init__(self, tower):
        super().__init__()
        self.vision_model = tower
        self.config = tower.config
        self.dtype = tower.dtype

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)


def with_projection(clip_folder):
    return CLIPVisionModelWithProjection.from_pretrained(clip_folder)


def inner(tower):
    return getattr(tower, "vision_model", tower)


# ----------------------------------------------------------------------------------------------------- class attention


@pytest.mark.parametrize("attention_layer", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("nesting", ["flat", "nested", "with projection"])
def test_class_attention_equals_output_attentions(model, clip_folder, pixels, attention_layer, nesting):
    if nesting == "nested":
        model.model.vision_tower = Nested(model.model.vision_tower)
    elif nesting == "with projection":
        model.model.vision_tower = with_projection(clip_folder)
    eager = CLIPVisionModel.from_pretrained(clip_folder, attn_implementation="eager")
    expected = eager(pixels, output_attentions=True).attentions[attention_layer].mean(1)[:, 0, 1:]
    model.config.attention_layer = attention_layer
    scores = model.get_vision_features(pixels).visual_scores
    assert scores.dtype == torch.float32 and scores.shape == (3, 36)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    other = eager(pixels, output_attentions=True).attentions[(attention_layer + 1) % 3].mean(1)[:, 0, 1:]
    assert (scores - other).abs().max() > 1e-3


@pytest.mark.parametrize("attention_layer", [0, -1])
def test_keys_are_those_of_the_attention_layer(model, pixels, attention_layer):
    layer = inner(model.model.vision_tower).encoder.layers[attention_layer]
    seen = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    model.config.attention_layer = attention_layer
    keys = model.get_vision_features(pixels).keys
    hook.remove()
    torch.testing.assert_close(keys, seen[0][:, 1:], rtol=0, atol=1e-5)


def test_eager_equals_sdpa(llava_folder, clip_folder, pixels):
    model, _ = combine(llava_folder, clip_folder, **tiny.RECOVERY)
    sdpa = model.get_vision_features(pixels)
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    eager = model.get_vision_features(pixels)
    for name in ("patches", "visual_scores", "keys", "relevance_embeds"):
        torch.testing.assert_close(getattr(eager, name), getattr(sdpa, name), rtol=1e-4, atol=1e-5)


def test_the_tower_never_computes_attentions(model, pixels):
    """Asking for them would throw the tower off SDPA and FlashAttention."""
    seen = []
    tower = model.model.vision_tower
    tower.register_forward_hook(lambda module, args, output: seen.append(output))
    model.get_vision_features(pixels)
    assert seen[0].attentions is None


@pytest.mark.parametrize("settings", [{}, {"attention_layer": 0, "text_relevance": "projected"}], ids=str)
@torch.no_grad()
def test_layers_are_read_while_they_are_called(model, pixels, settings):
    """What shards or offloads a layer gives it its weights for the time of its calls, and takes them away again."""
    for name, value in settings.items():
        setattr(model.config, name, value)
    expected = model.get_vision_features(pixels)
    for layer in inner(model.model.vision_tower).encoder.layers:
        weights = {name: weight.clone() for name, weight in layer.state_dict().items()}

        def bring(module, args, weights=weights):
            for name, weight in module.state_dict().items():
                weight.copy_(weights[name])

        def take_away(module, args, output):
            for weight in module.state_dict().values():
                weight.fill_(torch.nan)

        take_away(layer, None, None)
        layer.register_forward_pre_hook(bring)
        layer.register_forward_hook(take_away)
    found = model.get_vision_features(pixels)
    for name in ("patches", "visual_scores", "keys", "relevance_embeds"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# ----------------------------------------------------------------------------------------------------------- relevance


def slow_relevance(clip, pixels, question, text_relevance):
    """The three formulas for one picture and one patch at a time, from CLIP's own modules."""
    tower = inner(clip.vision_model)
    text = clip.text_projection(clip.text_model(question).pooler_output)
    relevance = torch.zeros(len(pixels), (pixels.shape[-1] // tower.config.patch_size) ** 2)
    for row, picture in enumerate(pixels):
        states = tower(picture[None], output_hidden_states=True).hidden_states
        for patch in range(relevance.shape[1]):
            before_last, last = states[-2][0, 1 + patch], states[-1][0, 1 + patch]
            if text_relevance == "value":
                layer = tower.encoder.layers[-1]
                attention = layer.self_attn
                value = attention.v_proj(layer.layer_norm1(before_last))
                x = before_last + attention.out_proj(value)
                x = x + layer.mlp(layer.layer_norm2(x))
            else:
                x = last if text_relevance == "projected" else before_last
            embedding = clip.visual_projection(tower.post_layernorm(x))
            cosine = nn.functional.cosine_similarity(embedding, text[row], dim=0)
            relevance[row, patch] = -cosine if text_relevance == "negated" else cosine
    return relevance


@pytest.mark.parametrize("text_relevance", ["value", "projected", "negated"])
@pytest.mark.parametrize("nesting", ["flat", "nested"])
@torch.no_grad()
def test_relevance_equals_the_slow_formula(model, processor, clip_folder, pictures, text_relevance, nesting):
    if nesting == "nested":
        model.model.vision_tower = Nested(model.model.vision_tower)
    model.config.text_relevance = text_relevance
    questions = ["what is it ?", "how many dog ?", "is the cat red or blue ?"]
    text = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
    images = [[picture] for picture in pictures[:3]]
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
    clip = CLIPModel.from_pretrained(clip_folder)
    # Without padding: what stands behind the end token must have no say.
    tokenized = [processor.question_tokenizer(question, return_tensors="pt")["input_ids"] for question in questions]
    expected = torch.cat(
        [
            slow_relevance(clip, inputs["pixel_values"][row : row + 1], ids, text_relevance)
            for row, ids in enumerate(tokenized)
        ]
    )
    scores = model.recover_tokens(**inputs).text_scores
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert expected.std(1).min() > 0.01


@torch.no_grad()
def test_question_embeds_are_those_of_clip(model, processor, clip_folder):
    questions = ["why ?", "what is the colour of the cat ?"]
    clip = CLIPModel.from_pretrained(clip_folder)
    padded = processor.question_tokenizer(questions, padding="max_length", return_tensors="pt")
    embeds = model.get_question_embeds(padded["input_ids"])
    for row, question in zip(embeds, questions):
        alone = processor.question_tokenizer(question, return_tensors="pt")
        expected = clip.text_projection(clip.text_model(**alone).pooler_output)[0]
        torch.testing.assert_close(row, expected / expected.norm(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, -1, 1, [-2], [-2, -1], [1, -1, -3]])
@torch.no_grad()
def test_features_are_those_of_stock(tmp_path, clip_folder, pictures, layer, strategy):
    settings = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    tiny.save_tiny_llava(tmp_path, clip_folder, **settings)
    model, processor = combine(str(tmp_path), clip_folder, **tiny.RECOVERY)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = processor(
        images=[[pictures[0]], [pictures[1]]],
        text=["USER: <image>\nwhat is it ? ASSISTANT:", "USER: <image>\nwhy ? ASSISTANT:"],
        padding=True,
        return_tensors="pt",
    )
    vision = model.get_vision_features(inputs["pixel_values"])
    expected = stock.get_image_features(inputs["pixel_values"]).pooler_output
    features = model.model.multi_modal_projector(vision.with_class_token(vision.patches))
    torch.testing.assert_close(features, torch.stack(list(expected)), rtol=0, atol=1e-6)
    assert vision.patches.shape[1] == 36 and (vision.class_tokens is None) == (strategy == "default")

    # All the way through: kept patches reach the language model as stock would project them.
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    recovery = model.recover_tokens(**inputs)
    model(**inputs)
    num_class_tokens = int(strategy == "full")
    num_kept = recovery.selection.num_tokens + num_class_tokens
    for row in range(2):
        kept = recovery.selection.chosen_by_vision[row] | recovery.selection.chosen_by_text[row]
        visual = _visual_part(seen[0][row], inputs, row, num_kept, model)
        wanted = expected[row][num_class_tokens:][kept]
        if strategy == "full":
            wanted = torch.cat([expected[row][:1], wanted])
        torch.testing.assert_close(visual[: len(wanted)], wanted, rtol=0, atol=1e-5)


def _visual_part(embeds, inputs, row, num_kept, model):
    """The visual tokens of a row of the short prompt, which is padded on the left."""
    ids = inputs["input_ids"][row]
    num_behind = int((ids == model.config.image_token_id).nonzero().max())
    num_behind = len(ids) - 1 - num_behind
    end = len(embeds) - num_behind
    return embeds[end - int(num_kept[row]) : end]


@torch.no_grad()
def test_feature_layer_and_strategy_of_one_call(model, inputs, stock):
    """As stock: arguments of a call go before the config."""
    pixels = inputs["pixel_values"]
    for layer, strategy in ((-1, "default"), (-2, "full"), (1, "full")):
        vision = model.model.get_vision_features(pixels, layer, strategy)
        expected = stock.get_image_features(
            pixels, vision_feature_layer=layer, vision_feature_select_strategy=strategy
        ).pooler_output
        features = model.model.multi_modal_projector(vision.with_class_token(vision.patches))
        torch.testing.assert_close(features, torch.stack(list(expected)), rtol=0, atol=1e-6)


def test_half_precision_scores_are_float32(model, pixels):
    model = copy.deepcopy(model).to(torch.bfloat16)
    vision = model.get_vision_features(pixels.bfloat16())
    assert vision.patches.dtype == torch.bfloat16
    assert vision.visual_scores.dtype == vision.relevance_embeds.dtype == torch.float32


# -------------------------------------------------------------------------------------------------- few images at once


@both_families
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("images_at_once", [1, 2])
@torch.no_grad()
def test_images_are_selected_few_at_once_as_all(model, inputs, preset, images_at_once, monkeypatch):
    """Three images, and tables of all pairs of patches for one or two of them at a time."""
    model.config.use_preset(preset)
    vision = model.get_vision_features(**images_of(inputs))
    with_distance = model.model.with_distance(vision)
    expected, logits = model.recover_tokens(**inputs), model(**inputs).logits
    sizes, at_once = [], model.model.select_at_once

    def watched(images, settings):
        sizes.append(len(images.vision.patches))
        return at_once(images, settings)

    monkeypatch.setattr(model.model, "select_at_once", watched)
    monkeypatch.setattr(recoverable_vision, "PAIRS_AT_ONCE", images_at_once * vision.patches.shape[1] ** 2 + 1)
    rest = {name: inputs[name] for name in inputs if name not in images_of(inputs)}
    for found in (model.recover_tokens(**inputs), model.recover_tokens(**rest, vision_features=with_distance)):
        for part in ("selection", "assembly"):
            for name, value in vars(getattr(expected, part)).items():
                same = getattr(getattr(found, part), name)
                assert value is same is None or torch.allclose(same.float(), value.float(), atol=1e-6), name
    assert torch.allclose(model(**inputs).logits, logits, atol=1e-5)
    assert sizes == [1, 1, 1] * 3 if images_at_once == 1 else sizes == [2, 1] * 3


# ------------------------------------------------------------------------------------------------------ forward passes


@both_families
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_autocast_leaves_the_choice_in_full_precision(model, inputs, preset, monkeypatch):
    """From the same features, autocast chooses the same patches; bfloat16 scores would not even rank them."""
    model.config.use_preset(preset)
    given = {
        "vision_features": model.get_vision_features(**images_of(inputs)),
        "question_embeds": model.get_question_embeds(inputs["question_input_ids"]),
    }
    projected = model.model.project_patches(given["vision_features"])
    monkeypatch.setattr(model.model, "project_patches", lambda vision: projected)
    expected = model.recover_tokens(input_ids=inputs["input_ids"], **given)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.recover_tokens(input_ids=inputs["input_ids"], **given)
    assert torch.equal(found.text_scores, expected.text_scores)
    assert torch.equal(found.assembly.token_index, expected.assembly.token_index)
    assert torch.equal(found.assembly.merge_weights, expected.assembly.merge_weights)


@pytest.fixture
def count_passes(model):
    counts = {}

    def count(name, module):
        counts[name] = 0

        def hook(*_):
            counts[name] += 1

        module.register_forward_hook(hook)

    count("vision", model.model.vision_tower)
    count("patch embedding", inner(model.model.vision_tower).embeddings)
    count("question", model.model.question_tower)
    count("projector", model.model.multi_modal_projector)
    return counts


# The projector runs on all patches to tell near copies, and on the kept tokens.
ONCE = {"vision": 1, "patch embedding": 1, "question": 1, "projector": 2}


@both_families
@pytest.mark.parametrize("budget", [None, 7])
def test_one_pass_of_each_tower_per_call(model, inputs, count_passes, budget):
    model.config.visual_token_budget = budget
    calls = {
        "forward": lambda: model(**inputs),
        "generate": lambda: model.generate(**inputs, max_new_tokens=4, do_sample=False),
        "beam search": lambda: model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False),
    }
    for name, call in calls.items():
        count_passes.update(dict.fromkeys(count_passes, 0))
        call()
        assert count_passes == ONCE, name


@both_families
def test_one_pass_of_each_tower_to_recover_tokens(model, inputs, count_passes):
    model.recover_tokens(**inputs)
    assert count_passes == {**ONCE, "projector": 1}


@both_families
def test_one_pass_of_each_tower_on_the_stock_road(model, processor, pictures, count_passes):
    model.config.visual_token_budget = processor.visual_token_budget = 7
    inputs = processor(images=pictures[0], text="USER: <image>\nwhy ? ASSISTANT:", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert count_passes == ONCE


@both_families
def test_the_projector_sees_the_kept_tokens_alone_in_the_paper(model, inputs):
    model.config.use_preset("paper")
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**inputs)
    longest = int(model.recover_tokens(**inputs).selection.num_tokens.max())
    assert seen[0][:2] == (3, longest) and longest < model.config.num_patches


@both_families
def test_reused_features_and_embeds_spare_the_towers(model, inputs, count_passes):
    expected = model(**inputs).logits
    vision = model.get_vision_features(**images_of(inputs))
    embeds = model.get_question_embeds(inputs["question_input_ids"])
    count_passes.update(dict.fromkeys(count_passes, 0))
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask", "question_attention_mask")}
    logits = model(**rest, vision_features=vision, question_embeds=embeds).logits
    assert count_passes == {"vision": 0, "patch embedding": 0, "question": 0, "projector": 2}
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@both_families
@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # a parameter of its own: image_newline
def test_a_vision_tower_that_is_split_over_devices(model, family, repo_folder, tmp_path, processor, pictures):
    """Layers whose weights lie on disk until they are called: what the recovery reads of them must call them, too."""
    inputs = processor(images=pictures[:1], text=["USER: <image>\nwhy ? ASSISTANT:"], return_tensors="pt")
    whole = type(model).from_pretrained(repo_folder)
    tower = "model.vision_tower"
    parts = ["model.language_model", "lm_head", "model.multi_modal_projector", "model.question_tower"]
    parts += ["model.visual_projection", f"{tower}.embeddings", f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    parts += ["model.image_newline"] if family == "llava_next" else []
    layers = {f"{tower}.encoder.layers.{number}": "disk" if number else "cpu" for number in range(3)}
    split = type(model).from_pretrained(
        repo_folder, device_map={**dict.fromkeys(parts, "cpu"), **layers}, offload_folder=str(tmp_path)
    )
    assert split.model.vision_tower.encoder.layers[2].self_attn.k_proj.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(split(**inputs).logits, whole(**inputs).logits)
