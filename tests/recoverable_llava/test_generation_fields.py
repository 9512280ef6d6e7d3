"""Every field of `GenerationConfig` and every argument of `generate`, read off the installed transformers.

With compression off a call does what stock LLaVA does with it: the same result, or the same error. With compression on
it raises where stock raises, and its result is held against two references, since the visual tokens are not stock's:

    short     stock LLaVA, given the short prompt as ids and as embeddings: new tokens, scores, attentions, all equal;
    original  stock's logits processors over the *original* ids: that they see the short ones must make no difference.

A field or an argument that a new transformers adds fails here until it is dealt with.
"""

import copy
import inspect

import pytest
import tiny
import torch
from batches import PROMPTS, batch_of, without_question
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.cache_utils import Cache
from transformers.generation.logits_process import TemperatureLogitsWarper
from transformers.generation.streamers import BaseStreamer

from recoverable_llava.recoverable_model import ImageInputs
from recoverable_llava.tools.combine import combine


NEW = 4
BASE = {"do_sample": False, "max_new_tokens": NEW}
SAMPLE = {"do_sample": True, "max_new_tokens": NEW}
DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


# Where each argument of `generate` is tried, besides the fields: in this file, unless another one is named.
ARGUMENTS = {
    "inputs": "test_prompt_under_its_other_name",
    "generation_config": "test_field_with_compression",
    "logits_processor": "test_a_callback_takes_the_place_of_stocks_own",
    "stopping_criteria": "test_a_callback_takes_the_place_of_stocks_own",
    "prefix_allowed_tokens_fn": "test_arguments_by_position",
    "synced_gpus": "test_refused_as_stock_does",
    "assistant_model": "test_assistants_change_nothing",
    "streamer": "test_refused_as_stock_does",
    "negative_prompt_ids": "test_negative_prompt",
    "negative_prompt_attention_mask": "test_negative_prompt",
    "custom_generate": "test_custom_loop",
    "kwargs": "test_field_with_compression",
}


class Prompt:
    """What a value may depend on: the prompt's length, and what is answered where nothing is set."""

    def __init__(self, length, answer, tokenizer):
        self.length, self.tokenizer = length, tokenizer
        self.first, self.second = answer[0, :2].tolist()  # of the first row


