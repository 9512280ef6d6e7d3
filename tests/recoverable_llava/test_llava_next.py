"""What LLaVA-NeXT alone has: images of any size in one batch, cut into tiles, and every error that this makes possible.

All else that a model does, both families' tests do with it.
"""

import copy

import numpy as np
import pytest
import tiny
import torch
from batches import GREEDY, PROMPTS, answers, batch_of, images_of, row_of, without_question
from PIL import Image
from tiny import NUM_PATCHES, PINPOINTS
from transformers import pipeline

from recoverable_llava import RecoverableLlavaNextConfig
from recoverable_llava.image_tiles import ImageTiles
from recoverable_llava.tools.combine import combine


pytestmark = pytest.mark.parametrize("family", ["llava_next"], indirect=True)

# Height and width: of one tile and of several, with padding above, beside, and without; and so narrow that the grid has
# no columns, or no rows.
SIZES = [(84, 84), (400, 10), (200, 180), (10, 400), (100, 300), (168, 168), (400, 90)]
NO_COLUMNS, NO_ROWS = 1, 3
PROMPT = PROMPTS[0]
TWO_IMAGES = ["USER: <image> and <image>\nwhat is it ? ASSISTANT:", "USER: what ? ASSISTANT:", *PROMPTS]
MOST_TILES = 5


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(1)
    return [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


def tiles_of(processor, pictures):
    pinpoints = processor.image_processor.image_grid_pinpoints
    return [ImageTiles.of((each.height, each.width), pinpoints, tiny.IMAGE_SIZE, 6) for each in pictures]


def in_a_row(inputs):
    """The same inputs with the tiles of all images one behind the other, as stock takes them, too."""
    tiles = [
        ImageTiles.of(size, PINPOINTS, tiny.IMAGE_SIZE, 6).num_tiles
        for size in map(tuple, inputs["image_sizes"].tolist())
    ]
    pixels = torch.cat([pixels[:number] for pixels, number in zip(inputs["pixel_values"], tiles)])
    return {**inputs, "pixel_values": pixels}


def test_the_pictures_are_of_every_kind(processor, pictures):
    tiles = tiles_of(processor, pictures)
    assert tiles[NO_COLUMNS].columns == 0 < tiles[NO_COLUMNS].rows and tiles[NO_ROWS].rows == 0
    assert len({each.num_tiles for each in tiles}) > 1
    assert any(each.top for each in tiles) and any(each.left for each in tiles)
    assert any(not each.top and not each.left for each in tiles)


# -------------------------------------------------------------------------------------------------------- the processor


def test_inputs_are_those_of_stock_but_for_empty_tiles(processor, llava_folder, pictures):
    stock_processor = tiny.FAMILIES["llava_next"][2].from_pretrained(llava_folder)
    for index in range(len(pictures)):
        ours, theirs = (
            row_of(each, pictures, [PROMPT] * len(pictures), index) for each in (processor, stock_processor)
        )
        assert {*ours} == {*theirs, "question_input_ids", "question_attention_mask"}
        for name in ("input_ids", "attention_mask", "image_sizes"):
            assert torch.equal(ours[name], theirs[name])
        num_tiles = theirs["pixel_values"].shape[1]
        assert torch.equal(ours["pixel_values"][:, :num_tiles], theirs["pixel_values"])
        assert ours["pixel_values"].shape[1] == MOST_TILES and not ours["pixel_values"][:, num_tiles:].any()
    count = processor._get_num_multimodal_tokens([list(size) for size in SIZES]).num_image_tokens
    assert count == stock_processor._get_num_multimodal_tokens([list(size) for size in SIZES]).num_image_tokens


def test_no_tile_is_lost_where_a_call_names_other_resolutions(processor, pictures):
    options = {"image_grid_pinpoints": [[252, 252]], "return_tensors": "pt"}
    theirs = processor.image_processor(pictures[0], **options)["pixel_values"]
    assert theirs.shape[1] == 10
    assert torch.equal(processor(images=pictures[0], text=PROMPT, **options)["pixel_values"], theirs)


def test_a_budget_is_the_number_of_placeholders_of_any_image(processor, pictures):
    processor.visual_token_budget = 9
    ids = batch_of(processor, pictures, TWO_IMAGES)["input_ids"]
    assert (ids == processor.image_token_id).sum(1).tolist() == [18, 0, 9, 9, 9]
    assert processor._get_num_multimodal_tokens([list(size) for size in SIZES]).num_image_tokens == [9] * len(SIZES)


# -------------------------------------------------------------------------------------------------- without compression


@torch.no_grad()
@pytest.mark.smoke
def test_off_equals_stock_for_any_size(model, stock, processor, pictures):
    model.config.compress = False
    for inputs in (
        batch_of(processor, pictures, TWO_IMAGES + PROMPTS[:2]),
        row_of(processor, pictures[1:], PROMPTS, 0),
    ):
        for given in (inputs, in_a_row(inputs)):
            ours, theirs = model(**given), stock(**without_question(given))
            assert torch.equal(ours.logits, theirs.logits)
            expected = stock.generate(**without_question(given), **GREEDY)
            assert torch.equal(model.generate(**given, **GREEDY), expected)
            ours, theirs = (each.get_image_features(**images_of(given)).pooler_output for each in (model, stock))
            assert all(torch.equal(own, other) for own, other in zip(ours, theirs, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, 1, [-2, -1]], ids=str)
def test_features_of_any_layer_are_those_of_stock(family, clip_folder, tmp_path, pictures, layer):
    tiny.save_tiny_llava(tmp_path, clip_folder, family=family, vision_feature_layer=layer)
    model, processor = combine(str(tmp_path), clip_folder, **tiny.RECOVERY)
    stock = tiny.FAMILIES[family][1].from_pretrained(tmp_path)
    images = images_of(batch_of(processor, pictures, [PROMPT] * len(pictures)))
    vision = model.get_vision_features(**images)
    tokens = model.model.all_tokens(vision)
    for own, other in zip(tokens, stock.get_image_features(**images).pooler_output, strict=True):
        torch.testing.assert_close(own[: len(other)], other, rtol=0, atol=1e-6)
    assert vision.valid.sum(1).tolist() == [each.num_patches for each in vision.tiles]


@torch.no_grad()
def test_features_of_one_pass_serve_without_compression(model, stock, processor, pictures):
    """One image, many questions, each as stock answers it."""
    for index in (0, NO_COLUMNS, 4):
        vision = model.get_vision_features(**images_of(row_of(processor, pictures[index:], [PROMPT], 0)))
        for prompt in PROMPTS:
            inputs = row_of(processor, pictures[index:], [prompt], 0)
            reused = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            given = {**reused, "vision_features": vision, "compress": False}
            expected = stock(**without_question(inputs)).logits
            torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-5)
            assert torch.equal(model.generate(**given, **GREEDY), stock.generate(**without_question(inputs), **GREEDY))


