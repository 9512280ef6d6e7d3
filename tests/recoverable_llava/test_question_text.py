"""The question within prompts and chats of all kinds."""

import pytest

from recoverable_llava.question_text import (
    KNOWN_TAGS,
    TurnTags,
    question_of_chat,
    question_of_prompt,
    strip_tokens,
    tags_of_template,
    without_instructions,
)


LLAVA, CHATML, LLAMA_2 = KNOWN_TAGS


def question(prompt, tags=KNOWN_TAGS):
    return " ".join(question_of_prompt(prompt, tags).split())


# ------------------------------------------------------------------------------------------------- quotations and turns


SYSTEM = "A chat between a user and an assistant. The assistant answers."
ONE_TURN = {
    LLAVA: "{} USER: {} ASSISTANT:",
    CHATML: "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    LLAMA_2: "<s>[INST] <<SYS>>\n{}\n<</SYS>>\n\n{} [/INST]",
}
QUESTIONS = [
    "what is it ?",
    "whose plate is it (asked by USER: 7) ?",
    "USER: 7 asks what it is",
    "what does ASSISTANT: mean ?",
    "ASSISTANT: or not ASSISTANT: ?",
    "write 'USER: hi ASSISTANT: ho' backwards",
    "what do 'ASSISTANT:' and 'USER:' mean ?",
    "what do (ASSISTANT:) and [USER:] mean ?",
    "is SUPERUSER: a word ?",
    "what does [INST] mean ?",
    "what does [/INST] mean ?",
    "what does <|im_start|>user mean ?",
    "what does <|im_start|>assistant mean ?",
    "what is USER ?",
    "line one\nline two ?",
]


@pytest.mark.parametrize("asked", QUESTIONS)
@pytest.mark.parametrize("tags", ONE_TURN, ids=["llava", "chatml", "llama 2"])
def test_a_quoted_tag_is_part_of_the_question(tags, asked):
    prompt = ONE_TURN[tags].format(SYSTEM, asked)
    assert question(prompt) == " ".join(asked.split())


@pytest.mark.parametrize("asked", QUESTIONS)
def test_a_later_turn_is_the_question(asked):
    prompts = [
        f"USER: how many ? ASSISTANT: two USER: {asked} ASSISTANT:",
        f"USER: how many ? ASSISTANT: two </s>USER: {asked} ASSISTANT:",
        f"<|im_start|>user\nhow many ?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\n{asked}"
        "<|im_end|>\n<|im_start|>assistant\n",
        f"<s>[INST] how many ? [/INST] two </s><s>[INST] {asked} [/INST]",
    ]
    assert [question(prompt) for prompt in prompts] == [" ".join(asked.split())] * 4


ANSWERS = {
    "USER: what ? ASSISTANT: it is a cat": "what ?",
    "USER: what ? ASSISTANT: the word ASSISTANT: means cat </s>": "what ?",
    "USER: one ? ASSISTANT: a USER: two ? ASSISTANT: b </s>": "two ?",
    "USER: one ? ASSISTANT: a USER: two ?": "two ?",
    "<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\na cat": "what ?",
    "<|im_start|>user\nwhat ?<|im_end|>\n": "what ?",
    "<|im_start|>user\nwhat ?<|im_end|>": "what ?",
    "<|im_start|>user\nwhat ?": "what ?",
    "<|im_start|>user\nlook<|im_end|>\n<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\n": "look what ?",
    "[INST] what ? [/INST] a cat": "what ?",
    "The USER: is kind. USER: \x00\nwhat ? ASSISTANT:": "what ?",
    "[INST] look [INST] \x00\x00 what ? [/INST]": "what ?",
    "USER: \x00 \x00 what ? \x00 ASSISTANT:": "what ?",
    "USER:\x00what ?\x00ASSISTANT:": "what ?",
    "\x00what ?": "what ?",
    "what ?": "what ?",
    "what ? ASSISTANT:": "what ?",
    "USER:what ?ASSISTANT:": "what ?",
    "USER: whatASSISTANT:": "what",
    "USER: ASSISTANT:": "",
    "USER:": "",
    "ASSISTANT:": "",
    "": "",
}


