"""The processor: stock inputs as they were, and the question of each prompt for the CLIP text tower."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoProcessor, LlavaProcessor

from recoverable_llava import RecoverableLlavaProcessor, question_processor


CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny"
QUESTIONS = ("question_input_ids", "question_attention_mask")
LLAMA_2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s>[INST] ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' }}{% for part in message['content'] %}"
    "{{ part['text'] }}{% endfor %}{{ ' </s>' }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As llava-hf/llava-1.5-7b-hf writes it: the assistant's role stands only where it is asked to go on.
VICUNA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEMPLATES = {
    "tiny": tiny.CHAT_TEMPLATE,
    "vicuna": VICUNA_TEMPLATE,
    "llama 2": LLAMA_2_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
}


def message(role, text, image=None):
    images = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


def questions_of(processor, inputs):
    """What the text tower reads, row by row; empty where the row has no question."""
    ids, mask = (torch.as_tensor(inputs[name]) for name in QUESTIONS)
    return [
        processor.question_tokenizer.decode(row, skip_special_tokens=True).strip() if row_mask.any() else ""
        for row, row_mask in zip(ids, mask)
    ]


def asked(processor, **inputs):
    return questions_of(processor, processor(**inputs, return_tensors="pt"))


@pytest.fixture
def processor(repo_folder):
    return RecoverableLlavaProcessor.from_pretrained(repo_folder)


@pytest.fixture
def stock_processor(llava_folder):
    return LlavaProcessor.from_pretrained(llava_folder)


# ------------------------------------------------------------------------------------------------------ stock behaviour


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_stock_inputs_stay_as_they_are(processor, stock_processor, pictures, side, return_tensors):
    texts = ["USER: <image>\nwhat is it ? ASSISTANT:", "USER: <image> and <image>\nhow many ? ASSISTANT:", "no image"]
    settings = {"padding": True, "padding_side": side, "return_tensors": return_tensors}
    images = [[pictures[0]], pictures[1:3], []]
    ours = processor(images=images, text=texts, **settings)
    theirs = stock_processor(images=images, text=texts, **settings)
    assert set(ours) == {*theirs, *QUESTIONS}
    assert type(ours["question_input_ids"]) is type(theirs["input_ids"])
    for name in theirs:
        assert np.array_equal(ours[name], theirs[name]), name
    text_only = {"text": "USER: what is it ? ASSISTANT:"}
    assert torch.equal(
        processor(**text_only, return_tensors="pt")["input_ids"],
        stock_processor(**text_only, return_tensors="pt")["input_ids"],
    )
    assert set(processor(images=pictures[0], return_tensors="pt")) == {"pixel_values"}


def test_stock_chat_stays_as_it_is(processor, stock_processor, pictures):
    chat = [message("user", "what is it ?", pictures[0]), message("assistant", "a cat"), message("user", "why ?")]
    settings = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
    ours, theirs = (each.apply_chat_template(chat, **settings) for each in (processor, stock_processor))
    assert set(ours) == {*theirs, *QUESTIONS}
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert processor.apply_chat_template(chat) == stock_processor.apply_chat_template(chat)


def test_names_of_what_it_returns(processor, stock_processor, pictures):
    inputs = processor(images=pictures[0], text="USER: <image>\nwhy ?", return_tensors="pt")
    assert set(inputs) <= set(processor.model_input_names)
    assert set(processor.model_input_names) == {*stock_processor.model_input_names, *QUESTIONS}


def test_decoding_is_that_of_the_language_model(processor, stock_processor):
    ids = processor(text="what is the colour ?")["input_ids"]
    assert processor.batch_decode(ids) == stock_processor.batch_decode(ids)


# --------------------------------------------------------------------------------------------------- question in a chat


SYSTEM = message("system", "you are the red dog")
CHATS = {
    "one turn": [message("user", "what is it ?", "picture")],
    "system prompt": [SYSTEM, message("user", "what is it ?", "picture")],
    "last of several turns": [
        message("user", "how many ?", "picture"),
        message("assistant", "two cat"),
        message("user", "what is it ?"),
    ],
    "system prompt and several turns": [
        SYSTEM,
        message("user", "how many ?", "picture"),
        message("assistant", "two cat"),
        message("user", "what is it ?"),
    ],
    "answer begun": [message("user", "what is it ?", "picture"), message("assistant", "it is")],
    "text in parts": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "what is"},
                {"type": "image", "image": "picture"},
                {"type": "text", "text": "it ?"},
            ],
        }
    ],
}


def with_pictures(chat, picture):
    return [
        {
            **turn,
            "content": [{**part, "image": picture} if part["type"] == "image" else part for part in turn["content"]],
        }
        for turn in chat
    ]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CHATS)
def test_question_of_a_chat(processor, pictures, name, template):
    processor.chat_template = TEMPLATES[template]
    chat = with_pictures(CHATS[name], pictures[0])
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **settings)
    assert questions_of(processor, inputs) == ["what is it ?"]
    override = processor.apply_chat_template(chat, questions=["where ?"], **settings)
    assert questions_of(processor, override) == ["where ?"]


def test_questions_of_a_batch_of_chats(processor, pictures):
    chats = [[message("user", f"why {n} ?", pictures[n])] for n in range(3)]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chats, **settings, processor_kwargs={"padding": True})
    assert questions_of(processor, inputs) == ["why 0 ?", "why 1 ?", "why 2 ?"]
    assert inputs["pixel_values"].shape[0] == 3 == inputs["input_ids"].shape[0]


def test_a_chat_without_a_user_or_text_has_no_question(processor, pictures):
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    silent = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}]}]
    assert questions_of(processor, processor.apply_chat_template(silent, **settings)) == [""]
    assert questions_of(processor, processor.apply_chat_template([message("system", "be kind")], **settings)) == [""]


def test_a_chat_of_plain_strings(processor):
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": " what is it ? "}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert questions_of(processor, inputs) == ["what is it ?"]


# ---------------------------------------------------------------------------------------------- question in raw prompts


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CHATS)
def test_question_of_a_prompt_that_the_template_wrote(processor, pictures, name, template):
    """What `pipeline` and most scripts do: write the prompt first, process it later."""
    processor.chat_template = TEMPLATES[template]
    chat = CHATS[name]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] == "user")
    question = " ".join(asked(processor, images=pictures[0], text=prompt)[0].split())
    assert question == "what is it ?"


PROMPTS = {
    "USER: <image>\nwhat is it ? ASSISTANT:": "what is it ?",
    "USER: what is it ? <image> ASSISTANT:": "what is it ?",
    "USER: what is it ?<image>\nASSISTANT:": "what is it ?",
    "A chat of a dog. USER: <image>\nwhat is it ? ASSISTANT:": "what is it ?",
    "be kind USER: <image>\nhow many ? ASSISTANT: 2 cat </s>USER: what is it ? ASSISTANT:": "what is it ?",
    "USER: <image>\nwhat is it ? ASSISTANT: it is a": "what is it ?",
    "USER: <image>\nwhat is it ?": "what is it ?",
    "<image>\nwhat is it ?": "what is it ?",
    "USER: <image>\n ASSISTANT:": "",
    "<image>": "",
    "": "",
}


@pytest.mark.parametrize("prompt, question", PROMPTS.items())
@pytest.mark.parametrize("template", ["vicuna", "tiny", None])
def test_question_of_a_raw_prompt(processor, prompt, question, template):
    processor.chat_template = TEMPLATES.get(template)
    assert processor.find_question(prompt) == question


@pytest.mark.parametrize("template", TEMPLATES)
def test_llava_prompts_work_under_any_template(processor, template):
    """Scripts that write LLaVA-1.5's own roles by hand meet models whose template has others."""
    processor.chat_template = TEMPLATES[template]
    prompt = "A chat of a dog. USER: <image>\nwhat is it ? ASSISTANT:"
    assert processor.find_question(prompt) == "what is it ?"


