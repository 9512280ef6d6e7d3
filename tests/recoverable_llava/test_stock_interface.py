"""What scripts written for stock LLaVA read and pass: outputs, embeddings, attentions, names of arguments, threads."""

import inspect
import threading
from functools import partial

import pytest
import torch
from batches import GREEDY, PROMPTS, answers, batch_of, both_families, images_of, without_question

from recoverable_llava.transformers_names import CACHE


pytestmark = both_families
IMAGE_FEATURES = "image_outputs" if CACHE == "cache" else "image_hidden_states"


def embedded(model, inputs):
    """The same inputs with embeddings in place of ids."""
    inputs = dict(inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    return {**inputs, "inputs_embeds": embeds}


def features_of(outputs):
    if IMAGE_FEATURES == "image_outputs":
        return torch.cat(list(outputs.image_outputs.pooler_output))
    return outputs.image_hidden_states


# ------------------------------------------------------------------------------------------------------- inputs_embeds


@pytest.mark.parametrize("budget", [None, 9])
@pytest.mark.parametrize("is_short", [False, True])
def test_embeddings_are_compressed_like_ids(model, processor, pictures, budget, is_short):
    if is_short and budget is None:
        pytest.skip("a short prompt needs a budget")
    model.config.visual_token_budget = budget
    processor.visual_token_budget = budget if is_short else None
    inputs = batch_of(processor, pictures)
    expected = model(**inputs)
    outputs = model(**embedded(model, inputs))
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert getattr(outputs, CACHE).get_seq_length() == getattr(expected, CACHE).get_seq_length()
    other = model(**without_question(embedded(model, inputs)))
    assert not torch.equal(other.logits[:, -1], outputs.logits[:, -1]), "the question must count"

    new = answers(model, inputs)
    assert model.generate(**embedded(model, inputs), **GREEDY).tolist() == new.tolist()
    both = {**embedded(model, inputs), "input_ids": inputs["input_ids"]}
    sequences = model.generate(**both, **GREEDY)
    assert sequences[:, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"].tolist()
    assert sequences[:, inputs["input_ids"].shape[1] :].tolist() == new.tolist()


def test_changed_text_embeddings_have_an_effect(model, processor, pictures):
    inputs = embedded(model, batch_of(processor, pictures, PROMPTS[:1]))
    expected = model(**inputs).logits
    inputs["inputs_embeds"] = inputs["inputs_embeds"].clone()
    inputs["inputs_embeds"][:, 1] += 0.5  # text in front of the image
    assert not torch.allclose(model(**inputs).logits[:, -1], expected[:, -1])
    inputs["inputs_embeds"] = inputs["inputs_embeds"].requires_grad_(True)
    model(**inputs).logits.sum().backward()
    assert inputs["inputs_embeds"].grad[:, 1].abs().sum() > 0


def test_embeddings_and_ids_at_once_are_refused_as_in_stock(model, processor, pictures):
    inputs = batch_of(processor, pictures, PROMPTS[:1])
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**{**embedded(model, inputs), "input_ids": inputs["input_ids"]})


# -------------------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("budget", [None, 9])
def test_outputs_have_the_fields_of_stock(model, stock, processor, pictures, budget):
    model.config.visual_token_budget = budget
    inputs = batch_of(processor, pictures, ["USER: <image> and <image>\nwhy ? ASSISTANT:", PROMPTS[0]])
    ours, theirs = model(**inputs), stock(**without_question(inputs))
    assert type(ours) is type(theirs) and list(ours.keys()) == list(theirs.keys())
    assert len(model(**inputs, return_dict=False)) == len(stock(**without_question(inputs), return_dict=False))
    features = features_of(ours)
    recovery = model.recover_tokens(**inputs)
    assert features.shape == (int(recovery.selection.num_tokens.sum()), 32)
    of_first = int(recovery.selection.num_tokens[0])
    vision = model.get_vision_features(**images_of(inputs))
    torch.testing.assert_close(features[:of_first], model.model.project(vision, recovery.assembly)[0, :of_first])
    model.config.compress = False
    torch.testing.assert_close(features_of(model(**inputs)), features_of(theirs), rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [True, [0, 2]])
def test_hidden_states_of_some_layers(model, stock, processor, pictures, wanted):
    inputs = batch_of(processor, pictures)
    ours = model(**inputs, output_hidden_states=wanted).hidden_states
    theirs = stock(**without_question(inputs), output_hidden_states=wanted).hidden_states
    assert type(ours) is type(theirs) and len(ours) == len(theirs)
    for own, other in zip(ours, theirs):
        assert (own is None) == (other is None) and (own is None or own.shape == other.shape)


def test_attentions_have_the_original_numbering(model, processor, pictures):
    model.set_attn_implementation("eager")
    inputs = batch_of(processor, pictures)
    attentions = model(**inputs, output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    assert all(weights.shape[-2:] == (length, length) for weights in attentions)
    is_image = inputs["input_ids"] == model.config.image_token_id
    num_kept = model.recover_tokens(**inputs).selection.num_tokens
    for row in range(len(length_rows := inputs["input_ids"])):
        last = attentions[0][row, :, -1]  # [H, L]
        torch.testing.assert_close(last.sum(-1), torch.ones(len(last)))
        assert int((last[:, is_image[row]] > 0).any(0).sum()) == num_kept[row]
        on_text = last[:, ~is_image[row]].sum(-1)
        assert (on_text < 0.999).all(), "the image gets a share of the attention"
    assert len(length_rows) == 3


def test_attentions_without_compression_are_those_of_stock(model, stock, processor, pictures):
    inputs = batch_of(processor, pictures)
    for each in (model, stock):
        each.set_attn_implementation("eager")
    model.config.compress = False
    ours = model(**inputs, output_attentions=True).attentions
    theirs = stock(**without_question(inputs), output_attentions=True).attentions
    assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


def test_attentions_of_a_later_turn_count_the_original_tokens(model, processor, pictures):
    model.set_attn_implementation("eager")
    inputs = batch_of(processor, pictures, PROMPTS[:1])
    first = model(**inputs)
    new = torch.tensor([[5, 6, 7]])
    outputs = model(input_ids=new, output_attentions=True, **{CACHE: getattr(first, CACHE)})
    length = inputs["input_ids"].shape[1] + 3
    assert outputs.attentions[0].shape[-2:] == (3, length)
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones_like(outputs.attentions[0][..., 0]))


# --------------------------------------------------------------------------------------------------- get_image_features


@pytest.mark.parametrize("budget", [None, 9])
def test_image_features_take_what_stock_takes(model, stock, processor, pictures, budget):
    model.config.visual_token_budget = budget
    images = images_of(batch_of(processor, pictures))
    ours, theirs = model.get_image_features(**images), stock.get_image_features(**images)
    assert type(ours) is type(theirs) and len(ours.pooler_output) == len(theirs.pooler_output)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, rtol=0, atol=0)
    as_tuple = model.get_image_features(**images, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for each in (model, stock):
        each.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model.get_image_features(**images, **asked), stock.get_image_features(**images, **asked)
    for name in ("hidden_states", "attentions"):
        assert len(getattr(ours, name)) == len(getattr(theirs, name))
        assert torch.equal(getattr(ours, name)[-1], getattr(theirs, name)[-1])
    model.config.return_dict = False
    assert isinstance(model.get_image_features(**images), tuple)


@pytest.mark.parametrize("compress", [True, False])
def test_tuples_that_the_config_asks_for(model, stock, processor, pictures, compress):
    model.config.compress = compress
    inputs = batch_of(processor, pictures)
    model.config.return_dict = stock.config.return_dict = False
    ours, theirs = model.model(**inputs), stock.model(**without_question(inputs))
    assert isinstance(ours, tuple) and [type(entry) for entry in ours] == [type(entry) for entry in theirs]
    # (The outer method of stock LLaVA-NeXT goes by the config whatever it is told.)
    features = model.model.get_image_features(**images_of(inputs), return_dict=True)
    assert len(features.pooler_output) == len(inputs["pixel_values"])


@pytest.mark.parametrize("budget", [None, 9])
def test_an_unknown_strategy_is_refused_as_in_stock(model, stock, processor, pictures, budget):
    model.config.visual_token_budget = budget
    inputs = batch_of(processor, pictures)
    calls = [partial(each.get_image_features, **images_of(inputs)) for each in (model, stock)]
    for call in [*calls, partial(model, **inputs), partial(model.get_vision_features, **images_of(inputs))]:
        with pytest.raises(ValueError, match=r"(?i)strategy.*first"):
            call(vision_feature_select_strategy="first")


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.slow
def test_settings_changed_by_one_thread_are_for_the_next_call_of_the_others(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    expected = {}
    for budget, compress in ((None, True), (9, True), (None, False)):
        model.config.visual_token_budget, model.config.compress = budget, compress
        expected[budget, compress] = answers(model, inputs, max_new_tokens=3).tolist()
    stop, errors = threading.Event(), []

    def change():
        while not stop.is_set():
            for budget, compress in expected:
                model.config.visual_token_budget, model.config.compress = budget, compress

    def ask():
        try:
            for _ in range(8):
                assert answers(model, inputs, max_new_tokens=3).tolist() in expected.values()
        except BaseException as error:
            errors.append(error)

    changing = threading.Thread(target=change)
    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in (changing, *asking):
        thread.start()
    for thread in asking:
        thread.join()
    stop.set()
    changing.join()
    assert not errors, errors


# --------------------------------------------------------------------------------------------------- names and versions


def test_both_names_of_the_cache_are_taken(model, processor, pictures):
    inputs = batch_of(processor, pictures, PROMPTS[:1])
    new = torch.tensor([[5, 6, 7]])
    of_name = {}
    for name in ("past_key_values", "cache"):
        cache = getattr(model(**inputs), CACHE)
        of_name[name] = model(input_ids=new, **{name: cache}).logits
    assert torch.equal(of_name["cache"], of_name["past_key_values"])
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=new, cache=cache, past_key_values=getattr(model(**inputs), CACHE))


def test_arguments_stand_where_stock_has_them(model, stock):
    for ours, theirs in ((model, stock), (model.model, stock.model)):
        for name in ("forward", "generate", "get_image_features"):
            if hasattr(theirs, name):
                places = list(inspect.signature(getattr(theirs, name)).parameters)
                later = ("kwargs", "mm_encoder_outputs", "output_hidden_states")
                positional = [each for each in places if each not in later][:7]
                found = list(inspect.signature(getattr(ours, name)).parameters)[: len(positional)]
                same = {"cache": "past_key_values"}
                assert [same.get(each, each) for each in positional] == [same.get(each, each) for each in found], name


def test_arguments_by_position(model, stock, processor, pictures):
    inputs = batch_of(processor, pictures)
    first = [name for name in inspect.signature(stock.forward).parameters if name in inputs]
    assert first[:2] == ["input_ids", "pixel_values"] and {*first} == {*without_question(inputs)}
    questions = {name: inputs[name] for name in inputs if name not in first}
    expected = model(**inputs)
    assert torch.equal(model(*(inputs[name] for name in first), **questions).logits, expected.logits)
    inner = model.model(*(inputs[name] for name in first), **questions)
    assert torch.equal(inner.last_hidden_state, model.model(**inputs).last_hidden_state)
    with pytest.raises(TypeError, match="multiple values for .*pixel_values"):
        model(*(inputs[name] for name in first), pixel_values=inputs["pixel_values"])