# -------------------------------------------------------------------------------------------------- a batch is its rows


@torch.no_grad()
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("budget", [None, 9, NUM_PATCHES])
def test_images_of_any_size_are_answered_in_a_batch_as_alone(model, processor, pictures, budget, preset):
    """The largest budget is all that the narrowest images have."""
    model.config.use_preset(preset)
    model.config.visual_token_budget = budget
    prompts = TWO_IMAGES + PROMPTS[:2]
    inputs = batch_of(processor, pictures, prompts)
    logits, new = model(**inputs).logits, answers(model, inputs)
    beams = answers(model, inputs, num_beams=2)
    recovery = model.recover_tokens(**inputs)
    first = 0
    for index in range(len(prompts)):
        alone = row_of(processor, pictures, prompts, index)
        valid = inputs["attention_mask"][index].bool()
        torch.testing.assert_close(logits[index, valid], model(**alone).logits[0], rtol=0, atol=1e-4)
        for together, settings in ((new, {}), (beams, {"num_beams": 2})):
            expected = answers(model, alone, **settings)[0]
            assert together[index, : len(expected)].tolist() == expected.tolist()
        if "<image>" in prompts[index]:
            own = model.recover_tokens(**alone)
            num_images, num_patches = own.selection.chosen.shape
            rows = slice(first, first + num_images)
            assert torch.equal(recovery.selection.chosen[rows, :num_patches], own.selection.chosen)
            assert torch.equal(recovery.selection.num_tokens[rows], own.selection.num_tokens)
            first += num_images
    if budget is not None:
        processor.visual_token_budget = budget
        short = batch_of(processor, pictures, prompts)
        assert answers(model, short).tolist() == new.tolist()
        assert answers(model, short, num_beams=2).tolist() == beams.tolist()