def settings_of(field, prompt):
    """The field with a value that has an effect, and what it needs beside it. KeyError for one that is not listed."""
    first, second = prompt.first, prompt.second
    beams = {**BASE, "num_beams": 3, "eos_token_id": [first, second, *range(100)]}
    assisted = {**BASE, "prompt_lookup_num_tokens": 3}
    return {
        # lengths
        "max_length": {"do_sample": False, "max_length": prompt.length + 2},
        "max_new_tokens": {"do_sample": False, "max_new_tokens": 2},
        "min_length": {**BASE, "min_length": prompt.length + 3, "eos_token_id": second},
        "min_new_tokens": {**BASE, "min_new_tokens": 3, "eos_token_id": second},
        "early_stopping": {**beams, "max_new_tokens": 9, "early_stopping": True, "length_penalty": 9.0},
        "max_time": {**BASE, "max_time": 0.0},
        "stop_strings": {**BASE, "stop_strings": [prompt.tokenizer.decode(first)], "tokenizer": prompt.tokenizer},
        # strategies
        "do_sample": SAMPLE,
        "num_beams": {**BASE, "num_beams": 3},
        "num_beam_groups": {**BASE, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "diversity_penalty": {**BASE, "num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "constraints": {**BASE, "num_beams": 2, "constraints": [object()]},
        "force_words_ids": {**BASE, "num_beams": 2, "force_words_ids": [[5]]},
        "penalty_alpha": {**BASE, "penalty_alpha": 0.6, "top_k": 4},
        "low_memory": {**BASE, "penalty_alpha": 0.6, "top_k": 4, "low_memory": True},
        "dola_layers": {**BASE, "dola_layers": "low"},
        "num_return_sequences": {**SAMPLE, "num_return_sequences": 2},
        # caches
        "use_cache": {**BASE, "use_cache": False},
        "cache_implementation": {**BASE, "cache_implementation": "static"},
        "cache_config": {**BASE, "cache_implementation": "quantized", "cache_config": {"backend": "quanto"}},
        "max_cache_len": {**BASE, "cache_implementation": "static", "max_cache_len": 128},
        "prefill_chunk_size": {**BASE, "prefill_chunk_size": 5},
        "compile_config": {**BASE, "cache_implementation": "static", "compile_config": CompileConfig()},
        "disable_compile": {**BASE, "cache_implementation": "static", "disable_compile": True},
        "continuous_batching_config": {**BASE, "continuous_batching_config": None},
        # scores, greedy
        "repetition_penalty": {**BASE, "repetition_penalty": 1.8},
        "encoder_repetition_penalty": {**BASE, "encoder_repetition_penalty": 1.8},
        "length_penalty": {**beams, "length_penalty": -9.0},
        "no_repeat_ngram_size": {**BASE, "no_repeat_ngram_size": 1},
        "encoder_no_repeat_ngram_size": {**BASE, "encoder_no_repeat_ngram_size": 1},
        "bad_words_ids": {**BASE, "bad_words_ids": [[first]]},
        "sequence_bias": {**BASE, "sequence_bias": [[[first], -20.0], [[8, 9], 2.0]]},
        "renormalize_logits": {**BASE, "renormalize_logits": True},
        "remove_invalid_values": {**BASE, "remove_invalid_values": True},
        "forced_bos_token_id": {**BASE, "forced_bos_token_id": 5},
        "forced_eos_token_id": {**BASE, "forced_eos_token_id": 5},
        "exponential_decay_length_penalty": {**BASE, "exponential_decay_length_penalty": (1, 4.0)},
        "suppress_tokens": {**BASE, "suppress_tokens": [first]},
        "begin_suppress_tokens": {**BASE, "begin_suppress_tokens": [first]},
        "guidance_scale": {**BASE, "guidance_scale": 2.0},
        "watermarking_config": {**BASE, "watermarking_config": WatermarkingConfig(bias=9.0)},
        # scores, sampling
        "temperature": {**SAMPLE, "temperature": 0.3},
        "top_k": {**SAMPLE, "top_k": 2},
        "top_p": {**SAMPLE, "top_p": 0.2},
        "min_p": {**SAMPLE, "min_p": 0.5},
        "top_h": {**SAMPLE, "top_h": 0.3},
        "typical_p": {**SAMPLE, "typical_p": 0.3},
        "epsilon_cutoff": {**SAMPLE, "epsilon_cutoff": 0.05},
        "eta_cutoff": {**SAMPLE, "eta_cutoff": 0.05},
        # what is returned
        "return_dict_in_generate": {**BASE, "return_dict_in_generate": True},
        "output_attentions": {**BASE, **DETAILS, "output_attentions": True},
        "output_hidden_states": {**BASE, **DETAILS, "output_hidden_states": True},
        "output_scores": {**BASE, "return_dict_in_generate": True, "output_scores": True},
        "output_logits": {**BASE, "return_dict_in_generate": True, "output_logits": True},
        # special tokens
        "eos_token_id": {**BASE, "eos_token_id": first},
        "pad_token_id": {**BASE, "pad_token_id": 7, "eos_token_id": first},
        "bos_token_id": {**BASE, "bos_token_id": 5},
        "decoder_start_token_id": {**BASE, "decoder_start_token_id": 5},
        "token_healing": {**BASE, "token_healing": True, "tokenizer": prompt.tokenizer},
        # drafts
        "prompt_lookup_num_tokens": assisted,
        "max_matching_ngram_size": {**assisted, "max_matching_ngram_size": 1},
        "is_assistant": {**BASE, "is_assistant": True},
        "assistant_early_exit": {**BASE, "assistant_early_exit": 1},
        "num_assistant_tokens": {**assisted, "num_assistant_tokens": 2},
        "num_assistant_tokens_schedule": {**assisted, "num_assistant_tokens_schedule": "constant"},
        "assistant_confidence_threshold": {**assisted, "assistant_confidence_threshold": 0.9},
        "assistant_ensemble_weight": {**assisted, "assistant_ensemble_weight": 0.5},
        "assistant_lookbehind": {**assisted, "assistant_lookbehind": 3},
        "target_lookbehind": {**assisted, "target_lookbehind": 3},
        "speculation_type": {**BASE, "speculation_type": "dflash"},
        "use_mtp": {**BASE, "use_mtp": True},
        # notes
        "transformers_version": {**BASE, "transformers_version": "5.0.0"},
        "_from_model_config": {**BASE, "_from_model_config": True},
        "_commit_hash": {**BASE, "_commit_hash": "abc"},
    }[field]


# What changes how an answer is made, or nothing at all, but not the answer itself.
SAME_ANSWER = {
    "cache_config",
    "compile_config",
    "disable_compile",
    "max_cache_len",
    "prefill_chunk_size",
    "continuous_batching_config",  # of `generate_batch`
    "use_cache",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
    "speculation_type",
    "is_assistant",
    "low_memory",
    "cache_implementation",
    "bos_token_id",  # of an empty prompt
    "decoder_start_token_id",  # of encoder-decoder models
    "forced_bos_token_id",  # acts behind a prompt of one token
    "remove_invalid_values",  # there are none
    "transformers_version",
    "_from_model_config",
    "_commit_hash",
}
# These draft from the prompt's ids. Stock LLaVA fails where a draft has image tokens; here it is only a bad draft.
DRAFTS = {
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "target_lookbehind",
}
ONE_ROW = {*DRAFTS, "assistant_early_exit", "speculation_type", "use_mtp", "assistant_ensemble_weight"}
OWN_MESSAGE = {"token_healing": "token_healing=True writes the prompts anew"}
# Stock ignores these where the prompt comes as embeddings too, as the short reference does.
READS_INPUTS = {"encoder_repetition_penalty", "encoder_no_repeat_ngram_size"}
SCORES = {
    *READS_INPUTS,
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "renormalize_logits",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "watermarking_config",
    "min_length",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
}
FIELDS = sorted(vars(GenerationConfig()))


# ------------------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(scope="module")
def models(llava_folder, clip_folder):
    model, processor = combine(llava_folder, clip_folder, **tiny.RECOVERY)
    stock = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    for each in (model, stock):
        each.set_attn_implementation("eager")  # for attentions
    return model, stock, processor


@pytest.fixture
def off(models, monkeypatch):
    monkeypatch.setattr(models[0].config, "compress", False)


class Failure:
    def __init__(self, error):
        self.type = type(error)
        self.message = str(error).replace("RecoverableLlava", "Llava")


def outcome(model, inputs, **settings):
    """What `generate` returns, as a dictionary, or how it failed."""
    torch.manual_seed(0)
    try:
        result = model.generate(**inputs, **settings)
    except Exception as error:
        return Failure(error)
    if isinstance(result, torch.Tensor):
        return {"sequences": result}
    facts = {name: value for name, value in result.items() if not isinstance(value, Cache)}
    return {"type": type(result).__name__, **facts}


def is_same(one, other):
    if isinstance(one, Failure):
        return isinstance(other, Failure) and (one.type, one.message) == (other.type, other.message)
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.allclose(one, other, atol=1e-4)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return isinstance(other, (tuple, list)) and len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def new_tokens(facts, length):
    return facts["sequences"][:, length:]


def inputs_of(models, pictures, field=None):
    return batch_of(models[2], pictures, PROMPTS[:1] if field in ONE_ROW else PROMPTS[:2])


def prompt_of(model, inputs, processor):
    length = inputs["input_ids"].shape[1]
    return Prompt(length, model.generate(**inputs, **BASE)[:, length:], processor.tokenizer)


def given_as(way, settings):
    """As keywords, or inside a `GenerationConfig`."""
    if way == "keywords":
        return settings
    fields = {name: value for name, value in settings.items() if name != "tokenizer"}
    beside = {name: value for name, value in settings.items() if name == "tokenizer"}
    return {"generation_config": GenerationConfig(**fields), **beside}


def short_reference(models, inputs, settings):
    """Stock LLaVA over the short prompt. New tokens begin behind `length`."""
    model, stock, _ = models
    images = ImageInputs.of(inputs["pixel_values"], None)
    question = {name: inputs[name] for name in inputs if "question" in name}
    with torch.no_grad():
        short, visual_embeds, _ = model.model.compress_prompt(
            inputs["input_ids"], images, model.config.recovery_settings(), inputs["attention_mask"], **question
        )
        embeds = model.model.embed(short.input_ids, visual_embeds)
    length = short.input_ids.shape[1]
    num_dropped = inputs["input_ids"].shape[1] - length
    assert num_dropped > 0
    for name in ("max_length", "min_length"):
        if name in settings:
            settings = {**settings, name: settings[name] - num_dropped}
    prompt = {"input_ids": short.input_ids, "inputs_embeds": embeds, "attention_mask": short.attention_mask}
    return outcome(stock, prompt, **settings), length


def scores_over_original(stock, inputs, facts, settings):
    """Stock's logits processors, over the original ids, applied to the logits of each step: [rows, V] scores."""
    ids = inputs["input_ids"]
    length = ids.shape[1]
    config, _ = stock._prepare_generation_config(None, **settings)
    stock._prepare_special_tokens(config, True, device=ids.device)
    config.max_length = length + NEW
    processors = stock._get_logits_processor(
        config,
        input_ids_seq_length=length,
        encoder_input_ids=ids,
        logits_processor=LogitsProcessorList(),
        device=ids.device,
        model_kwargs={"attention_mask": inputs["attention_mask"]},
    )
    return tuple(
        processors(facts["sequences"][:, : length + step], logits.clone())
        for step, logits in enumerate(facts["logits"])
    )


# -------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize("field", FIELDS)
def test_field_without_compression_is_stock(models, pictures, off, field):
    model, stock, processor = models
    inputs = inputs_of(models, pictures, field)
    plain = without_question(inputs)
    settings = settings_of(field, prompt_of(stock, plain, processor))
    for way in ("keywords", "config"):
        expected = outcome(stock, plain, **given_as(way, settings))
        if field == "prefill_chunk_size":  # with which older versions of stock leave the images out
            expected = outcome(stock, plain, **BASE)
        actual = outcome(model, inputs, **given_as(way, settings))
        assert is_same(actual, expected), (way, vars(actual) if isinstance(actual, Failure) else actual, expected)


@pytest.mark.parametrize("field", FIELDS)
def test_field_with_compression(models, pictures, field):
    model, stock, processor = models
    inputs = inputs_of(models, pictures, field)
    length = inputs["input_ids"].shape[1]
    settings = settings_of(field, prompt_of(model, inputs, processor))
    actual = outcome(model, inputs, **settings)
    assert is_same(outcome(model, inputs, **given_as("config", settings)), actual)
    of_stock = outcome(stock, without_question(inputs), **settings)
    if isinstance(of_stock, Failure) and field not in DRAFTS:
        assert isinstance(actual, Failure) and actual.type is of_stock.type
        assert actual.message.startswith(OWN_MESSAGE.get(field, of_stock.message))
        return
    assert not isinstance(actual, Failure), vars(actual)
    if not isinstance(of_stock, Failure):
        assert actual.keys() == of_stock.keys() and actual.get("type") == of_stock.get("type")
        assert len(actual["sequences"]) == len(of_stock["sequences"])
    repeats = len(actual["sequences"]) // len(inputs["input_ids"])
    assert torch.equal(actual["sequences"][:, :length], inputs["input_ids"].repeat_interleave(repeats, dim=0))

    without = {name: value for name, value in settings.items() if name != field}
    if field in SAME_ANSWER:
        assert is_same(actual["sequences"], outcome(model, inputs, **without)["sequences"])
    details = {} if field in DETAILS else DETAILS
    detailed = outcome(model, inputs, **{**details, **settings})
    if field not in SAME_ANSWER:
        assert not is_same(detailed, outcome(model, inputs, **{**details, **without})), "the value has no effect"
    if field not in READS_INPUTS:
        # Stock drafts and chunks from ids alone.
        alike = BASE if field in DRAFTS else without if field in SAME_ANSWER else settings
        reference, short_length = short_reference(models, inputs, {**details, **alike})
        assert is_same(new_tokens(detailed, length), new_tokens(reference, short_length))
        for name in set(reference) - {"sequences"}:
            assert is_same(detailed[name], reference[name]), name
    if field in SCORES:  # of the row without padding: stock lets padding count as words of the prompt
        whole = {name: inputs[name][1:] for name in ("input_ids", "attention_mask")}
        of_row = {name: [step[1:] for step in detailed[name]] for name in ("scores", "logits")}
        of_row["sequences"] = detailed["sequences"][1:]
        assert whole["attention_mask"].all()
        assert is_same(of_row["scores"], scores_over_original(stock, whole, of_row, settings))


def test_every_listed_field_exists_in_some_version():
    """No field is listed for nothing: what the tables name must be a field, here or in another version."""
    other_versions = {"_commit_hash", "max_cache_len", "assistant_ensemble_weight", "speculation_type", "use_mtp"}
    named = SAME_ANSWER | DRAFTS | ONE_ROW | SCORES | set(OWN_MESSAGE)
    assert named - set(FIELDS) <= other_versions


# ----------------------------------------------------------------------------------------------------------- arguments


def test_every_argument_is_listed_and_keeps_its_place(models):
    names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
    assert set(names) == set(ARGUMENTS) and set(ARGUMENTS.values()) <= set(globals())
    assert list(inspect.signature(type(models[0]).generate).parameters)[1:] == names


def test_arguments_by_position(models, pictures):
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    seen = []

    def allowed(row, ids):
        seen.append(ids)
        return [5, 6]

    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    none = (None,) * 6
    sequences = model.generate(inputs["input_ids"], GenerationConfig(**BASE), None, None, allowed, *none, **rest)
    length = inputs["input_ids"].shape[1]
    assert set(sequences[:, length:].flatten().tolist()) <= {5, 6}
    assert torch.equal(seen[0][:length], inputs["input_ids"][0])


def test_prompt_under_its_other_name(models, pictures):
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    renamed = {("inputs" if name == "input_ids" else name): value for name, value in inputs.items()}
    assert torch.equal(model.generate(**renamed, **BASE), model.generate(**inputs, **BASE))
    with pytest.raises(ValueError, match="inputs and input_ids"):
        model.generate(**renamed, input_ids=inputs["input_ids"], **BASE)
    with pytest.raises(ValueError, match="pass input_ids"):
        model.generate(pixel_values=inputs["pixel_values"], **BASE)


@pytest.mark.parametrize(
    "settings",
    [
        {"synced_gpus": True},
        {"streamer": BaseStreamer(), "num_beams": 2},
        {"cache_implementation": "nonsense"},
        {"cache_implementation": "static", "past_key_values": DynamicCache()},
        {"a_typo": 1},
        {"custom_generate": "/nowhere"},
        {"num_return_sequences": 2},
        {"assistant_tokenizer": object(), "prompt_lookup_num_tokens": 2, "num_return_sequences": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_refused_as_stock_does(models, pictures, settings):
    model, stock, _ = models
    inputs = inputs_of(models, pictures)
    expected = outcome(stock, without_question(inputs), **BASE, **settings)
    actual = outcome(model, inputs, **BASE, **settings)
    assert isinstance(expected, Failure) and is_same(actual, expected), vars(actual)


@pytest.mark.parametrize("compress", [True, False])
def test_assistants_change_nothing(models, pictures, compress):
    model, stock, _ = models
    inputs = inputs_of(models, pictures, "assistant_early_exit")
    text_model = LlamaForCausalLM(model.config.text_config).eval()
    expected = model.generate(**inputs, **BASE, compress=compress)
    for assistant in (copy.deepcopy(model), copy.deepcopy(stock), text_model):
        for settings in ({}, {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.5)])}):
            actual = model.generate(**inputs, **BASE, **settings, compress=compress, assistant_model=assistant)
            assert torch.equal(actual, expected)


def test_negative_prompt(models, pictures):
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    settings = {
        **BASE,
        **DETAILS,
        "guidance_scale": 2.0,
        "negative_prompt_ids": torch.tensor([[5, 6], [7, 8]]),
        "negative_prompt_attention_mask": torch.ones(2, 2, dtype=torch.long),
    }
    actual = outcome(model, inputs, **settings)
    reference, _ = short_reference(models, inputs, settings)
    assert is_same(actual["scores"], reference["scores"])
    assert not is_same(actual["scores"], outcome(model, inputs, **{**settings, "negative_prompt_ids": None})["scores"])


@pytest.mark.parametrize("compress", [True, False])
def test_compress_for_one_call(models, pictures, monkeypatch, compress):
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    monkeypatch.setattr(model.config, "compress", compress)
    expected = model.generate(**inputs, **BASE)
    monkeypatch.setattr(model.config, "compress", not compress)
    assert torch.equal(model.generate(**inputs, **BASE, compress=compress), expected)
    assert not torch.equal(model.generate(**inputs, **BASE), expected)


def test_a_callback_takes_the_place_of_stocks_own(models, pictures):
    """Stock goes by the type of a callback: its own of that type is left out."""
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    length = inputs["input_ids"].shape[1]
    longer = StoppingCriteriaList([MaxLengthCriteria(length + NEW + 2)])
    sequences = model.generate(**inputs, **BASE, stopping_criteria=longer, eos_token_id=None)
    assert sequences.shape[1] == length + NEW + 2
    weak = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.1)])
    both = outcome(model, inputs, **BASE, **DETAILS, repetition_penalty=3.0, logits_processor=weak)
    alone = outcome(model, inputs, **BASE, **DETAILS, logits_processor=weak)
    # Padding of the original prompt is no word, but a processor without a mask cannot know.
    assert is_same([step[1:] for step in both["scores"]], [step[1:] for step in alone["scores"]])