# Nobody asked for the template where the prompt is written already, so it may be as it likes.
ODD_TEMPLATES = {
    "takes strings alone": "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}",
    "prints content as it is": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}",
    "wants a system message": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}",
    "shows the last message only": "USER: {{ messages[-1]['content'][0]['text'] }} ASSISTANT:",
    "a dict without a default": {"one": tiny.CHAT_TEMPLATE, "two": CHATML_TEMPLATE},
    "an empty dict": {},
    "an empty string": "",
    "is no template": "{% for",
    "says nothing": "hello",
    "fails": "{{ raise_exception('never') }}",
    "calls what is not there": "{{ no_such_function() }}",
    "prints no roles": "{{ messages[0]['content'] }}",
    "wants an image": "{{ messages[0]['content'][0]['image'] }}{{ messages[0]['content'][1]['text'] }}",
}


@pytest.mark.parametrize("where", ["processor", "tokenizer"])
@pytest.mark.parametrize("name", ODD_TEMPLATES)
def test_a_written_prompt_needs_no_template(processor, stock_processor, pictures, name, where):
    for each in (processor, stock_processor):
        each.chat_template = None
        (each if where == "processor" else each.tokenizer).chat_template = ODD_TEMPLATES[name]
    for prompt in (
        "USER: <image>\nwhat is it ? ASSISTANT:",
        "<|im_start|>user\n<image>\nwhat is it ?<|im_end|>\n<|im_start|>assistant\n",
        "[INST] <image>\nwhat is it ? [/INST]",
        "<image>\nwhat is it ?",
    ):
        theirs = stock_processor(images=pictures[0], text=prompt, return_tensors="pt")
        ours = processor(images=pictures[0], text=prompt, return_tensors="pt")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert questions_of(processor, ours) == ["what is it ?"]