@torch.no_grad()
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_only_what_holds_a_picture_is_chosen(model, processor, pictures, preset):
    model.config.use_preset(preset)
    inputs = batch_of(processor, pictures, [PROMPT] * len(pictures))
    vision = model.get_vision_features(**images_of(inputs))
    selection = model.recover_tokens(**inputs).selection
    chosen = selection.chosen if selection.centres is None else selection.chosen | selection.centres
    assert not (chosen & ~vision.valid).any() and chosen.any(1).all()
    most = [each.num_patches for each in vision.tiles]
    assert all(0 < number <= patches for number, patches in zip(selection.num_tokens.tolist(), most))
    # Both of the base tile and of the others, where there are any: one selection over all of them.
    with_grid = torch.tensor([each.num_patches > NUM_PATCHES for each in vision.tiles])
    assert chosen[:, :NUM_PATCHES].any() and chosen[with_grid, NUM_PATCHES:].any()


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 9])
def test_empty_tiles_have_no_say(model, processor, pictures, budget):
    model.config.visual_token_budget = budget
    inputs = batch_of(processor, pictures[:3])
    spoiled = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    tiles = tiles_of(processor, pictures[:3])
    for row, each in enumerate(tiles):
        spoiled["pixel_values"][row, each.num_tiles :] = torch.nan
    assert spoiled["pixel_values"].isnan().any()
    assert torch.equal(model(**spoiled).logits, model(**inputs).logits)
    for compress in (True, False):
        assert torch.equal(
            model.generate(**spoiled, **GREEDY, compress=compress),
            model.generate(**inputs, **GREEDY, compress=compress),
        )


@torch.no_grad()
def test_padding_of_a_tile_is_not_seen(model, processor, pictures):
    """Of a picture that fills its tiles in part, what is chosen and told apart is the picture alone."""
    inputs = row_of(processor, pictures[6:], [PROMPT], 0)
    vision = model.get_vision_features(**images_of(inputs))
    tiles = vision.tiles[0]
    assert tiles.left > 0 and vision.patches.shape[1] == tiles.num_patches < model.config.num_patches


# ------------------------------------------------------------------------------------------------ tiles of all in a row


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 9])
def test_tiles_in_a_row_are_those_of_their_images(model, processor, pictures, budget):
    model.config.visual_token_budget = budget
    inputs = batch_of(processor, pictures, TWO_IMAGES)
    expected, new = model(**inputs).logits, answers(model, inputs)
    assert torch.equal(model(**in_a_row(inputs)).logits, expected)
    assert torch.equal(answers(model, in_a_row(inputs)), new)
    found, wanted = model.recover_tokens(**in_a_row(inputs)), model.recover_tokens(**inputs)
    assert torch.equal(found.assembly.token_index, wanted.assembly.token_index)
    features = model.get_image_features(**images_of(in_a_row(inputs))).pooler_output
    assert all(map(torch.equal, features, model.get_image_features(**images_of(inputs)).pooler_output))
    if budget is not None:
        processor.visual_token_budget = budget
        short = batch_of(processor, pictures, TWO_IMAGES)
        assert torch.equal(answers(model, in_a_row(short)), new)