def test_custom_loop(models, pictures, tmp_path):
    """Sequences that begin with the prompt come back with the original one; anything else as it is."""
    model, stock, _ = models
    inputs = inputs_of(models, pictures)
    expected = model.generate(**inputs, **BASE)
    seen = []

    def stock_loop(model, input_ids, **kwargs):
        seen.append(input_ids)
        return GenerationMixin._sample(model, input_ids, **kwargs)

    def new_tokens_alone(model, input_ids, **kwargs):
        return GenerationMixin._sample(model, input_ids, **kwargs)[:, input_ids.shape[1] :]

    def a_pair(model, input_ids, **kwargs):
        return "text", 3

    assert torch.equal(model.generate(**inputs, **BASE, custom_generate=stock_loop), expected)
    assert seen[0].shape[1] < inputs["input_ids"].shape[1]
    new = model.generate(**inputs, **BASE, custom_generate=new_tokens_alone)
    assert torch.equal(new, expected[:, -NEW:])
    assert model.generate(**inputs, **BASE, custom_generate=a_pair) == ("text", 3)
    result = model.generate(**inputs, **BASE, custom_generate=stock_loop, return_dict_in_generate=True)
    assert torch.equal(result.sequences, expected)

    folder = tmp_path / "custom_generate"
    folder.mkdir()
    (folder / "generate.py").write_text(
        "def generate(model, **kwargs):\n    kwargs.pop('custom_generate', None)\n    return model.generate(**kwargs)\n"
    )
    from_folder = {"custom_generate": str(tmp_path), "trust_remote_code": True}
    assert torch.equal(model.generate(**inputs, **BASE, **from_folder), expected)


