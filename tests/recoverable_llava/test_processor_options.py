"""Whatever form of input and option stock's processor, chat template and Auto classes take, this processor takes too.

Each call is made on stock's processor and on this one: both raise the same, or both return the same, and this one the
question besides. The options are read off transformers' own signatures, so a new one asks for a value here.
"""

import copy
import inspect
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from batches import both_families
from tiny import FAMILIES
from transformers import AddedToken, AutoProcessor, AutoTokenizer
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs

from recoverable_llava import RecoverableLlavaNextProcessor, RecoverableLlavaProcessor


QUESTIONS = ("question_input_ids", "question_attention_mask")
PROMPT = "USER: <image>\nwhat is it ? ASSISTANT:"


@pytest.fixture(scope="module")
def classes(family):
    """Stock's and this one."""
    return FAMILIES[family][2], {"llava": RecoverableLlavaProcessor, "llava_next": RecoverableLlavaNextProcessor}[
        family
    ]


@pytest.fixture(scope="module")
def both(classes, llava_folder, repo_folder):
    """Stock's processor and this one."""
    return tuple(each.from_pretrained(folder) for each, folder in zip(classes, (llava_folder, repo_folder)))


def outcome(call, processor):
    """What a call returns, or what it raises."""
    try:
        result = call(processor)
    except Exception as error:
        return type(error), str(error).replace("RecoverableLlava", "Llava")
    return result


def is_same(theirs, ours):
    if isinstance(theirs, (list, tuple)):
        return type(theirs) is type(ours) and len(theirs) == len(ours) and all(map(is_same, theirs, ours))
    if isinstance(theirs, torch.Tensor):
        return isinstance(ours, torch.Tensor) and torch.equal(theirs, ours)
    return type(theirs) is type(ours) and np.array_equal(theirs, ours)


def without_empty_tiles(theirs, ours):
    """Pixels without what LLaVA-NeXT's processor appends to those of stock, so that batches can be joined."""
    if not isinstance(ours, torch.Tensor) or ours.ndim < 5:
        return ours
    assert not ours[:, theirs.shape[1] :].any()
    return ours[:, : theirs.shape[1]]


def assert_same(call, both, questions):
    """`questions`: what this processor must have found; None where nothing is returned that could hold it."""
    theirs, ours = (outcome(call, processor) for processor in both)
    if isinstance(theirs, (str, list, tuple, torch.Tensor, np.ndarray)):
        assert is_same(theirs, ours), (theirs, ours)
        return theirs
    assert set(ours) == {*theirs, *(QUESTIONS if questions is not None else ())}
    for name in theirs:
        own = without_empty_tiles(theirs[name], ours[name]) if name == "pixel_values" else ours[name]
        assert is_same(theirs[name], own), name
    if questions is not None:
        assert type(ours["question_input_ids"]) is type(ours["question_attention_mask"]) is type(theirs["input_ids"])
        assert questions_in(both[1], ours) == questions
    return theirs


def questions_in(processor, inputs):
    ids, mask = (torch.as_tensor(np.asarray(inputs[name])) for name in QUESTIONS)
    assert ids.shape == mask.shape == (len(ids), processor.question_tokenizer.model_max_length)
    texts = processor.question_tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [text.strip() if row.any() else "" for text, row in zip(texts, mask)]


# ------------------------------------------------------------------------------------------------------- a call: inputs


