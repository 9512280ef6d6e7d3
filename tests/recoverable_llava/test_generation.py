"""`generate` with compression: every feature of the stock loop, over the original prompt's numbering."""

import copy
import warnings

import pytest
import torch
from batches import (
    GREEDY,
    PROMPTS,
    answers,
    batch_of,
    both_families,
    images_of,
    row_of,
    without_question,
)
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer


pytestmark = both_families


def assert_batch_equals_rows(model, processor, pictures, prompts, **settings):
    together = answers(model, batch_of(processor, pictures, prompts), **settings)
    repeats = len(together) // len(prompts)
    for index in range(len(prompts)):
        alone = answers(model, row_of(processor, pictures, prompts, index), **settings)
        rows = together[index * repeats : (index + 1) * repeats, : alone.shape[1]]
        assert rows.tolist() == alone.tolist()


# ---------------------------------------------------------------------------------------------------- the prompt itself


@pytest.mark.smoke
def test_compression_drops_tokens_and_keeps_the_prompt(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    result = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(result.sequences[:, :length], inputs["input_ids"])
    num_tokens = model.recover_tokens(**inputs).selection.num_tokens
    is_image = inputs["input_ids"] == model.config.image_token_id
    num_text = (inputs["attention_mask"].sum(1) - is_image.sum(1)).tolist()
    expected = max(text + kept for text, kept in zip(num_text, num_tokens.tolist()))
    assert result.past_key_values.get_seq_length() == expected + result.sequences.shape[1] - length - 1
    assert expected < length


@pytest.mark.smoke
def test_question_changes_the_answer_and_off_equals_stock(model, processor, pictures, stock):
    inputs = batch_of(processor, pictures)
    on = model(**inputs).logits
    other = batch_of(processor, pictures, questions=["the red one", "blue", "green"])
    assert not torch.allclose(on, model(**other).logits)
    model.config.compress = False
    plain = without_question(inputs)
    assert torch.equal(model(**inputs).logits, stock(**plain).logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**plain, **GREEDY))
    assert not torch.allclose(on, stock(**plain).logits)


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS,
        [PROMPTS[0], "USER: what is a dog ? ASSISTANT:", PROMPTS[2]],
        ["USER: <image>\n and <image>\n what is it ? ASSISTANT:", PROMPTS[0], "USER: what ? ASSISTANT:"],
        ["USER: what ? ASSISTANT:", "USER: <image>\n<image>\n<image>\n why ? ASSISTANT:", PROMPTS[1], PROMPTS[1]],
    ],
    ids=["images", "mixed", "two images", "three images"],
)
def test_batch_equals_rows(model, processor, pictures, prompts):
    assert_batch_equals_rows(model, processor, pictures, prompts)


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("off_by", ["config", "call"])
def test_off_equals_stock_for_every_beam_of_several_images(model, processor, pictures, stock, settings, off_by):
    """Since transformers 5.23 stock encodes images before it expands them to beams."""
    inputs = batch_of(processor, pictures, ["USER: <image> and <image>\nwhat is it ? ASSISTANT:", *PROMPTS[:2]])
    model.config.visual_token_budget = 9
    off = {"compress": False} if off_by == "call" else {}
    model.config.compress = off_by == "call"
    torch.manual_seed(0)
    expected = stock.generate(**without_question(inputs), **{**GREEDY, **settings})
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, **{**GREEDY, **settings}, **off), expected)


def test_text_alone_equals_stock(model, processor, pictures, stock):
    inputs = batch_of(processor, pictures, ["USER: what is a dog ? ASSISTANT:"] * 2)
    assert torch.equal(model.generate(**inputs, **GREEDY), stock.generate(**without_question(inputs), **GREEDY))


