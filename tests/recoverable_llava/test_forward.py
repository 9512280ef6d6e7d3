"""A direct `forward` with compression: outputs keep the original length, caches can be continued by hand."""

import copy

import pytest
import torch
from batches import GREEDY, PROMPTS, batch_of, both_families, images_of, joined, row_of, without_question
from tiny import FAMILIES, LANGUAGE_MODELS, NUM_PATCHES, RECOVERY, save_tiny_llava
from transformers import DynamicCache

from recoverable_llava.tools.combine import combine


pytestmark = both_families


def assert_rows_equal(model, processor, pictures, prompts, **options):
    inputs = batch_of(processor, pictures, prompts, **options)
    together = model(**inputs).logits
    for index in range(len(prompts)):
        alone = model(**row_of(processor, pictures, prompts, index)).logits
        valid = inputs["attention_mask"][index].bool()
        assert torch.allclose(together[index, valid], alone[0], atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS,
        [PROMPTS[0], "USER: what is a dog ? ASSISTANT:", PROMPTS[2]],
        ["USER: <image>\n and <image>\n what is it ? ASSISTANT:", "USER: what ? ASSISTANT:", PROMPTS[1]],
        # The longest row loses nothing, the others do.
        [PROMPTS[0], "USER: " + "please tell me about the cat and the dog and then why " * 5 + "? ASSISTANT:"],
    ],
)
def test_batch_equals_rows(model, processor, pictures, prompts, side):
    assert_rows_equal(model, processor, pictures, prompts, padding_side=side)


def test_outputs_have_the_original_length(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    outputs = model(**inputs, output_hidden_states=True, output_attentions=False)
    length = inputs["input_ids"].shape[1]
    assert outputs.logits.shape[1] == length
    assert all(states.shape[1] == length for states in outputs.hidden_states)
    assert outputs.past_key_values.get_seq_length() < length
    # A dropped position repeats what stands before it.
    is_image = inputs["input_ids"] == model.config.image_token_id
    kept = model.recover_tokens(**inputs).selection.num_tokens
    for row in range(len(kept)):
        block = outputs.logits[row, is_image[row]]
        assert torch.equal(block[kept[row] :], block[kept[row] - 1].expand(len(block) - kept[row], -1))
        assert not torch.equal(block[kept[row] - 1], block[kept[row] - 2])


def test_attentions_are_over_the_original_prompt(model, processor, pictures):
    """A dropped position is attended to by nobody and attends as the last kept one before it; nor is padding."""
    model.set_attn_implementation("eager")
    inputs = batch_of(processor, pictures)
    mask, length = inputs["attention_mask"].bool(), inputs["input_ids"].shape[1]
    outputs = model(**inputs, output_attentions=True)
    is_image = inputs["input_ids"] == model.config.image_token_id
    kept = model.recover_tokens(**inputs).selection.num_tokens
    assert len(outputs.attentions) == 2
    for weights in outputs.attentions:
        assert weights.shape == (3, 4, length, length)
        for row in range(3):
            torch.testing.assert_close(weights[row].sum(-1)[:, mask[row]], torch.ones(4, int(mask[row].sum())))
            image = is_image[row].nonzero().flatten()
            dropped = image[int(kept[row]) :]
            assert not weights[row][:, :, dropped].any() and not weights[row][:, :, ~mask[row]].any()
            stand_in = weights[row][:, image[int(kept[row]) - 1]]
            assert torch.equal(weights[row][:, dropped], stand_in[:, None].expand(-1, len(dropped), -1))
            present = mask[row].clone()
            present[dropped] = False
            assert (weights[row][:, -1, present] > 0).all()
    # A later token attends over all that was cached, in the original numbering, too.
    step = torch.full((3, 1), 5)
    later = model(input_ids=step, past_key_values=outputs.past_key_values, output_attentions=True).attentions[0]
    assert later.shape == (3, 4, 1, length + 1)
    torch.testing.assert_close(later.sum(-1), torch.ones(3, 4, 1))
    for row in range(3):
        dropped = is_image[row].nonzero().flatten()[int(kept[row]) :]
        assert not later[row][:, :, dropped].any() and (later[row][:, :, -3:] > 0).all()


@pytest.mark.parametrize("logits_to_keep", [1, 5, torch.tensor([3, 44, 50])])
def test_logits_to_keep(model, processor, pictures, logits_to_keep):
    inputs = batch_of(processor, pictures)
    every = model(**inputs).logits
    wanted = every[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else every[:, logits_to_keep]
    assert torch.allclose(model(**inputs, logits_to_keep=logits_to_keep).logits, wanted, atol=1e-6)


def test_return_dict_false(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    inner = model.model(**inputs, return_dict=False)
    assert torch.equal(inner[0], model.model(**inputs).last_hidden_state)


def test_generate_begins_where_forward_ends(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1]]
    assert torch.equal(model(**inputs).logits[:, -1].argmax(-1), expected)


def test_decode_loop_by_hand(model, processor, pictures):
    model.generation_config.eos_token_id = None
    inputs = batch_of(processor, pictures)
    expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for style in ("full mask", "short mask", "positions"):
        outputs, answer, mask = model(**inputs), [], inputs["attention_mask"]
        for _ in range(6):
            answer.append(outputs.logits[:, -1:].argmax(-1))
            cache = outputs.past_key_values
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            step = {"input_ids": answer[-1], "past_key_values": cache, "attention_mask": mask}
            if style == "positions":
                step["position_ids"] = mask.sum(1, keepdim=True) - 1
            if style == "short mask":
                step["attention_mask"] = cache.compressed_history.short_attention_mask.new_ones(3, 1)
            outputs = model(**step)
        assert torch.equal(torch.cat(answer, dim=1), expected), style


@torch.no_grad()
def test_a_cache_from_forward_serves_generate(model, processor, pictures):
    model.generation_config.eos_token_id = None
    inputs = batch_of(processor, pictures)
    cache = DynamicCache(config=model.config.get_text_config())
    cut = inputs["input_ids"].shape[1] - 3
    prefix = {**inputs, "input_ids": inputs["input_ids"][:, :cut], "attention_mask": inputs["attention_mask"][:, :cut]}
    model(**prefix, past_key_values=cache)
    once = copy.deepcopy(cache)
    result = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], past_key_values=once, **GREEDY
    )
    assert torch.equal(result, model.generate(**inputs, **GREEDY))