def inputs_of_a_call(pictures):
    array = np.asarray(pictures[0])
    tensor = torch.tensor(array).permute(2, 0, 1)
    two = ["USER: <image>\nwhat is it ? ASSISTANT:", "USER: <image>\nwhy ? ASSISTANT:"]
    return {
        "one prompt": ({"images": pictures[0], "text": PROMPT}, ["what is it ?"]),
        "a list of one": ({"images": [pictures[0]], "text": [PROMPT]}, ["what is it ?"]),
        "nested images": ({"images": [[pictures[0]], [pictures[1]]], "text": two}, ["what is it ?", "why ?"]),
        "flat images": ({"images": pictures[:2], "text": two}, ["what is it ?", "why ?"]),
        "a tuple of prompts": ({"images": pictures[:2], "text": tuple(two)}, ["what is it ?", "why ?"]),
        "two images, one prompt": (
            {"images": pictures[:2], "text": "USER: <image> <image>\nwhy ? ASSISTANT:"},
            ["why ?"],
        ),
        "array": ({"images": array, "text": PROMPT}, ["what is it ?"]),
        "tensor": ({"images": tensor, "text": PROMPT}, ["what is it ?"]),
        "batch of tensors": ({"images": torch.stack([tensor, tensor]), "text": two}, ["what is it ?", "why ?"]),
        "text alone": ({"text": "USER: why ? ASSISTANT:"}, ["why ?"]),
        "text alone, several": ({"text": ["USER: why ? ASSISTANT:", "no"]}, ["why ?", "no"]),
        "images alone": ({"images": pictures[:2]}, None),
        "an array of prompts": ({"text": np.array(["USER: why ? ASSISTANT:", "no"])}, ["why ?", "no"]),
        "no prompt": ({"images": None, "text": []}, None),
        "empty prompt": ({"text": ""}, [""]),
        "nothing": ({}, None),
        "no images for the placeholder": ({"text": PROMPT}, ["what is it ?"]),
        "no placeholder for the image": ({"images": pictures[0], "text": "why ?"}, ["why ?"]),
        "too many images": ({"images": pictures[:2], "text": PROMPT}, ["what is it ?"]),
        "words": ({"text": [["why", "?"]]}, ["why ?"]),
        "a number": ({"text": 7}, None),
        "videos, which neither reads": ({"text": "why ?", "videos": [[pictures[0]]]}, ["why ?"]),
        "audio, which neither reads": ({"text": "why ?", "audio": np.zeros(9)}, ["why ?"]),
        "an unknown option": ({"text": "why ?", "no_such_option": 1}, ["why ?"]),
    }


@both_families
@pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
@pytest.mark.parametrize("name", inputs_of_a_call([np.zeros((9, 9, 3))] * 2))
def test_every_form_of_input(both, pictures, name, return_tensors):
    inputs, questions = inputs_of_a_call(pictures)[name]
    settings = {"padding": True, "return_tensors": return_tensors}
    assert_same(lambda processor: processor(**inputs, **settings), both, questions)


@both_families
def test_arguments_by_position(both, pictures):
    assert_same(lambda processor: processor(pictures[0], PROMPT), both, ["what is it ?"])
    assert_same(lambda processor: processor(None, "why ?", None, None), both, ["why ?"])


def test_prompts_that_can_be_read_once(both):
    """Which newer versions of stock's processor take."""
    inputs = both[1](text=iter(["USER: why ? ASSISTANT:"]))
    assert inputs["input_ids"] == both[0](text=["USER: why ? ASSISTANT:"])["input_ids"]
    assert questions_in(both[1], inputs) == ["why ?"]


def test_the_prompts_are_not_changed(both, pictures):
    prompts = [PROMPT]
    both[1](images=pictures[0], text=prompts)
    assert prompts == [PROMPT]


# ------------------------------------------------------------------------------------------------------ a call: options


VALUES = {
    "add_special_tokens": [False],
    "is_split_into_words": [False, True],
    "max_length": [4, 200],
    "pad_to_multiple_of": [16],
    "padding": [True, "longest", "max_length", False, "no such"],
    "padding_side": ["left", "right"],
    "return_attention_mask": [False],
    "return_length": [True],
    "return_mm_token_type_ids": [True],
    "return_offsets_mapping": [True],
    "return_overflowing_tokens": [True],
    "return_special_tokens_mask": [True],
    "return_tensors": ["pt", "np", None, "no such"],
    "return_text_replacement_offsets": [True],
    "return_token_type_ids": [True],
    "sanitize_control_tokens": [True],
    "stride": [2],
    "text_pair": ["and why ?"],
    "text_pair_target": ["and why ?"],
    "text_target": ["and why ?"],
    "truncation": [True, "longest_first"],
    "verbose": [False],
    "crop_size": [{"height": 56, "width": 56}],
    "data_format": ["channels_first", "channels_last"],
    "default_to_square": [True],
    "device": ["cpu"],
    "disable_grouping": [True],
    "do_center_crop": [False],
    "do_convert_rgb": [False],
    "do_normalize": [False],
    "do_pad": [True],
    "do_rescale": [False],
    "do_resize": [False],
    "image_mean": [[0.1, 0.2, 0.3]],
    "image_seq_length": [9],
    "image_std": [[0.1, 0.2, 0.3]],
    "input_data_format": ["channels_last"],
    "pad_size": [{"height": 98, "width": 98}],
    "resample": [0],
    "rescale_factor": [0.5],
    "size": [{"shortest_edge": 98}],
}


def each_value(options, values):
    """Pairs of an option and a value of it; without any for an option that is new to this table, KeyError."""
    return [(option, value) for option in options for value in values[option]]