@torch.no_grad()
@pytest.mark.parametrize("all_images", [False, True])
def test_tiles_in_a_row_in_a_later_turn(model, processor, pictures, all_images):
    model.generation_config.eos_token_id = None
    inputs = row_of(processor, pictures, [PROMPTS[0]], 0)
    result = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = processor(images=[[pictures[2]]], text=["USER: <image>\n and this ? ASSISTANT:"], return_tensors="pt")
    questions = {name: turn[name] for name in turn if "question" in name}
    later = {**questions, **images_of(turn), "input_ids": torch.cat([result.sequences, turn["input_ids"]], dim=1)}
    cache = copy.deepcopy(result.past_key_values)
    expected = model.generate(**later, past_key_values=cache, **GREEDY)
    images = images_of(in_a_row(turn))
    if all_images:
        of_first = images_of(in_a_row(inputs))
        images = {name: torch.cat([of_first[name], images[name]]) for name in images}
    assert torch.equal(
        model.generate(**{**later, **images}, past_key_values=result.past_key_values, **GREEDY), expected
    )


# -------------------------------------------------------------------------------------------------------- how it is run


@torch.no_grad()
def test_a_pipeline_joins_pictures_of_different_sizes(model, processor, pictures):
    """Stock's fails where their numbers of tiles differ."""
    run = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it ?"}]}]
        for picture in pictures[:4]
    ]
    settings = {"generate_kwargs": GREEDY, "return_full_text": False}

    def texts(outputs):
        return [output[0]["generated_text"] for output in outputs]

    alone = [run(text=chat, **settings)[0]["generated_text"] for chat in chats]
    assert texts(run(text=chats, batch_size=2, **settings)) == alone
    assert len(set(alone)) > 1


@pytest.mark.filterwarnings("ignore:The following device_map keys:UserWarning")  # a parameter of its own: image_newline
@torch.no_grad()
@pytest.mark.parametrize("placement", ["auto", "disk"])
def test_placed_on_devices_by_a_map(model, repo_folder, tmp_path, processor, pictures, placement):
    inputs = batch_of(processor, pictures)
    expected = type(model).from_pretrained(repo_folder)(**inputs).logits
    where = "auto"
    if placement == "disk":
        names = ("vision_tower", "language_model", "question_tower", "multi_modal_projector", "visual_projection")
        where = {f"model.{name}": "disk" if number < 3 else "cpu" for number, name in enumerate(names)} | {
            "lm_head": "cpu"
        }
        where["model.image_newline"] = "cpu"
    placed = type(model).from_pretrained(repo_folder, device_map=where, offload_folder=str(tmp_path))
    torch.testing.assert_close(placed(**inputs).logits, expected)
    torch.testing.assert_close(placed(**inputs, compress=False).logits, model(**inputs, compress=False).logits)


# ------------------------------------------------------------------------------------------------------------ bad input


def calls(model):
    """Everything that takes images."""
    return (model, model.generate, model.recover_tokens)


def test_a_budget_above_what_an_image_has(model, processor, pictures):
    model.config.visual_token_budget = 40
    message = "visual_token_budget is 40, but image 1 of the batch has only 36 patches: lower it, leave it out"
    for budget in (None, 40):
        processor.visual_token_budget = budget
        inputs = batch_of(processor, pictures)
        for call in calls(model):
            with pytest.raises(ValueError, match=message):
                call(**inputs)
        with pytest.raises(ValueError, match=message):
            model.get_image_features(**images_of(inputs))
    model.config.visual_token_budget = NUM_PATCHES
    processor.visual_token_budget = None
    assert model.recover_tokens(**batch_of(processor, pictures)).selection.num_tokens.tolist() == [NUM_PATCHES] * 3


def test_sizes_must_be_there(model, processor, pictures):
    inputs = {name: value for name, value in batch_of(processor, pictures).items() if name != "image_sizes"}
    for compress in (False, True):
        model.config.compress = compress
        for call in calls(model):
            with pytest.raises(ValueError, match=r"image_sizes is missing: pass the \(height, width\)"):
                call(**inputs)
    with pytest.raises(ValueError, match="image_sizes is missing"):
        model.get_vision_features(inputs["pixel_values"])
    model.config.visual_token_budget = 9
    with pytest.raises(ValueError, match="image_sizes is missing"):
        model.model.get_image_features(inputs["pixel_values"])