def test_paged_cache(models, pictures):
    """Continuous batching reads ids alone: prompts without images work, images are refused instead of left out."""
    model, stock = (copy.deepcopy(each) for each in models[:2])  # a failed run leaves another attention behind
    processor = models[2]
    inputs = inputs_of(models, pictures)
    with pytest.raises(ValueError, match="paged.*without images"):
        model.generate(**inputs, **BASE, cache_implementation="paged")
    text = processor.tokenizer(["USER: why ? ASSISTANT:"], return_tensors="pt")
    # 5.12 knows no continuous batching of LLaVA.
    expected = outcome(stock, text, **BASE, cache_implementation="paged")
    assert is_same(outcome(model, text, **BASE, cache_implementation="paged"), expected)


def test_masks_that_do_not_fit(models, pictures):
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    mask = inputs["attention_mask"]
    for wrong, message in (
        (mask[:, None, None], r"shape \(2, 1, 1, 57\)"),
        (mask[:1], "1 rows.*2 prompts"),
        (mask[:, 9:], "48 columns.*57 tokens"),
    ):
        with pytest.raises(ValueError, match=f"attention_mask has .*{message}"):
            model.generate(**{**inputs, "attention_mask": wrong}, **BASE)


def test_padding_is_found_with_a_config_that_does_not_name_it(models, pictures):
    """As in stock, which fills a given config from the model's own."""
    model, _, _ = models
    inputs = inputs_of(models, pictures)
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    config = GenerationConfig(**BASE)
    assert config.pad_token_id is None and (inputs["attention_mask"] == 0).any()
    assert torch.equal(model.generate(**without, generation_config=config), model.generate(**inputs, **BASE))


def test_a_static_cache_that_was_reset_is_as_good_as_new(models, pictures):
    model, _, processor = models
    inputs = inputs_of(models, pictures)
    expected = model.generate(**inputs, **BASE)
    for _ in range(2):  # 5.12 keeps the cache with the model
        assert torch.equal(model.generate(**inputs, **BASE, cache_implementation="static"), expected)
    text = processor.tokenizer(["USER: what is a dog ? ASSISTANT:"] * 2, return_tensors="pt")
    of_text = model.generate(**text, **BASE)
    assert torch.equal(model.generate(**text, **BASE, cache_implementation="static"), of_text)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=90)
    for prompt, answer in ((inputs, expected), (text, of_text), (inputs, expected)):
        assert torch.equal(model.generate(**prompt, **BASE, past_key_values=cache), answer)
        cache.reset()