def test_new_image_in_a_later_forward(model, processor, pictures):
    first = row_of(processor, pictures, PROMPTS, 0)
    second = processor(images=[[pictures[2]]], text=["USER: <image>\n and this ? ASSISTANT:"], return_tensors="pt")
    cache = model(**first).past_key_values
    turn = {name: value for name, value in second.items() if name != "attention_mask"}
    continued = model(**turn, past_key_values=cache)
    assert continued.logits.shape[1] == second["input_ids"].shape[1]
    # Both images in one prompt, each guided by its own turn's question, is the same computation.
    vision = model.get_vision_features(**joined(images_of(first), images_of(second)))
    embeds = [model.get_question_embeds(turn["question_input_ids"]) for turn in (first, second)]
    history = continued.past_key_values.compressed_history
    counts = [
        model.recover_tokens(
            input_ids=one["input_ids"], **images_of(one), question_embeds=question
        ).selection.num_tokens.item()
        for one, question in zip((first, second), embeds)
    ]
    text = sum(int((one["input_ids"] != model.config.image_token_id).sum()) for one in (first, second))
    assert history.short_input_ids.shape[1] == text + sum(counts) == continued.past_key_values.get_seq_length()
    assert torch.equal(history.input_ids, torch.cat([first["input_ids"], second["input_ids"]], dim=1))
    assert len(vision.patches) == 2