@pytest.mark.parametrize("template", ["{role}: {content}\n", "### {role}\n{content}\n"])
@pytest.mark.parametrize("where", ["processor", "tokenizer", "one of several"])
def test_tags_are_those_of_the_template_wherever_it_is(processor, template, where):
    """Of strings alone, from a system message on, and by whatever name it has."""
    start, end = (template.format(role="' + m['role'] + '", content="|").replace("\n", "\\n")).split("|")
    jinja = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}{% for m in messages %}"
        f"{{{{ '{start}' + m['content'] + '{end}' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}" + template.format(role="assistant", content="") + "{% endif %}"
    )
    templates = {"processor": (jinja, None), "tokenizer": (None, jinja), "one of several": ({"a": jinja}, None)}
    processor.chat_template, processor.tokenizer.chat_template = templates[where]
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "<image>\nhow many ?"}]
    chat += [{"role": "assistant", "content": "two"}, {"role": "user", "content": "what is it ?"}]
    prompt = processor.apply_chat_template(chat, chat_template=jinja, add_generation_prompt=True)
    assert "what is it ?" in prompt and processor.find_question(prompt) == "what is it ?"


QUOTATIONS = {
    "USER: <image>\nwhose is it (asked by USER: 7) ? ASSISTANT:": "whose is it (asked by USER: 7) ?",
    "USER: <image>\nwhat does ASSISTANT: mean ? ASSISTANT:": "what does ASSISTANT: mean ?",
    "USER: <image>\nASSISTANT: is what ? ASSISTANT:": "ASSISTANT: is what ?",
    "USER: <image>\nare 'USER:' and 'ASSISTANT:' roles ? ASSISTANT:": "are 'USER:' and 'ASSISTANT:' roles ?",
    "<|im_start|>user\n<image>\nis USER: 7 a cat ?<|im_end|>\n<|im_start|>assistant\n": "is USER: 7 a cat ?",
    "<s>[INST] <image>\nis USER: 7 a cat ? [/INST]": "is USER: 7 a cat ?",
    "The USER: is kind . USER: <image>\nwhat is it ? ASSISTANT:": "what is it ?",
    "USER : <image> what is it ? ASSISTANT :": "what is it ?",
    "<s> USER : " + "<image> " * 36 + "what is it ? ASSISTANT : ": "what is it ?",
    "<pad><pad><s>USER: <image>\nwhat is it ? ASSISTANT:": "what is it ?",
    "USER: <image>\nwhat is it ? ASSISTANT:</s><pad><pad>": "what is it ?",
    "USER: <image>\nIs it red?\nAnswer the question using a single word or phrase. ASSISTANT:": "Is it red?",
}