@pytest.mark.parametrize("budget", [None, 9])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: {"image_sizes": inputs["image_sizes"][:2]}, "pixel_values has 3 images, but image_sizes 2"),
        (lambda inputs: {"pixel_values": inputs["pixel_values"][:2]}, "pixel_values has 2 images, but image_sizes 3"),
        (
            lambda inputs: {"pixel_values": inputs["pixel_values"][:, :3]},
            "image 1 of 400 x 10 pixels makes 4 tiles, but pixel_values has 3",
        ),
        (
            lambda inputs: {"pixel_values": in_a_row(inputs)["pixel_values"][1:]},
            r"pixel_values has 11 tiles, but image_sizes \[\(84, 84\), \(400, 10\), \(200, 180\)\] make 12",
        ),
        (
            lambda inputs: {"pixel_values": inputs["pixel_values"][0, 0]},
            r"pixel_values has the shape \(3, 84, 84\): pass",
        ),
    ],
    ids=["sizes", "images", "tiles", "tiles in a row", "shape"],
)
def test_sizes_that_do_not_belong_to_the_pixels(model, processor, pictures, budget, change, message):
    model.config.visual_token_budget = budget
    inputs = batch_of(processor, pictures)
    inputs = {**inputs, **change(inputs)}
    for call in (*calls(model), lambda **inputs: model.get_vision_features(**images_of(inputs))):
        with pytest.raises(ValueError, match=message):
            call(**inputs)
    model.config.compress = False
    for call in (model, model.generate, lambda **inputs: model.get_image_features(**images_of(inputs))):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


@pytest.mark.parametrize(
    "sizes", [torch.tensor([84, 84]), torch.tensor([[84, 84, 3]] * 3), torch.zeros(3, 2), [[84, 84], [84, -1]]], ids=str
)
def test_sizes_that_are_none(model, processor, pictures, sizes):
    inputs = {**batch_of(processor, pictures), "image_sizes": sizes}
    for compress in (True, False):
        model.config.compress = compress
        for call in (*calls(model), lambda **inputs: model.get_image_features(**images_of(inputs))):
            with pytest.raises(ValueError, match=r"image_sizes is \[.*\]: pass the \(height, width\) in pixels"):
                call(**inputs)


def test_placeholders_of_other_sizes(model, processor, pictures):
    """As many as needed in all, and in each prompt as many as in none of its images: told by the counts."""
    inputs = batch_of(processor, pictures)
    inputs["image_sizes"] = inputs["image_sizes"][[0, 0, 0]]
    found, needed = int((inputs["input_ids"] == model.config.image_token_id).sum()), tiles_of(processor, pictures)[0]
    message = f"The prompts have {found} image placeholders, but 3 images need {needed.num_tokens} each"
    for call in calls(model):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def test_sizes_in_another_order(model, processor, pictures):
    """The same number in all, but an image's placeholders would stand in two prompts."""
    inputs = batch_of(processor, pictures, [PROMPT] * 2)
    inputs["image_sizes"], inputs["pixel_values"] = inputs["image_sizes"].flip(0), inputs["pixel_values"].flip(0)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="an image's placeholders stand in one prompt"):
            call(**inputs)


def test_class_tokens_have_no_place(model, processor, pictures):
    message = "vision_feature_select_strategy must be \"default\" for LLaVA-NeXT, got 'full'"
    with pytest.raises(ValueError, match=message):
        RecoverableLlavaNextConfig(vision_feature_select_strategy="full")
    inputs = batch_of(processor, pictures)
    for budget in (None, 9):
        model.config.visual_token_budget = budget
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs, vision_feature_select_strategy="full")
        for read in (model.get_vision_features, model.get_image_features):
            with pytest.raises(ValueError, match=message):
                read(**images_of(inputs), vision_feature_select_strategy="full")
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs, vision_feature_select_strategy="full", compress=False)
    processor.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match=message):
        batch_of(processor, pictures)
    model.config.vision_feature_select_strategy = "full"
    for call in calls(model):
        with pytest.raises(ValueError, match=message):
            call(**inputs)