def test_mask_over_pairs_is_refused(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(3, 1, length, length, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        model(**inputs)


def test_an_image_split_over_two_prompts_is_refused(model, processor, pictures):
    """As many placeholders as the images need, but not each image's own in one prompt."""
    inputs = batch_of(processor, pictures)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image_token = model.config.image_token_id
    first = (ids[0] == image_token).nonzero()[0]
    text = (mask[1].bool() & (ids[1] != image_token)).nonzero()[0]
    ids[0, first], ids[1, text] = 5, image_token
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="an image's placeholders stand in one prompt"):
            run(**inputs)


def test_mask_of_no_known_length_is_refused(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="attention_mask has 7 columns for 1 new tokens"):
        model(
            input_ids=torch.ones(3, 1, dtype=torch.long),
            attention_mask=torch.ones(3, 7, dtype=torch.long),
            past_key_values=cache,
        )


def test_packed_sequences(model, processor, pictures):
    """Two prompts in one row, told apart by positions that restart, equal the two prompts alone."""
    rows = [row_of(processor, pictures, PROMPTS, index) for index in range(2)]
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    positions = torch.cat([torch.arange(row["input_ids"].shape[1])[None] for row in rows], dim=1)
    # One question per row of the batch: the packed row has one, so both prompts ask the same.
    question = {name: rows[0][name] for name in rows[0] if "question" in name}
    packed = model(
        input_ids=ids,
        **joined(*map(images_of, rows)),
        position_ids=positions,
        use_cache=False,
        **question,
    ).logits
    alone = [model(input_ids=row["input_ids"], **images_of(row), **question).logits for row in rows]
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


def test_loss_by_hand(model, processor, pictures):
    for side in ("left", "right"):
        inputs = batch_of(processor, pictures, padding_side=side)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = model(**inputs, labels=labels)
        total, count = 0.0, 0
        for row in range(3):
            ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row]
            for position in range(1, len(ids)):
                if mask[position] == 0 or mask[position - 1] == 0 or ids[position] == model.config.image_token_id:
                    continue
                total -= outputs.logits[row, position - 1].log_softmax(-1)[ids[position]].item()
                count += 1
        assert abs(outputs.loss.item() - total / count) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_shifted_labels_say_the_same(model, processor, pictures, side):
    """What sequence-parallel trainers pass: for each position the token to predict, instead of the token there."""
    inputs = batch_of(processor, pictures, padding_side=side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**inputs, labels=labels).loss
    for unread in (labels, torch.zeros_like(labels)):
        loss = model(**inputs, labels=unread, shift_labels=shifted).loss
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    assert model(**inputs, shift_labels=shifted).loss is None  # as in stock


def test_loss_of_accumulated_batches_is_that_of_one(model, processor, pictures):
    """A trainer counts the labels of all batches of a step beforehand, those on placeholders included."""
    rows = [row_of(processor, pictures, PROMPTS, index) for index in range(3)]
    num_items = sum(int((row["input_ids"][:, 1:] != -100).sum()) for row in rows)
    parts = [model(**row, labels=row["input_ids"], num_items_in_batch=num_items).loss for row in rows]
    counts = [int((row["input_ids"][:, 1:] != model.config.image_token_id).sum()) for row in rows]
    alone = [model(**row, labels=row["input_ids"]).loss for row in rows]
    mean = sum(count * loss for count, loss in zip(counts, alone)) / sum(counts)
    assert len(set(counts)) > 1
    torch.testing.assert_close(sum(parts), mean, rtol=0.1, atol=0)
    # Where every batch has the same share of labels that count, it is exact.
    num_items = 2 * (rows[0]["input_ids"].shape[1] - 1)
    half = model(**rows[0], labels=rows[0]["input_ids"], num_items_in_batch=num_items).loss
    torch.testing.assert_close(2 * half, alone[0], rtol=1e-5, atol=0)


def test_left_and_right_padded_losses_agree(model, processor, pictures):
    losses = []
    for side in ("left", "right"):
        inputs = batch_of(processor, pictures, padding_side=side)
        losses.append(model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss)
    assert torch.allclose(*losses, atol=1e-5)


def test_off_equals_stock_with_labels_and_all(model, processor, pictures, stock):
    model.config.compress = False
    inputs = batch_of(processor, pictures)
    plain = without_question(inputs)
    ours = model(**inputs, labels=inputs["input_ids"], output_hidden_states=True)
    theirs = stock(**plain, labels=inputs["input_ids"], output_hidden_states=True)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states))
    own, other = (torch.utils._pytree.tree_leaves(outputs.to_tuple()[-1]) for outputs in (ours, theirs))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_get_image_features_as_stock(model, processor, pictures, stock):
    images = images_of(batch_of(processor, pictures))
    ours, theirs = model.get_image_features(**images), stock.get_image_features(**images)
    assert all(torch.equal(a, b) for a, b in zip(ours.pooler_output, theirs.pooler_output))
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)