@pytest.mark.parametrize("prompt, question", QUOTATIONS.items())
@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_question_of_a_prompt_that_quotes_tags(processor, prompt, question, template):
    processor.chat_template = TEMPLATES.get(template)
    assert processor.find_question(prompt) == question


# Ends of turns that belong to the user's tag or do not, tags in other places, and system prompts of several kinds.
KINDS_OF_TURNS = {
    "headers": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start|>' + m['role'] + '<|role|>\n\n' + m['content'] | trim }}"
        "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|role|>\n\n' }}{% endif %}"
    ),
    "no system prompt": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<turn>' + role + '\n' + m['content'] + '</turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
    ),
    "turns that must alternate": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
        "{{ ' [INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}"
        "{% endfor %}"
    ),
    "end token after each turn": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "instructions": (
        "{% for m in messages %}{{ '### ' + {'user': 'Task', 'assistant': 'Response'}.get(m['role'], 'Context') }}"
        "{{ ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "nothing between turns": (
        "{% for m in messages %}###{{ {'user': 'Human', 'assistant': 'AI', 'system': 'System'}[m['role']] }}: "
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}###AI:{% endif %}"
    ),
    "system prompt of its own": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


@pytest.mark.parametrize(
    "question", ["what is it ?", "whose (USER: 7) ?", "does ASSISTANT: say it ?", "is it [INST] ?"]
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", KINDS_OF_TURNS)
def test_question_by_the_tags_of_any_template(processor, name, add_generation_prompt, question):
    processor.chat_template = KINDS_OF_TURNS[name]
    asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": "USER: yes"}
    system, first = {"role": "system", "content": "be USER: kind"}, {"role": "user", "content": "how many ?"}
    chats = [[asked], [first, answered, asked], [system, asked], [system, first, answered, asked]]
    if name in ("no system prompt", "turns that must alternate"):
        chats = chats[:2]
    for chat in chats:
        prompt = processor.apply_chat_template(chat, add_generation_prompt=add_generation_prompt)
        assert processor.find_question(prompt) == question


@pytest.mark.parametrize("template", ["tiny", "vicuna"])
@pytest.mark.parametrize("num_turns", [1, 2])
def test_question_of_a_prompt_that_was_decoded(pictures, template, num_turns):
    """What an engine has that is given token ids. This tokenizer puts a space between any two words: "USER :"."""
    processor = RecoverableLlavaProcessor.from_pretrained(CHECKPOINT)
    processor.chat_template = TEMPLATES[template]
    chat = [message("user", "how many circles ?", "picture"), message("assistant", "two")] * (num_turns - 1)
    chat += [message("user", "what is left of the red circle ?", "picture")]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = processor(images=[pictures[:num_turns]], text=[prompt])["input_ids"][0]
    decoded = processor.tokenizer.decode(ids)
    assert "USER :" in decoded and "USER:" not in decoded
    assert processor.find_question(decoded) == "what is left of the red circle ?"


def test_chats_and_prompts_ask_the_same(processor, pictures):
    """Also where a benchmark says how to answer, and where the image stands in the text."""
    text = "Is it red?\nAnswer the question using a single word or phrase."
    expected, as_it_is = (processor.question_inputs([question], "pt") for question in ("Is it red?", text))
    for content in (message("user", text, pictures[0])["content"], f"<image>\n{text}"):
        chat = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(chat)
        assert processor.find_question(prompt) == processor.find_question_in_chat(chat) == "Is it red?"
        inputs = processor(images=pictures[0], text=prompt, return_tensors="pt")
        named = processor(images=pictures[0], text=prompt, questions=[text], return_tensors="pt")
        assert all(torch.equal(inputs[name], expected[name]) for name in QUESTIONS)
        # What is asked for by name is taken as it is.
        assert all(torch.equal(named[name], as_it_is[name]) for name in QUESTIONS)
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([message("user", text, pictures[0])], **settings)
    assert all(torch.equal(inputs[name], expected[name]) for name in QUESTIONS)


@pytest.fixture
def warnings_said(monkeypatch):
    said = []
    monkeypatch.setattr(question_processor.logger, "warning_once", said.append)
    return said


def test_a_missing_question_is_said(processor, pictures, warnings_said):
    settings = {"tokenize": True, "return_dict": True}
    silent = {"role": "user", "content": [{"type": "image", "image": pictures[0]}]}
    for call in (
        lambda: processor(images=pictures[0], text="USER: <image>\n ASSISTANT:"),
        lambda: processor(images=pictures[0], text="<image>"),
        lambda: processor(images=pictures[:2], text=["USER: <image>\nwhy ?", "<image>"]),
        lambda: processor.apply_chat_template([silent], **settings),
    ):
        call()
        assert len(warnings_said) == 1 and "No question was found in a prompt that has images" in warnings_said.pop()
    processor(images=pictures[0], text="USER: <image>\nwhy ? ASSISTANT:")
    processor(images=pictures[0], text="USER: <image>\n ASSISTANT:", questions=[""])
    processor.apply_chat_template([silent], **settings, questions=[""])
    processor.apply_chat_template([silent])
    processor(images=[[pictures[0]], []], text=["USER: <image>\nwhy ? ASSISTANT:", ""])
    assert warnings_said == []


def test_questions_without_prompts(processor, model, pictures):
    """What engines ask for that encode images apart from prompts."""
    questions = ["what is it ?", "", "  "]
    rows = processor.question_inputs(questions, return_tensors="pt")
    assert set(rows) == set(QUESTIONS) and rows["question_input_ids"].shape == (3, 77)
    assert rows["question_attention_mask"].any(1).tolist() == [True, False, False]
    with_images = processor(images=pictures[:3], questions=questions, return_tensors="pt")
    with_prompts = processor(
        images=pictures[:3], text=["<image>"] * 3, questions=questions, padding=True, return_tensors="pt"
    )
    assert set(with_images) == {"pixel_values", *QUESTIONS}
    for name in QUESTIONS:
        assert torch.equal(with_images[name], rows[name]) and torch.equal(with_prompts[name], rows[name])
    assert isinstance(processor.question_inputs(["why ?"])["question_input_ids"], list)


def test_a_question_must_be_a_string(processor):
    with pytest.raises(ValueError, match=r"questions\[1\] is None: pass a string, which may be empty"):
        processor(text=["a photo", "a cat"], questions=["one", None])


def test_questions_override_what_the_prompt_says(processor, pictures):
    texts = ["USER: <image>\nwhat is it ? ASSISTANT:"] * 2
    images = [[pictures[0]], [pictures[1]]]
    assert asked(processor, images=images, text=texts, questions=["why ?", ""]) == ["why ?", ""]
    assert asked(processor, images=pictures[0], text=texts[0], questions="where ?") == ["where ?"]
    found = processor(images=images, text=texts, questions=["why ?", ""], return_tensors="pt")
    plain = processor(images=images, text=texts, return_tensors="pt")
    assert torch.equal(found["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("questions", [["one"], ["one", "two", "three"], "one", []])
def test_number_of_questions_must_be_that_of_prompts(processor, questions):
    count = 1 if isinstance(questions, str) else len(questions)
    with pytest.raises(ValueError, match=f"questions has {count} entries for 2 prompts: pass one question per prompt"):
        processor(text=["a photo", "a cat"], questions=questions)


def test_every_question_has_the_length_of_the_text_tower(processor, pictures):
    """The pipeline's collator pads what differs in length on the left and with zeros, which is not a question."""
    text = ["USER: <image>\nwhy ? ASSISTANT:", "USER: <image>\nwhat is the colour of the cat ? ASSISTANT:"]
    inputs = processor(images=[[pictures[0]], [pictures[1]]], text=text, padding=True, return_tensors="pt")
    tokenizer = processor.question_tokenizer
    ids, mask = inputs["question_input_ids"], inputs["question_attention_mask"]
    assert ids.shape == mask.shape == (2, 77) and ids.dtype == mask.dtype == torch.long
    for row_ids, row_mask, question in zip(ids, mask, ["why ?", "what is the colour of the cat ?"]):
        expected = tokenizer(question)["input_ids"]
        assert row_ids[: len(expected)].tolist() == expected
        assert row_mask.tolist() == [1] * len(expected) + [0] * (77 - len(expected))
        assert expected[0] == tokenizer.bos_token_id and expected[-1] == tokenizer.eos_token_id


def test_an_over_long_question_is_cut_and_keeps_its_end_token(processor, model, pictures):
    words = "what is the colour of the cat ? " * 40
    prompt = f"USER: <image>\n{words}ASSISTANT:"
    inputs = processor(images=pictures[0], text=prompt, return_tensors="pt")
    row = inputs["question_input_ids"][0]
    assert row.shape == (77,) and inputs["question_attention_mask"].all()
    assert row[-1] == processor.question_tokenizer.eos_token_id
    assert row[:76].tolist() == processor.question_tokenizer(words.strip())["input_ids"][:76]
    assert (row != processor.question_tokenizer.eos_token_id).sum() == 76
    # The prompt itself is not cut, and the model takes both.
    assert inputs["input_ids"].shape[1] > 300
    assert model(**inputs).logits.isfinite().all()


def test_an_empty_question_guides_nothing(processor, model, pictures):
    text = ["USER: <image>\n ASSISTANT:", "USER: <image>\nwhat is the colour ? ASSISTANT:"]
    images = [[pictures[0]], [pictures[1]]]
    inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
    assert inputs["question_attention_mask"].any(1).tolist() == [False, True]
    model.config.text_lof_neighbors = 2
    num_text = model.recover_tokens(**inputs).selection.num_text
    assert num_text[0] == 0 and num_text[1] > 0


# -------------------------------------------------------------------------------------------------------- saving, files


def test_save_and_load(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = RecoverableLlavaProcessor.from_pretrained(tmp_path)
    automatic = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=False)
    text = "USER: <image>\nwhat is it ? ASSISTANT:"
    expected = processor(images=pictures[0], text=text, return_tensors="pt")
    for each in (loaded, automatic):
        assert type(each) is RecoverableLlavaProcessor
        assert type(each.question_tokenizer) is type(processor.question_tokenizer)
        assert each.question_tokenizer.model_max_length == 77
        inputs = each(images=pictures[0], text=text, return_tensors="pt")
        assert set(inputs) == set(expected)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert each.apply_chat_template([message("user", "why ?")]) == processor.apply_chat_template(
            [message("user", "why ?")]
        )


def test_saving_what_was_loaded_writes_the_same_files(processor, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    processor.save_pretrained(first)
    RecoverableLlavaProcessor.from_pretrained(first).save_pretrained(second)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_budget_is_saved(processor, tmp_path):
    processor.visual_token_budget = 7
    processor.save_pretrained(tmp_path)
    assert RecoverableLlavaProcessor.from_pretrained(tmp_path).visual_token_budget == 7
    assert RecoverableLlavaProcessor.from_pretrained(tmp_path, visual_token_budget=9).visual_token_budget == 9


def test_missing_question_tokenizer_is_an_error_that_says_so(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "question_tokenizer").is_dir()
    shutil.rmtree(tmp_path / "question_tokenizer")
    # transformers 5.12 refuses by itself; later ones take the language model's tokenizer, with a warning at most.
    by_itself = "Couldn't instantiate the backend tokenizer"
    with pytest.raises(ValueError, match=f"question_tokenizer/ is missing from the checkpoint|{by_itself}"):
        RecoverableLlavaProcessor.from_pretrained(tmp_path)


def test_question_tokenizer_without_a_length_is_refused(processor):
    processor.question_tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="question_tokenizer sets no model_max_length: .* 77 for OpenAI's CLIP"):
        RecoverableLlavaProcessor(processor.image_processor, processor.tokenizer, processor.question_tokenizer)


def test_question_tokenizer_must_be_given(processor):
    with pytest.raises(ValueError, match="question_tokenizer is missing: pass the tokenizer of the CLIP text tower"):
        RecoverableLlavaProcessor(processor.image_processor, processor.tokenizer)


def test_the_saved_folder_keeps_both_tokenizers_apart(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("tokenizer.json")}
    assert files == {"tokenizer.json", str(Path("question_tokenizer") / "tokenizer.json")}


# --------------------------------------------------------------------------------------------------------- fixed budget


def test_a_budget_shortens_the_prompt(processor, pictures):
    text, images = (
        ["USER: <image> and <image>\nwhy ? ASSISTANT:", "USER: <image>\nwhy ?"],
        [pictures[:2], pictures[2:3]],
    )
    full = processor(images=images, text=text, padding=True, return_tensors="pt")
    processor.visual_token_budget = 7
    short = processor(images=images, text=text, padding=True, return_tensors="pt")
    image = processor.image_token_id
    assert (full["input_ids"] == image).sum(1).tolist() == [72, 36]
    assert (short["input_ids"] == image).sum(1).tolist() == [14, 7]
    assert torch.equal(full["pixel_values"], short["pixel_values"])
    assert torch.equal(full["question_input_ids"], short["question_input_ids"])


def test_number_of_placeholders_is_known_before_the_image_is(processor, stock_processor, pictures):
    sizes = [[picture.height, picture.width] for picture in pictures]
    text = [f"USER: {'<image>' * len(pictures)} why ?"]

    def counted():
        ids = processor(images=[pictures], text=text, return_tensors="pt")["input_ids"]
        return int((ids == processor.image_token_id).sum())

    stock = stock_processor._get_num_multimodal_tokens(image_sizes=sizes)
    ours = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert vars(ours) == vars(stock) and sum(ours.num_image_tokens) == counted()
    processor.visual_token_budget = 5
    ours = processor._get_num_multimodal_tokens(image_sizes=sizes)
    assert ours.num_image_tokens == [5] * 4 and ours.num_image_patches == stock.num_image_patches
    assert sum(ours.num_image_tokens) == counted() == 20
    assert vars(processor._get_num_multimodal_tokens()) == vars(stock_processor._get_num_multimodal_tokens())


@pytest.mark.parametrize("budget", [0, -1, 2.0, "7"])
def test_wrong_budget_is_refused(processor, budget):
    with pytest.raises(ValueError, match=f"visual_token_budget must be a whole number of at least 1, got {budget!r}"):
        RecoverableLlavaProcessor(
            processor.image_processor, processor.tokenizer, processor.question_tokenizer, visual_token_budget=budget
        )


def test_the_question_tokenizer_is_found_by_every_version(processor, tmp_path):
    """transformers 5.12 looks for a config.json in the subfolder of a Hub repo, and gives up without one."""
    processor.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "question_tokenizer" / "config.json").is_file()