def options_of(*kinds):
    options = {option for kind in kinds for option in kind.__annotations__}
    return sorted(option for option in options if not option.endswith("_kwargs"))


@pytest.mark.parametrize("group", [None, "text_kwargs", "common_kwargs"])
@pytest.mark.parametrize("option, value", each_value(options_of(TextKwargs, ProcessingKwargs), VALUES))
def test_every_option_for_text(both, pictures, option, value, group):
    options = {option: value} if group is None else {group: {option: value}}
    assert_same(
        lambda processor: processor(images=pictures[0], text=PROMPT, **copy.deepcopy(options)), both, ["what is it ?"]
    )


@both_families
@pytest.mark.parametrize("group", [None, "images_kwargs", "common_kwargs"])
@pytest.mark.parametrize("option, value", each_value(options_of(ImagesKwargs), VALUES))
def test_every_option_for_images(both, pictures, option, value, group):
    options = {option: value} if group is None else {group: {option: value}}
    assert_same(
        lambda processor: processor(images=pictures[0], text=PROMPT, **copy.deepcopy(options)), both, ["what is it ?"]
    )


@both_families
def test_defaults_of_the_processor(classes, llava_folder, repo_folder, pictures):
    """A processor's own defaults, which newer versions read off its attributes."""
    both = tuple(each.from_pretrained(folder) for each, folder in zip(classes, (llava_folder, repo_folder)))
    for processor in both:
        processor.text_kwargs = {"return_tensors": "np", "padding": True}
        processor.images_kwargs = {"return_tensors": "np"}
    assert_same(lambda processor: processor(images=pictures[0], text=PROMPT), both, ["what is it ?"])


# -------------------------------------------------------------------------------------------------------- chat template


@dataclass
class Message:
    role: str
    content: object


@dataclass
class Conversation:
    messages: list


def conversations(picture):
    image, text = {"type": "image", "image": picture}, {"type": "text", "text": "what is it ?"}
    user = {"role": "user", "content": [image, text]}
    system = {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    why = {"role": "user", "content": [{"type": "text", "text": "why ?"}]}
    url = {"type": "image_url", "image_url": {"url": picture}}
    return {
        "one turn": ([user], ["what is it ?"]),
        "a tuple": ((user,), ["what is it ?"]),
        "several turns": ([system, user, answer, why], ["why ?"]),
        "answer begun": ([system, user, answer], ["what is it ?"]),
        "several messages of the user in a row": ([user, why], ["what is it ? why ?"]),
        "the last of them an image": ([why, {"role": "user", "content": [image]}], ["why ?"]),
        "a call of a tool": ([user, {"role": "tool", "content": [{"type": "text", "text": "3"}]}], ["what is it ?"]),
        "strings": ([{"role": "user", "content": "why ?"}], ["why ?"]),
        "image in a string": ([{"role": "user", "content": "<image>\nwhy ?"}], ["why ?"]),
        "no content": ([why, {"role": "assistant", "content": None}, why], ["why ?"]),
        "content missing": ([why, {"role": "assistant"}, why], ["why ?"]),
        "as OpenAI writes it": ([{"role": "user", "content": [url, text]}], ["what is it ?"]),
        "a batch": ([[user], [why]], ["what is it ?", "why ?"]),
        "a batch as a tuple": (((user,), (why,)), ["what is it ?", "why ?"]),
        "a batch of one": ([[user]], ["what is it ?"]),
        "no user": ([system], [""]),
        "no text": ([{"role": "user", "content": [image]}], [""]),
        "nothing": ([], None),
        "none": (None, None),
        "a string": ("why ?", None),
        "no role": ([{"content": "why ?"}], None),
        "objects": ([Message("user", "why ?")], ["why ?"]),
        "conversation object": (Conversation([user]), ["what is it ?"]),
        "conversation objects": ([Conversation([user]), Conversation([why])], ["what is it ?", "why ?"]),
        "a part without a type": ([{"role": "user", "content": [{"text": "why ?"}]}], None),
        "a part that is a string": ([{"role": "user", "content": ["why ?"]}], None),
    }


@both_families
@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize("name", conversations(None))
def test_every_form_of_chat(both, pictures, name, tokenize):
    chat, questions = conversations(pictures[0])[name]
    settings = {"tokenize": tokenize, "return_dict": True, "return_tensors": "pt"}
    assert_same(
        lambda processor: processor.apply_chat_template(
            copy.deepcopy(chat), **settings, processor_kwargs={"padding": True}
        ),
        both,
        questions if tokenize else None,
    )


TEMPLATE = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}{{ mood }}"
CHAT_VALUES = {
    "chat_template": ["{{ '<image>' + messages[0]['role'] }}", "no such name"],
    "tools": [[{"type": "function", "function": {"name": "f", "parameters": {}}}]],
    "documents": [[{"title": "a", "text": "b"}]],
    "add_generation_prompt": [True],
    "continue_final_message": [True],
    "return_assistant_tokens_mask": [True],
    "tokenize": [True, False],
    "return_tensors": ["pt", "np", None],
    "return_dict": [True, False],
    "load_audio_from_video": [True],
    "processor_kwargs": [None, {}, {"padding": "max_length", "max_length": 64}, {"text_kwargs": {"padding": True}}],
    "sanitize_control_tokens": [True],
    "kwargs": [],
}