def test_padding_is_found_without_a_mask_as_in_stock(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    assert (inputs["attention_mask"] == 0).any()
    expected = answers(model, inputs)
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    assert torch.equal(answers(model, without), expected)
    same = processor.tokenizer.pad_token_id  # padding that also ends an answer says nothing
    all_ones = {"attention_mask": torch.ones_like(inputs["attention_mask"])}
    everything = answers(model, inputs | all_ones, eos_token_id=same)
    assert torch.equal(answers(model, without, eos_token_id=same), everything)


def test_right_padding_generates_the_same(model, processor, pictures):
    left = answers(model, batch_of(processor, pictures))
    right = answers(model, batch_of(processor, pictures, padding_side="right"))
    assert torch.equal(left, right)


def test_no_question_means_class_attention_alone(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    alone = model.recover_tokens(**without_question(inputs)).selection
    assert alone.num_text.tolist() == [0, 0, 0]
    empty = batch_of(processor, pictures, questions=["", "", ""])
    assert torch.equal(model.generate(**without_question(inputs), **GREEDY), model.generate(**empty, **GREEDY))


# ---------------------------------------------------------------------------------------------------- decoding methods


def test_sampling(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    torch.manual_seed(0)
    first = answers(model, inputs, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    again = answers(model, inputs, do_sample=True, num_return_sequences=3)
    assert first.shape[0] == 9 and torch.equal(first, again)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beam_search(model, processor, pictures, settings):
    assert_batch_equals_rows(model, processor, pictures, PROMPTS, **settings)
    several = [PROMPTS[0], "USER: <image>\n and <image>\n what is it ? ASSISTANT:"]
    assert_batch_equals_rows(model, processor, pictures, several, **settings)


def test_beam_search_sees_the_image_of_its_own_row(model, processor, pictures):
    """One beam of one row must equal greedy search: what would fail if rows and beams were mixed up."""
    inputs = batch_of(processor, pictures)
    beams = model.generate(**inputs, num_beams=2, max_new_tokens=1, do_sample=False)
    assert torch.equal(beams, model.generate(**inputs, max_new_tokens=1, do_sample=False))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_returned_dictionary(model, processor, pictures, num_beams):
    model.set_attn_implementation("eager")
    inputs = batch_of(processor, pictures)
    result = model.generate(
        **inputs,
        **GREEDY,
        num_beams=num_beams,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    new = result.sequences.shape[1] - inputs["input_ids"].shape[1]
    assert len(result.scores) == len(result.logits) == len(result.hidden_states) == new
    short = result.hidden_states[0][0].shape[1]
    assert result.attentions[0][0].shape[-1] == short < inputs["input_ids"].shape[1]
    transition = model.compute_transition_scores(
        result.sequences, result.scores, getattr(result, "beam_indices", None), normalize_logits=num_beams == 1
    )
    assert transition.shape[1] == new and transition.isfinite().all()
    if num_beams == 1:
        chosen = result.sequences[:, inputs["input_ids"].shape[1] :]
        greedy = torch.stack(result.logits, dim=1).argmax(-1)
        unfinished = chosen != processor.tokenizer.pad_token_id
        assert torch.equal(chosen[unfinished], greedy[unfinished])


def test_prompt_lookup(model, processor, pictures):
    inputs = row_of(processor, pictures, PROMPTS, 1)
    assert torch.equal(answers(model, inputs, prompt_lookup_num_tokens=3), answers(model, inputs))


def test_assisted_decoding_with_its_own_kind(model, processor, pictures):
    inputs = row_of(processor, pictures, PROMPTS, 1)
    assistant = copy.deepcopy(model)
    assert torch.equal(answers(model, inputs, assistant_model=assistant), answers(model, inputs))


def test_assisted_decoding_with_a_language_model(model, processor, pictures):
    from transformers import LlamaForCausalLM

    inputs = row_of(processor, pictures, PROMPTS, 1)
    assistant = LlamaForCausalLM(model.config.text_config).eval()
    assert torch.equal(answers(model, inputs, assistant_model=assistant), answers(model, inputs))


@pytest.mark.parametrize("chunk", [3, 7, 1000])
def test_chunked_prefill(model, processor, pictures, chunk):
    inputs = batch_of(processor, pictures)
    assert torch.equal(answers(model, inputs, prefill_chunk_size=chunk), answers(model, inputs))


def test_static_cache_by_name(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    settings = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(answers(model, inputs, **settings), answers(model, inputs))


def test_static_cache_by_object(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=120)
    result = answers(model, inputs, past_key_values=cache, disable_compile=True)
    assert torch.equal(result, answers(model, inputs))


def test_without_cache(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    assert torch.equal(answers(model, inputs, use_cache=False), answers(model, inputs))


def test_guidance_scale(model, processor, pictures):
    assert_batch_equals_rows(model, processor, pictures, PROMPTS, guidance_scale=1.5)
    inputs = batch_of(processor, pictures)
    guided = model.generate(**inputs, **GREEDY, guidance_scale=3.0, return_dict_in_generate=True, output_scores=True)
    plain = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert not torch.allclose(guided.scores[0], plain.scores[0])


# ---------------------------------------------------------------------------------------------------- lengths


def test_max_length_counts_the_original_prompt(model, processor, pictures):
    inputs = row_of(processor, pictures, PROMPTS, 0)
    length = inputs["input_ids"].shape[1]
    model.generation_config.eos_token_id = None
    assert model.generate(**inputs, max_length=length + 4, do_sample=False).shape[1] == length + 4
    config = copy.deepcopy(model.generation_config)
    config.max_length, config.do_sample = length + 3, False
    before = config.to_dict()
    assert model.generate(**inputs, generation_config=config).shape[1] == length + 3
    assert config.to_dict() == before
    model.generation_config.max_length = length + 2
    assert model.generate(**inputs, do_sample=False).shape[1] == length + 2
    with pytest.raises(ValueError, match=f"max_length is {length}.*max_new_tokens"):
        model.generate(**inputs, max_length=length)


def test_min_new_tokens_and_min_length(model, processor, pictures):
    inputs = row_of(processor, pictures, PROMPTS, 0)
    length = inputs["input_ids"].shape[1]
    first = answers(model, inputs)[0, 0].item()
    model.generation_config.eos_token_id = first  # stops at once unless a minimum forbids it
    assert answers(model, inputs).shape[1] == 1
    assert answers(model, inputs, min_new_tokens=4).shape[1] >= 4
    assert answers(model, inputs, min_length=length + 3).shape[1] >= 3
    assert answers(model, inputs, min_length=length).shape[1] == 1


def test_stop_strings(model, processor, pictures):
    inputs = row_of(processor, pictures, PROMPTS, 0)
    model.generation_config.eos_token_id = None
    free = answers(model, inputs, max_new_tokens=8)
    texts = [processor.tokenizer.decode(token) for token in free[0, 1:6]]
    stop = next(text for text in texts if text.strip().isascii() and text.strip())
    stopped = answers(model, inputs, max_new_tokens=8, stop_strings=[stop], tokenizer=processor.tokenizer)
    assert stopped.shape[1] < 8 and stop in processor.tokenizer.decode(stopped[0])
    assert stopped[0].tolist() == free[0, : stopped.shape[1]].tolist()


# ---------------------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}])
def test_penalties(model, processor, pictures, settings):
    assert_batch_equals_rows(model, processor, pictures, PROMPTS, **settings)


def test_repetition_penalty_reads_the_prompt(model, processor, pictures):
    inputs = row_of(processor, pictures, PROMPTS, 0)
    run = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    result = model.generate(**inputs, **GREEDY, **run, repetition_penalty=2.0)
    changed = (result.scores[0] != result.logits[0])[0].nonzero().flatten().tolist()
    assert set(changed) == set(inputs["input_ids"][0].tolist())


class Recorder(LogitsProcessor, StoppingCriteria):
    """Remembers the prompts that it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return scores


class NeverStop(Recorder):
    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_callbacks_see_the_original_prompt(model, processor, pictures, settings):
    inputs = batch_of(processor, pictures)
    length = inputs["input_ids"].shape[1]
    logits, stopping, prefixes = Recorder(), NeverStop(), []

    def allowed(row, ids):
        prefixes.append((row, ids.clone()))
        return list(range(200))

    model.generate(
        **inputs,
        **GREEDY,
        **settings,
        logits_processor=LogitsProcessorList([logits]),
        stopping_criteria=StoppingCriteriaList([stopping]),
        prefix_allowed_tokens_fn=allowed,
    )
    for seen in (logits.seen, stopping.seen):
        assert seen
        for ids in seen:
            expected = inputs["input_ids"].repeat_interleave(len(ids) // 3, dim=0)
            assert torch.equal(ids[:, :length], expected)
    assert prefixes and all(torch.equal(ids[:length], inputs["input_ids"][row]) for row, ids in prefixes)
    assert {ids.shape[1] for ids in logits.seen} == set(range(length, length + len({i.shape[1] for i in logits.seen})))


def test_streamer_sees_the_original_prompt(model, processor, pictures, capsys):
    class Collector(BaseStreamer):
        values, ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    inputs = row_of(processor, pictures, PROMPTS, 0)
    collector = Collector()
    sequences = model.generate(**inputs, **GREEDY, streamer=collector)
    assert torch.equal(collector.values[0], inputs["input_ids"]) and collector.ended
    assert torch.cat([value.flatten() for value in collector.values]).tolist() == sequences[0].tolist()
    model.generate(**inputs, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out.strip()
    assert printed == processor.tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :]).strip()


# ---------------------------------------------------------------------------------------------------- several turns


def next_turn(processor, sequences, text, mask=None):
    """The full history with one more question behind it."""
    more = processor.tokenizer([text] * len(sequences), return_tensors="pt")["input_ids"]
    ids = torch.cat([sequences, more], dim=1)
    mask = (
        torch.ones_like(ids)
        if mask is None
        else torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    )
    return ids, mask, more


@pytest.fixture
def first_turn(model, processor, pictures):
    model.generation_config.eos_token_id = None
    inputs = batch_of(processor, pictures)
    result = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    return inputs, result


def uncached_second_turn(model, inputs, ids, mask):
    """The same conversation without a cache: the first question still guides the image."""
    full = {**inputs, "input_ids": ids, "attention_mask": mask}
    return model.generate(**full, **GREEDY)[:, ids.shape[1] :]


@pytest.mark.smoke
def test_second_turn_with_full_history(model, processor, first_turn):
    inputs, result = first_turn
    ids, mask, _ = next_turn(processor, result.sequences, "USER: and the dog ? ASSISTANT:", inputs["attention_mask"])
    cached = model.generate(input_ids=ids, attention_mask=mask, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(cached[:, : ids.shape[1]], ids)
    assert torch.equal(cached[:, ids.shape[1] :], uncached_second_turn(model, inputs, ids, mask))


def test_second_turn_with_full_history_and_images(model, processor, first_turn):
    """What a processor returns for the whole chat: all images again, although they are cached."""
    inputs, result = first_turn
    ids, mask, _ = next_turn(processor, result.sequences, "USER: and the dog ? ASSISTANT:", inputs["attention_mask"])
    again = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
    with_images = copy.deepcopy(result.past_key_values)
    cached = model.generate(input_ids=ids, attention_mask=mask, past_key_values=with_images, **again, **GREEDY)
    expected = model.generate(input_ids=ids, attention_mask=mask, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(cached, expected)


def test_second_turn_with_new_tokens_alone(model, processor, first_turn):
    inputs, result = first_turn
    ids, mask, more = next_turn(processor, result.sequences, "USER: and the dog ? ASSISTANT:", inputs["attention_mask"])
    new = torch.cat([result.sequences[:, -1:], more], dim=1)  # the last answer token is not cached yet
    cached = model.generate(input_ids=new, attention_mask=mask, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(cached[:, : new.shape[1]], new)
    assert torch.equal(cached[:, new.shape[1] :], uncached_second_turn(model, inputs, ids, mask))


def test_deep_copy_of_a_cache_serves_two_continuations(model, processor, first_turn):
    inputs, result = first_turn
    for text in ("USER: and the dog ? ASSISTANT:", "USER: why ? ASSISTANT:"):
        ids, mask, _ = next_turn(processor, result.sequences, text, inputs["attention_mask"])
        cache = copy.deepcopy(result.past_key_values)
        cached = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(cached[:, ids.shape[1] :], uncached_second_turn(model, inputs, ids, mask))


def test_one_cached_image_serves_a_batch_of_questions(model, processor, pictures):
    """As in stock: `batch_repeat_interleave` makes a row for each question out of one."""
    model.generation_config.eos_token_id = None
    inputs = batch_of(processor, pictures, PROMPTS[:1])
    result = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turns = [next_turn(processor, result.sequences, f"USER: {word} ? ASSISTANT:")[0] for word in ("cat", "dog", "red")]
    alone = [
        model.generate(input_ids=ids, past_key_values=copy.deepcopy(result.past_key_values), **GREEDY) for ids in turns
    ]
    cache = copy.deepcopy(result.past_key_values)
    cache.batch_repeat_interleave(3)
    assert torch.equal(model.generate(input_ids=torch.cat(turns), past_key_values=cache, **GREEDY), torch.cat(alone))
    # By `forward`, with new tokens alone.
    cache = copy.deepcopy(result.past_key_values)
    cache.batch_repeat_interleave(3)
    new = torch.cat(turns)[:, cache.compressed_history.input_ids.shape[1] :]
    logits = model(input_ids=new, past_key_values=cache).logits[:, -1]
    assert torch.equal(logits.argmax(-1), torch.cat(alone)[:, turns[0].shape[1]])


@pytest.mark.parametrize("second", ["images", "text"])
def test_a_static_cache_that_was_reset_is_empty(model, processor, pictures, second):
    inputs = batch_of(processor, pictures)
    cache = StaticCache(config=model.config.text_config, max_cache_len=100)
    model(**inputs, past_key_values=cache)
    cache.reset()
    if second == "text":
        inputs = processor(text=["USER: why ? ASSISTANT:"] * 3, return_tensors="pt")
    logits = model(**inputs, past_key_values=cache).logits[:, -1:]
    torch.testing.assert_close(logits, model(**inputs).logits[:, -1:], rtol=1e-4, atol=1e-4)
    ids, mask = logits.argmax(-1), inputs["attention_mask"]
    longer = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], ids], dim=1),
        "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1),
    }
    step = model(input_ids=ids, attention_mask=longer["attention_mask"], past_key_values=cache).logits
    torch.testing.assert_close(step, model(**longer).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_a_cache_that_has_lost_rows_is_refused(model, processor, first_turn):
    inputs, result = first_turn
    result.past_key_values.batch_select_indices(torch.tensor([2, 0]))
    with pytest.raises(ValueError, match="holds 2 rows, but its history 3"):
        model(input_ids=inputs["input_ids"][:2, -1:], past_key_values=result.past_key_values)


@pytest.mark.parametrize("all_images", [False, True])
def test_new_image_in_a_later_turn(model, processor, pictures, first_turn, all_images):
    inputs, result = first_turn
    turn = processor(
        images=[[picture] for picture in pictures[1:4]],
        text=["USER: <image>\n and this ? ASSISTANT:"] * 3,
        padding=True,
        return_tensors="pt",
    )
    ids = torch.cat([result.sequences, turn["input_ids"]], dim=1)
    answered = inputs["attention_mask"].new_ones(3, result.sequences.shape[1] - inputs["input_ids"].shape[1])
    mask = torch.cat([inputs["attention_mask"], answered, turn["attention_mask"]], dim=1)
    images = images_of(turn)
    if all_images:
        of_first = images_of(inputs)
        images = {name: torch.stack([of_first[name], images[name]], dim=1).flatten(0, 1) for name in images}
    question = {name: turn[name] for name in turn if "question" in name}
    cached = model.generate(
        input_ids=ids,
        attention_mask=mask,
        **images,
        past_key_values=result.past_key_values,
        **question,
        **GREEDY,
    )
    for row in range(3):
        alone = model.generate(
            input_ids=inputs["input_ids"][row : row + 1][inputs["attention_mask"][row : row + 1].bool()][None],
            **images_of(inputs, slice(row, row + 1)),
            **{name: inputs[name][row : row + 1] for name in inputs if "question" in name},
            **GREEDY,
            return_dict_in_generate=True,
        )
        ids_of_turn = turn["input_ids"][row][turn["attention_mask"][row].bool()]
        ids_row = torch.cat([alone.sequences, ids_of_turn[None]], dim=1)
        expected = model.generate(
            input_ids=ids_row,
            **images_of(turn, slice(row, row + 1)),
            past_key_values=alone.past_key_values,
            **{name: value[row : row + 1] for name, value in question.items()},
            **GREEDY,
        )
        assert cached[row, ids.shape[1] :].tolist() == expected[0, ids_row.shape[1] :].tolist()
    # A third turn, without an image, goes on from there.
    assert cached.shape[1] == ids.shape[1] + 6


def test_three_turns_through_one_cache(model, processor, pictures):
    model.generation_config.eos_token_id = None
    inputs = row_of(processor, pictures, PROMPTS, 0)
    cache = DynamicCache(config=model.config.get_text_config())
    sequences = model.generate(**inputs, **GREEDY, past_key_values=cache)
    for text in ("USER: and the dog ? ASSISTANT:", "USER: why ? ASSISTANT:"):
        ids, mask, _ = next_turn(processor, sequences, text)
        sequences = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        assert torch.equal(sequences[:, ids.shape[1] :], uncached_second_turn(model, inputs, ids, mask))


def test_uncompressed_cache_then_a_compressed_image(model, processor, pictures):
    model.generation_config.eos_token_id = None
    inputs = row_of(processor, pictures, ["USER: what is a dog ? ASSISTANT:"], 0)
    result = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = row_of(processor, pictures, PROMPTS, 0)
    ids = torch.cat([result.sequences, turn["input_ids"]], dim=1)
    rest = {name: turn[name] for name in turn if name not in ("input_ids", "attention_mask")}
    cached = model.generate(input_ids=ids, past_key_values=result.past_key_values, **rest, **GREEDY)
    assert torch.equal(cached, model.generate(input_ids=ids, **rest, **GREEDY))


def test_a_cache_that_is_no_prefix_is_refused(model, processor, first_turn):
    inputs, result = first_turn
    ids, mask, _ = next_turn(processor, result.sequences, "USER: why ? ASSISTANT:", inputs["attention_mask"])
    ids[:, 45] += 1
    with pytest.raises(ValueError, match="past_key_values does not belong to a prefix"):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=result.past_key_values, **GREEDY)
    # The refused cache is as good as before.
    ids[:, 45] -= 1
    cached = model.generate(input_ids=ids, attention_mask=mask, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(cached[:, ids.shape[1] :], uncached_second_turn(model, inputs, ids, mask))


def test_cropped_cache(model, processor, first_turn):
    inputs, result = first_turn
    cache = result.past_key_values
    cache.crop(-3)  # within the answer: fine
    ids, mask = result.sequences[:, :-2], torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    cached = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(cached[:, ids.shape[1] :], uncached_second_turn(model, inputs, ids, mask))
    cache.crop(-cache.get_seq_length() + 5)
    with pytest.raises(ValueError, match="cropped or changed from outside"):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)


def test_wrong_rows_or_mask_for_a_cache(model, processor, first_turn):
    inputs, result = first_turn
    with pytest.raises(ValueError, match="input_ids has 1 rows, but past_key_values stands for 3"):
        model.generate(input_ids=result.sequences[:1], past_key_values=result.past_key_values, **GREEDY)
    with pytest.raises(ValueError, match="attention_mask has 5 columns"):
        model.generate(
            input_ids=result.sequences[:, -1:],
            attention_mask=torch.ones(3, 5, dtype=torch.long),
            past_key_values=result.past_key_values,
            **GREEDY,
        )
    with pytest.raises(ValueError, match="no new token"):
        model.generate(
            input_ids=result.sequences[:, :0],
            attention_mask=torch.ones(3, result.sequences.shape[1] - 1, dtype=torch.long),
            past_key_values=result.past_key_values,
            **GREEDY,
        )


# ----------------------------------------------------------------------------------------- reuse of encodings


def test_question_embeds_instead_of_ids(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    expected = model.generate(**inputs, **GREEDY)
    embeds = model.get_question_embeds(inputs["question_input_ids"])
    assert torch.equal(model.generate(**without_question(inputs), question_embeds=embeds, **GREEDY), expected)


def test_vision_features_instead_of_pixels(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    vision = model.get_vision_features(**images_of(inputs))
    for name in ("cat", "the red one"):
        asked = batch_of(processor, pictures, questions=[name] * 3)
        reused = {key: value for key, value in asked.items() if key not in images_of(inputs)}
        assert torch.equal(
            model.generate(**reused, vision_features=vision, **GREEDY), model.generate(**asked, **GREEDY)
        )


# ---------------------------------------------------------------------------------------------------- fixed budget


@pytest.mark.parametrize("budget", [1, 5, 17, 36])
@pytest.mark.parametrize(
    "prompts", [PROMPTS, ["USER: <image>\n and <image>\n what ? ASSISTANT:", "USER: hi ASSISTANT:"]]
)
def test_both_roads_of_a_fixed_budget_agree(model, processor, pictures, budget, prompts):
    model.config.visual_token_budget = budget
    full = batch_of(processor, pictures, prompts)
    processor.visual_token_budget = budget
    short = batch_of(processor, pictures, prompts)
    num_images = sum(prompt.count("<image>") for prompt in prompts)
    assert (short["input_ids"] == model.config.image_token_id).sum() == num_images * budget
    settings = {"num_beams": 2, "num_return_sequences": 2}
    assert torch.equal(answers(model, full), answers(model, short))
    assert torch.equal(answers(model, full, **settings), answers(model, short, **settings))
    long_logits, short_logits = model(**full).logits, model(**short).logits
    assert torch.allclose(long_logits[:, -1], short_logits[:, -1], atol=1e-5)


def test_fixed_budget_on_the_stock_road(model, processor, pictures):
    """The short prompt through stock's own code: get_image_features and a plain forward."""
    model.config.visual_token_budget = processor.visual_token_budget = 9
    inputs = batch_of(processor, pictures)
    question = {name: inputs[name] for name in inputs if "question" in name}
    features = model.get_image_features(**images_of(inputs), **question).pooler_output
    assert [len(tokens) for tokens in features] == [9, 9, 9]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(is_image[:, :, None], torch.cat(list(features)))
    expected = model.lm_head(
        model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
    )
    logits = model(**inputs).logits
    valid = inputs["attention_mask"].bool()
    assert torch.allclose(logits[valid], expected[valid], atol=1e-4)


def test_short_prompts_leave_a_plain_cache(model, processor, pictures):
    """Nothing is dropped on this road, so a decode loop by hand needs no translation."""
    model.config.visual_token_budget = processor.visual_token_budget = 9
    model.generation_config.eos_token_id = None
    inputs = batch_of(processor, pictures)
    expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    outputs, answer, mask = model(**inputs), [], inputs["attention_mask"]
    assert not hasattr(outputs.past_key_values, "compressed_history")
    assert outputs.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    for _ in range(6):
        answer.append(outputs.logits[:, -1:].argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        outputs = model(input_ids=answer[-1], past_key_values=outputs.past_key_values, attention_mask=mask)
    assert torch.equal(torch.cat(answer, dim=1), expected)


def test_placeholders_that_fit_neither_road(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    model.config.visual_token_budget = 9
    wrong = dict(inputs)
    wrong["input_ids"] = inputs["input_ids"].clone()
    places = (wrong["input_ids"] == model.config.image_token_id).nonzero()
    wrong["input_ids"][places[0, 0], places[0, 1]] = 5
    found, longest = len(places) - 1, int(torch.bincount(places[:, 0]).max())
    for run in (model.generate, model):
        with pytest.raises(ValueError, match=f"{found} image placeholders, but 3 images.*visual_token_budget = 9"):
            run(**wrong)
    model.config.visual_token_budget = None
    for run in (model.generate, model):
        with pytest.raises(
            ValueError,
            match=f"{found} image placeholders, but 3 images need (at most )?{longest} each, {found + 1} in all",
        ):
            run(**wrong)


# ---------------------------------------------------------------------------------------------------- bad input


def test_images_without_placeholders_and_the_reverse(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    text = processor.tokenizer(["USER: hi ASSISTANT:"] * 3, return_tensors="pt")
    with pytest.raises(ValueError, match="0 image placeholders, but 3 images"):
        model.generate(**text, **images_of(inputs))
    with pytest.raises(ValueError, match="image placeholders, but no images"):
        model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def test_question_rows_must_equal_prompt_rows(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    inputs["question_input_ids"] = inputs["question_input_ids"][:2]
    with pytest.raises(ValueError, match="question_input_ids has 2 rows, but there are 3"):
        model.generate(**inputs)


def test_not_finite_pixels_spoil_their_own_row_alone(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    expected = model(**inputs).logits
    for bad in (float("nan"), float("inf")):
        spoiled = dict(inputs)
        spoiled["pixel_values"] = inputs["pixel_values"].clone()
        spoiled["pixel_values"][1] = bad
        logits = model(**spoiled).logits
        assert torch.allclose(logits[[0, 2], -1], expected[[0, 2], -1], atol=1e-5)
        assert logits[1, -1].isnan().any()
        model.generate(**spoiled, **GREEDY)


def test_inputs_are_never_modified(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    before = {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, **GREEDY)
    model(**inputs, labels=inputs["input_ids"])
    assert all(torch.equal(inputs[name], before[name]) for name in before)


def test_generation_warns_no_more_than_stock(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(**inputs, **GREEDY)
