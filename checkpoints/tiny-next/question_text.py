"""Where the question stands: the last thing that the user says, in a chat or in a prompt that is written already.

A prompt is one string, whose turns are told apart by role tags. Tags are compared without white space, since a
tokenizer may give back "USER :" for "USER:". Somebody may also quote a tag, so their order counts:

- A user's turn begins at the first user tag after an assistant's tag, or at one that an image follows. Any other one
  before the answer is a quotation.
- Where the prompt ends in an assistant's tag, that one asks for the answer, and the question goes on up to it. Where an
  answer follows, the question ends at the first assistant's tag, so that it holds no part of an answer.
- "USER:" right after a letter, a quotation mark or an opening bracket is a quotation.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from os.path import commonprefix
from typing import Any


# Sentences that say how to answer and not what is asked, as benchmarks add them. "Answer yes if it is red." does ask.
_HOW_TO_ANSWER = re.compile(
    r"""
    (?! .* ( \? | \b(if|whether|what|which|who|whose|where|why|how)\b ) )
    ( (please\s+)? (answer|respond|reply)\b .*
    | (please\s+)? (only\s+)? (give|provide|select|choose|keep)\b (?= .*\b(answer|response|option)\b )
        .* \b(short|brief|one|single|letter|best|correct)\b .*
    | your\s+(answer|response)\b .*
    | when\b .* \bunanswerable\b .*
    | (let's\s+)? think\s+step\s+by\s+step\b .*
    | ((the\s+)?best\s+|short\s+)? (answer|option) (\s+is)? \s*: \W* )
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Stands for an image within a prompt, so that no function here has to know the tokenizer's own placeholder.
IMAGE = "\x00"
# Llama 2 writes the system prompt into the user's first turn.
_SYSTEM_PROMPT = re.compile(r"<<\s*SYS\s*>>.*?<<\s*/\s*SYS\s*>>", re.DOTALL)


@dataclass(frozen=True)
class TurnTags:
    """How one kind of prompt marks its turns.

    Args:
        user: what stands before a user's text.
        assistant: what stands before an answer; may be empty.
        end: what ends a user's text, if that is more than the assistant's tag.
        system: what stands before a system prompt; may be empty.
    """

    user: str
    assistant: str
    end: str = ""
    system: str = ""

    def read(self, prompt: str) -> tuple[bool, int, str] | None:
        """What the user says last, after how well the prompt fits; None if it has none of the tags.

        Of two kinds of tags the lower pair fits better: whether the prompt does *not* end in the assistant's tag, and
        where the first tag of a user or a system prompt stands.
        """
        tags = list(self._pattern.finditer(prompt))
        if not tags:
            return None
        asks = tags[-1].lastgroup == "assistant" and tags[-1].end() == len(prompt.rstrip())
        start, stop, is_answered = 0, None, True
        for tag in tags:
            if tag.lastgroup == "assistant":
                is_answered = True
                if stop is None or asks:
                    stop = tag.start()
            elif tag.lastgroup == "user" and (is_answered or tag["image"]):
                start, stop, is_answered = tag.end(), None, False
        first = next((tag.start() for tag in tags if tag.lastgroup != "assistant"), len(prompt))
        return not asks, first, self._without_ends(prompt[start:stop])

    def _without_ends(self, text: str) -> str:
        if not self.end:
            return text
        # Several messages of the user in a row are one turn.
        end = _spaced(self.end)
        return re.sub(rf"{end}(\s*{_spaced(self.user)}|\s*$)", " ", text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        patterns = {self.user: rf"(?P<user>{_as_tag(self.user)}(?P<image>\s*{IMAGE})?)"}
        if self.assistant:
            # At the very end it may follow the question without a space.
            at_end = rf"{_spaced(self.assistant)}(?=\s*$)"
            patterns[self.assistant] = f"(?P<assistant>{_as_tag(self.assistant)}|{at_end})"
        if self.system and self.system not in patterns:
            patterns[self.system] = f"(?P<system>{_as_tag(self.system)})"
        # One tag may begin with the other.
        return re.compile("|".join(patterns[tag] for tag in sorted(patterns, key=len, reverse=True)))


# What scripts write by hand, whatever the chat template: LLaVA-1.5 (Vicuna), ChatML (Qwen, Yi), Llama 2 and Mistral.
KNOWN_TAGS = (
    TurnTags("USER:", "ASSISTANT:"),
    TurnTags("<|im_start|>user", "<|im_start|>assistant", end="<|im_end|>", system="<|im_start|>system"),
    TurnTags("[INST]", "[/INST]"),
)


def question_of_prompt(prompt: str, all_tags: Iterable[TurnTags]) -> str:
    """What the user says last, by the tags that fit best, the first of equals; all of the prompt if it has no tags.

    Args:
        prompt: with `IMAGE` for every image.
        all_tags: of the kinds of prompts that it may be.
    """
    readings = [reading for tags in all_tags if (reading := tags.read(prompt)) is not None]
    text = min(readings, key=lambda reading: reading[:2])[2] if readings else prompt
    return _SYSTEM_PROMPT.sub(" ", text).replace(IMAGE, " ")


def question_of_chat(messages: Iterable[Any]) -> str:
    """The texts of the last user messages in a row; empty if there are none. Messages are dicts or objects."""
    texts: list[str] = []
    for message in reversed(list(getattr(messages, "messages", messages))):
        if _get(message, "role") == "user":
            content = _get(message, "content") or ""
            parts = [content] if isinstance(content, str) else [_text_of(part) for part in content]
            texts[:0] = parts or [""]
        elif texts:
            break
    return " ".join(texts)


def without_instructions(text: str) -> str:
    """A text without sentences that only say how to answer, if it has others, and without surplus white space."""
    sentences = [sentence.strip() for sentence in re.split(r"\n|(?<=[.?!])\s", text)]
    asking = " ".join(sentence for sentence in sentences if not _HOW_TO_ANSWER.fullmatch(sentence))
    return " ".join(asking.split() or text.split())


def tags_of_template(render: Callable[[list[dict[str, Any]], bool], str], specials: Sequence[str]) -> TurnTags | None:
    """The tags that a chat template writes, seen from chats of marks; None if none of them shows any.

    Args:
        render: writes a chat as the template does, with or without the generation prompt; may raise whatever it likes.
        specials: tokens before a user's tag that are no part of it, such as the one that ends the answer before.
    """
    # Some templates show the last message alone, some take texts and no parts, some must begin with a system message.
    for num_users, as_parts, has_system in product([2, 1], [True, False], [False, True]):
        chat = [("system", 0)] * has_system + [("user", 1), ("assistant", 2), ("user", 3)][: 2 * num_users - 1]
        around = partial(_around_marks, render, as_parts)
        # What stands before the first user's mark, behind it, before the second and behind that.
        pieces = around(chat, True)[has_system:]
        if not pieces:
            continue
        # Before the second user's mark stand the end of the answer and the tag.
        before = pieces[-2]
        if num_users == 2 and (answered := around(chat[:-1], False)):
            before = before.removeprefix(answered[-1])
        # What both turns have in common; what only the first has before it is a system prompt.
        user = strip_tokens(commonprefix([pieces[0][::-1], before[::-1]])[::-1], specials)
        if not user:
            continue
        after = commonprefix(pieces[1::2])
        unanswered = around(chat[: 1 + has_system], False)
        end = commonprefix([after, unanswered[-1]]) if unanswered else ""
        assistant = after[len(end) :].strip()
        with_system = around([("system", 0), ("user", 1)], True)
        system = strip_tokens(with_system[0], specials) if with_system else ""
        return TurnTags(user, assistant or end.strip(), end.strip() if assistant else "", system)
    return None


def strip_tokens(text: str, tokens: Sequence[str]) -> str:
    """A text without white space and without any of `tokens` at its beginning and end."""
    while True:
        shorter = text.strip()
        for token in tokens:
            shorter = shorter.removeprefix(token).removesuffix(token)
        if shorter == text:
            return text
        text = shorter


def _around_marks(
    render: Callable[[list[dict[str, Any]], bool], str],
    as_parts: bool,
    chat: list[tuple[str, int]],
    add_generation_prompt: bool,
) -> list[str]:
    """What a template writes around marks, one a message; empty unless it writes every mark once, in order."""
    # A template that prints a list of parts as it is escapes the zeros, so that such a mark is not found.
    marks = [f"\x00{number}\x00" for _, number in chat]
    messages = [
        {"role": role, "content": [{"type": "text", "text": mark}] if as_parts else mark}
        for (role, _), mark in zip(chat, marks)
    ]
    try:
        rest = render(messages, add_generation_prompt)
    except Exception:  # A template is code of somebody else, and raises what it likes about a chat it does not take.
        return []
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            return []
        pieces.append(piece)
    return [*pieces, rest]


def _spaced(tag: str) -> str:
    """A pattern of a tag that allows white space between any two characters."""
    return r"\s*".join(re.escape(character) for character in "".join(tag.split()))


def _as_tag(tag: str) -> str:
    """A pattern of a tag where it is no part of a longer word and does not open a quotation."""
    before = r"(?<![\w\"'`“‘«(\[{])" if tag[0].isalnum() else ""
    after = r"(?!\w)" if tag[-1].isalnum() else ""
    return before + _spaced(tag) + after


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    return (_get(part, "text") or "") if _get(part, "type") == "text" else ""


def _get(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)