CHAT_OPTIONS = list(inspect.signature(ProcessorMixin.apply_chat_template).parameters)[2:]


@pytest.mark.parametrize("option, value", each_value(CHAT_OPTIONS, CHAT_VALUES))
@pytest.mark.parametrize("tokenize", [True, False])
def test_every_option_of_the_chat_template(both, pictures, option, value, tokenize):
    image = {"type": "image", "image": pictures[0]}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "why ?"}]}]
    options = {"tokenize": tokenize, "return_dict": True, "return_tensors": "pt", option: value}
    returns_inputs = options["tokenize"] and options["return_dict"]
    assert_same(
        lambda processor: processor.apply_chat_template(copy.deepcopy(chat), **copy.deepcopy(options)),
        both,
        ["why ?"] if returns_inputs else None,
    )


def test_options_of_the_call_beside_those_of_the_template(both, pictures):
    """The older way, without `processor_kwargs`; and variables of the template."""
    chat = [{"role": "user", "content": "why ?"}]
    settings = {"tokenize": True, "return_dict": True}
    for options in (
        {"padding": "max_length", "max_length": 64},
        {"mood": "!", "chat_template": TEMPLATE},
        {"mood": "!", "chat_template": TEMPLATE, "padding": "max_length", "max_length": 64},
        {"chat_template": TEMPLATE, "return_assistant_tokens_mask": True, "return_tensors": "pt"},
    ):
        assert_same(lambda p, options=options: p.apply_chat_template(chat, **settings, **options), both, ["why ?"])
    # Stock has no `questions`; this processor's reach the model however the other options are passed.
    for options in ({}, {"padding": True}, {"processor_kwargs": {"padding": True}}):
        inputs = both[1].apply_chat_template(chat, **settings, questions=["where ?"], **options)
        assert questions_in(both[1], inputs) == ["where ?"]


def test_arguments_of_the_chat_template_by_position(both):
    chat = [{"role": "user", "content": "why ?"}]
    arguments = (None, None, None, True, False, False, True, "pt", True)
    assert_same(lambda processor: processor.apply_chat_template(chat, *arguments), both, ["why ?"])
    arguments = (None, None, None, True, False, False, True, "pt", False)
    assert_same(lambda processor: processor.apply_chat_template(chat, *arguments), both, None)


def test_a_chat_within_a_template_leaves_later_calls_alone(both, pictures):
    """What the chat template knew of the questions ends with its call, also when that fails."""
    both[1].apply_chat_template([{"role": "user", "content": "why ?"}], tokenize=True)
    with pytest.raises(KeyError):
        both[1].apply_chat_template([{"role": "user", "content": [{"text": "no type"}]}], tokenize=True)
    assert_same(lambda processor: processor(images=pictures[0], text=PROMPT), both, ["what is it ?"])


# --------------------------------------------------------------------------------------------------------- Auto classes