@pytest.mark.parametrize("prompt, expected", ANSWERS.items())
def test_prompts_with_and_without_an_answer(prompt, expected):
    assert question(prompt) == expected


@pytest.mark.parametrize("space", [" ", "\n", "  "])
def test_tags_are_found_however_they_are_spaced(space):
    """Some tokenizers put a space between any two tokens when they decode."""
    for start, middle in (
        (["USER", ":"], ["ASSISTANT", ":"]),
        (["<|im_start|>", "user"], ["<|im_end|>", "<|im_start|>", "assistant"]),
        (["[", "INST", "]"], ["[", "/", "INST", "]"]),
    ):
        prompt = space.join([*start, "how", "many", "?", *middle, "two", *start, "what", "is", "it", "?", *middle])
        assert question(prompt) == "what is it ?"


def test_the_kind_of_prompt_is_that_which_asks_for_the_answer():
    prompt = (
        "<|im_start|>system\nThe USER: is kind<|im_end|>\n<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert question(prompt) == "what ?"
    assert question("USER: what does <|im_start|>user\nsay ? ASSISTANT:") == "what does <|im_start|>user say ?"
    # Without one: that which begins first.
    assert question("<|im_start|>user\nwhat is USER: 7 ?<|im_end|>") == "what is USER: 7 ?"
    assert question("USER: what is [INST] ?") == "what is [INST] ?"


def test_long_prompts_are_read_in_a_moment():
    prompt = f"{'<pad>' * 3000} USER: {' ' * 30_000} what ? {'[' * 10_000} {' ASSISTANT' * 10_000} ASSISTANT:"
    assert question(prompt).endswith("ASSISTANT") and question(prompt).startswith("what ?")


# ------------------------------------------------------------------------------------------------------- chat templates


class Refused(Exception):
    pass


def refuse(condition):
    if condition:
        raise Refused


def text_of(message):
    parts = message["content"]
    return parts if isinstance(parts, str) else "".join(part["text"] for part in parts)


def plain(messages, add_generation_prompt):
    turns = "".join(f"### {message['role']}:\n{text_of(message)}\n" for message in messages)
    return turns + "### assistant:\n" * add_generation_prompt


def as_parts_alone(messages, add_generation_prompt):
    refuse(any(isinstance(message["content"], str) for message in messages))
    return plain(messages, add_generation_prompt)


def as_strings_alone(messages, add_generation_prompt):
    refuse(any(not isinstance(message["content"], str) for message in messages))
    return plain(messages, add_generation_prompt)


def as_it_is(messages, add_generation_prompt):
    return plain([{**message, "content": str(message["content"])} for message in messages], add_generation_prompt)


def after_a_system_message(messages, add_generation_prompt):
    refuse(messages[0]["role"] != "system")
    return plain(messages, add_generation_prompt)


def the_last_message_alone(messages, add_generation_prompt):
    return plain(messages[-1:], add_generation_prompt)


def always_asking(messages, add_generation_prompt):
    return plain(messages, True)


def with_a_system_prompt_of_its_own(messages, add_generation_prompt):
    return "Be kind.\n" + plain(messages, add_generation_prompt)


@pytest.mark.parametrize(
    "render",
    [
        plain,
        as_parts_alone,
        as_strings_alone,
        as_it_is,
        after_a_system_message,
        the_last_message_alone,
        always_asking,
        with_a_system_prompt_of_its_own,
    ],
)
def test_tags_of_a_template(render):
    tags = tags_of_template(render, [])
    assert (tags.user, tags.assistant) == ("### user:", "### assistant:")
    assert tags.end in ("", "### assistant:")
    prompt = plain([{"role": "user", "content": "what ?"}], True)
    assert question(prompt, [tags]) == "what ?"


def always_refusing(messages, add_generation_prompt):
    raise Refused


def saying_nothing(messages, add_generation_prompt):
    return "hello"


def without_roles(messages, add_generation_prompt):
    return "\n".join(map(text_of, messages))


def saying_everything_twice(messages, add_generation_prompt):
    return plain(messages, False) + plain(messages, add_generation_prompt)


@pytest.mark.parametrize("render", [always_refusing, saying_nothing, without_roles, saying_everything_twice])
def test_a_template_that_shows_no_tags(render):
    assert tags_of_template(render, []) is None


def test_tags_begin_without_the_end_of_the_answer_before():
    def render(messages, add_generation_prompt):
        turns = "".join(f"<s>[{message['role']}]{text_of(message)}[/]</s>" for message in messages)
        return turns + "<s>[assistant]" * add_generation_prompt

    assert tags_of_template(render, ["<s>", "</s>"]) == TurnTags(
        "[user]", "<s>[assistant]", end="[/]</s>", system="[system]"
    )


def test_strip_tokens():
    assert strip_tokens(" <pad> <pad><s> a <s> b</s>\n<pad>", ["<s>", "</s>", "<pad>"]) == "a <s> b"
    assert strip_tokens("<pad>" * 5000, ["<pad>"]) == "" == strip_tokens(" ", [])


# ---------------------------------------------------------------------------------------------------------------- chats


def test_the_last_turn_of_a_chat():
    user, answer = {"role": "user", "content": "one ?"}, {"role": "assistant", "content": "two"}
    other = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "three ?"}, "four ?"]}
    assert question_of_chat([user, answer, other]) == " three ? four ?"
    assert question_of_chat([other, answer, user]) == "one ?"
    assert question_of_chat([user, answer]) == "one ?"
    assert question_of_chat([user, user, answer, {"role": "tool", "content": "5"}]) == "one ? one ?"
    assert question_of_chat([answer]) == question_of_chat([]) == question_of_chat([{"role": "user"}]) == ""