def test_eager_equals_sdpa(model, processor, pictures):
    inputs = batch_of(processor, pictures)
    model.set_attn_implementation("sdpa")
    sdpa = model(**inputs).logits
    model.set_attn_implementation("eager")
    valid = inputs["attention_mask"].bool()
    assert torch.allclose(model(**inputs).logits[valid], sdpa[valid], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(model, processor, pictures, dtype):
    model.to(dtype)
    inputs = batch_of(processor, pictures).to(dtype)
    outputs = model(**inputs)
    assert outputs.logits.dtype == dtype and outputs.logits[:, -1].isfinite().all()
    together = model.recover_tokens(**inputs).selection.num_tokens
    for index in range(3):
        alone = row_of(processor, pictures, PROMPTS, index).to(dtype)
        assert model.recover_tokens(**alone).selection.num_tokens.item() == together[index].item()
    assert model.generate(**inputs, **GREEDY).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"vision_feature_layer": [-3, -2]}, {"vision_feature_select_strategy": "full"}, {"vision_feature_layer": 1}],
    ids=["default", "two layers", "full", "layer 1"],
)
def test_other_checkpoints(tmp_path, clip_folder, pictures, family, language_model, settings):
    if language_model != "llama" and settings:
        pytest.skip("the vision settings do not depend on the language model")
    if family == "llava_next" and "vision_feature_select_strategy" in settings:
        pytest.skip("LLaVA-NeXT has no place for class tokens")
    save_tiny_llava(tmp_path, clip_folder, language_model=language_model, family=family, **settings)
    model, processor = combine(str(tmp_path), clip_folder, **RECOVERY)
    assert_rows_equal(model, processor, pictures, PROMPTS)
    inputs = batch_of(processor, pictures)
    kept = model.recover_tokens(**inputs).selection.num_tokens
    expected = model.generate(**inputs, **GREEDY)
    assert kept.min() < NUM_PATCHES

    model.config.visual_token_budget = processor.visual_token_budget = 9
    short = batch_of(processor, pictures)
    per_image = (short["input_ids"] == model.config.image_token_id).sum(1)
    assert per_image.tolist() == [9, 9, 9]
    assert torch.allclose(model(**short).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-5)

    model.config.visual_token_budget = None
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    model.config.compress = False
    stock = FAMILIES[family][1].from_pretrained(tmp_path)
    assert torch.equal(model(**inputs).logits, stock(**without_question(inputs)).logits)


@torch.no_grad()
def test_embeddings_instead_of_ids(model, processor, pictures):
    """As in stock, placeholders are told by the embedding of the image token."""
    inputs = batch_of(processor, pictures)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {**inputs, "inputs_embeds": embeds}
    del given["input_ids"]
    before = embeds.clone()
    expected = model(**inputs)
    found = model(**given)
    assert torch.equal(found.logits, expected.logits) and torch.equal(embeds, before)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(model.generate(**given, **GREEDY), new)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert torch.equal(model(**given, labels=labels).loss, model(**inputs, labels=labels).loss)


@torch.no_grad()
def test_the_cache_has_two_names(model, processor, pictures):
    """transformers 5.24 calls `past_key_values` `cache`; either is understood, in every version."""
    inputs = batch_of(processor, pictures)
    step = {"input_ids": torch.full((3, 1), 5)}
    logits = []
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**inputs, **{name: cache})
        logits.append(model(**step, **{name: cache}).logits)
        assert cache.get_seq_length() < inputs["input_ids"].shape[1]
    assert torch.equal(*logits)
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            run(**inputs, past_key_values=DynamicCache(), cache=DynamicCache())


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 9])
def test_the_visual_tokens_stand_where_stock_has_the_features(model, processor, pictures, budget):
    model.config.visual_token_budget = budget
    inputs = batch_of(processor, pictures)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    outputs = model(**inputs)
    counts = model.recover_tokens(**inputs).selection.num_tokens.tolist()
    if hasattr(outputs, "image_outputs"):  # since transformers 5.24
        tokens = torch.cat(list(outputs.image_outputs.pooler_output))
    else:
        tokens = outputs.image_hidden_states
    assert len(tokens) == sum(counts) and (budget is None or counts == [9] * 3)
    for row, own in enumerate(tokens.split(counts)):
        last = len(inputs["input_ids"][row]) - 1
        behind = last - int((inputs["input_ids"][row] == model.config.image_token_id).nonzero().max())
        end = seen[0].shape[1] - behind
        assert torch.equal(seen[0][row, end - counts[row] : end], own)