LOADING = {
    "model_max_length": [2048, 60],
    "pad_token": ["</s>", "[PAD]"],
    "bos_token": ["<b>"],
    "eos_token": [AddedToken("<e>", special=True)],
    "unk_token": ["<u>"],
    "sep_token": ["<sep>"],
    "extra_special_tokens": [{"image_token": "<img>"}, ["<a>"]],
    "additional_special_tokens": [["<a>", "<b>"]],
    "add_bos_token": [True],
    "add_eos_token": [True],
    "add_prefix_space": [True],
    "padding_side": ["right"],
    "truncation_side": ["left"],
    "padding": ["max_length"],
    "model_input_names": [["input_ids"]],
    "split_special_tokens": [True],
    "clean_up_tokenization_spaces": [True],
    "chat_template": ["{{ messages[0]['content'] }}", {"other": "{{ messages[0]['content'] }}"}],
    "use_fast": [True, False],
    "tokenizer_type": ["no such"],
    "size": [{"shortest_edge": 98}],
    "crop_size": [{"height": 56, "width": 56}],
    "do_resize": [False],
    "image_mean": [[0.1, 0.2, 0.3]],
    "backend": ["pil"],
    "patch_size": [28],
    "vision_feature_select_strategy": ["full"],
    "image_token": ["<img>"],
    "num_additional_image_tokens": [0],
    "revision": ["main"],
    "token": [False, "hf_none"],
    "local_files_only": [True],
    "force_download": [True],
    "trust_remote_code": [True, False],
    "code_revision": ["main"],
    "config": [None],
    "no_such_option": [1],
}


def load(kind, folder, option, value):
    """What loading with an option gives, or what it raises."""
    options = {} if option is None else {option: copy.deepcopy(value)}
    return outcome(lambda kind: kind.from_pretrained(folder, **options), kind)


@pytest.mark.parametrize("option, value", each_value(LOADING, LOADING))
@pytest.mark.parametrize("auto", [True, False])
def test_every_option_of_loading(classes, llava_folder, repo_folder, pictures, option, value, auto):
    theirs, ours = (AutoProcessor, AutoProcessor) if auto else classes
    both = load(theirs, llava_folder, option, value), load(ours, repo_folder, option, value)
    if isinstance(both[0], tuple):
        assert both[0] == both[1]
        return
    text = [PROMPT.replace("<image>", both[0].image_token), "why ?"]
    assert_same(
        lambda processor: processor(images=[[pictures[0]], []], text=text, padding=True),
        both,
        ["what is it ?", "why ?"],
    )
    # The question's tokenizer is that of the text tower, whatever is asked of the language model's.
    loaded, plain = (each.question_tokenizer for each in (both[1], classes[1].from_pretrained(repo_folder)))
    assert loaded.model_max_length == plain.model_max_length == 77
    assert loaded.get_vocab() == plain.get_vocab() and loaded.special_tokens_map == plain.special_tokens_map


@both_families
def test_parts_may_be_passed_to_loading(classes, llava_folder, repo_folder, pictures):
    stock = classes[0].from_pretrained(llava_folder, model_max_length=99)
    stock.tokenizer.add_tokens(["what is"])
    both = [
        AutoProcessor.from_pretrained(folder, tokenizer=stock.tokenizer, image_processor=stock.image_processor)
        for folder in (llava_folder, repo_folder)
    ]
    assert_same(lambda processor: processor(images=pictures[0], text=PROMPT), both, ["what is it ?"])
    assert both[1].tokenizer is stock.tokenizer


@both_families
def test_options_stay_after_saving(classes, repo_folder, pictures, tmp_path):
    options = {"model_max_length": 2048, "pad_token": "[PAD]", "extra_special_tokens": {"image_token": "<img>"}}
    processor = classes[1].from_pretrained(repo_folder, **options)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.model_max_length == 2048 and loaded.tokenizer.pad_token == "[PAD]"
    assert loaded.image_token == "<img>"
    call = {"images": pictures[0], "text": PROMPT.replace("<image>", "<img>"), "return_tensors": "pt"}
    first, second = processor(**call), loaded(**call)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


@both_families
def test_a_repo_in_a_subfolder(classes, llava_folder, repo_folder, pictures, tmp_path):
    both = []
    for name, folder, kind in (
        ("stock", llava_folder, classes[0]),
        ("ours", repo_folder, classes[1]),
    ):
        kind.from_pretrained(folder).save_pretrained(tmp_path / name / "inner")
        both.append(kind.from_pretrained(tmp_path / name, subfolder="inner"))
    assert_same(lambda processor: processor(images=pictures[0], text=PROMPT), both, ["what is it ?"])


@pytest.mark.parametrize("option, value", [(None, None), *each_value(LOADING, LOADING)])
def test_the_tokenizer_alone(llava_folder, repo_folder, option, value):
    theirs, ours = (load(AutoTokenizer, folder, option, value) for folder in (llava_folder, repo_folder))
    if isinstance(theirs, tuple):
        assert theirs == ours
        return
    assert type(ours) is type(theirs)
    assert ours(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.model_max_length == theirs.model_max_length and ours.padding_side == theirs.padding_side