# --------------------------------------------------------------------------------------------------------- instructions


INSTRUCTIONS = [
    "Answer the question using a single word or phrase.",
    "Answer the question using a single word.",
    "Answer this question using a single word or phrase .",
    "Answer with the option's letter from the given choices directly.",
    "Please answer yes or no.",
    "Please answer Yes or No",
    "Answer with yes or no.",
    "Answer concisely.",
    "Answer briefly.",
    "Answer in one word.",
    "Respond with only the letter of the right option.",
    "Respond in a short sentence.",
    "Provide a one-sentence answer.",
    "Provide only the letter of your answer (A, B, C, or D).",
    "Give a short answer.",
    "Your answer should be one word.",
    "Your response must be a number.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "Answer this question with A, B, C, or D.",
    "Answer with a single integer.",
    "Please answer directly with only the letter of the correct option and nothing else.",
    "Only give the best option.",
    "Select the best answer to the above multiple-choice question based on the image.",
    "Keep the answer short and concise.",
    "Give me the answer letter directly.",
    "Let's think step by step.",
    "Answer:",
    "Short answer:",
    "The best answer is:",
    "Best option: (",
]


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_how_to_answer_is_no_question(instruction):
    assert without_instructions(f"Is it red?\n{instruction}") == "Is it red?"
    assert without_instructions(f"Is it red? {instruction}") == "Is it red?"
    assert without_instructions(f"{instruction}\nIs it red ?\n") == "Is it red ?"
    assert without_instructions(f"Is it red?\n{instruction}\n{instruction}") == "Is it red?"
    assert without_instructions(instruction) == instruction


@pytest.mark.parametrize(
    "text",
    [
        "Answer whether it is black.",
        "Answer which word is on the sign.",
        "Answer what the man holds in his hand.",
        "Answer me: is it red?",
        "Answer in one word: is it red?",
        "Answer in detail what the man does.",
        "Answer yes if the cat is black.",
        "Answer with yes if the cat is black.",
        "If the cat is black, answer with yes, else no.",
        "Write down the answer on the board.",
        "Give the answer on the board.",
        "Give the number of cats.",
        "Write down the letter on the left.",
        "Answering machines: where are they?",
        "Which answer is written on the board?",
        "The answer is in the picture.",
        "When does the shop open?",
    ],
)
def test_what_is_asked_stays(text):
    assert without_instructions(f"This is my garden. {text}") == f"This is my garden. {text}"


def test_white_space_is_none_of_the_question():
    assert without_instructions("  what \n\n is\tit ? ") == "what is it ?"
    assert without_instructions(" \n ") == without_instructions("") == ""
