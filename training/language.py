"""The two tokenizers, trained on text from the recipe's own scenes, and fast encoding for the training loop.

Both are byte-pair encodings over words and punctuation marks in which every word of the corpus ends up as one token;
other words are spelled in pieces. Whitespace separates tokens and is not kept.
"""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from .questions import KINDS, ask, long_caption, short_caption
from .scenes import make_scene, scene_random
from .vocabulary import CENTER_MARK, CLASSES, COLORS, COLUMNS, COUNTS, LETTERS, NOTHING, ROWS, WORDS


IMAGE_TOKEN = "<image>"
WORD_END = "</w>"
ASSETS = Path(__file__).parent / "assets"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] if message['content'] is string "
    "else message['content'][0]['text'] }} {% else %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _corpus(scenes: int = 1500) -> Iterator[str]:
    names = (*CLASSES, *COLORS, *WORDS, *ROWS, *COLUMNS, *COUNTS, NOTHING, CENTER_MARK, *"ABCD")
    for _ in range(20):
        yield from names
        yield "USER: ASSISTANT:"
    for index in range(scenes):
        rng = scene_random("train", index, seed=-1)
        scene = make_scene("train", rng)
        for kind in KINDS:
            turn = ask(scene, kind, rng)
            if turn is not None:
                yield f"USER: {turn.question} ASSISTANT: {turn.answer}"
        yield long_caption(scene, rng)[0]
        yield short_caption(scene, rng)[0]


def _train(special_tokens: list[str], lines: Iterator[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=special_tokens[0], end_of_word_suffix=WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    printable = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=printable,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(printable)] * 3 + list(lines), trainer)
    return tokenizer


def build_tokenizers(folder: Path = ASSETS) -> None:
    """Trains both tokenizers and writes them to `folder`; everything else reads them from there."""
    tokenizer = _train(["<unk>", "<s>", "</s>", "<pad>", IMAGE_TOKEN], _corpus())
    tokenizer.decoder = decoders.BPEDecoder(suffix=WORD_END)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "language_tokenizer.json"))
    trained = _train(["<|startoftext|>", "<|endoftext|>"], (line.lower() for line in _corpus()))
    vocabulary = trained.get_vocab()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for token in sorted([*alphabet, *(letter + WORD_END for letter in alphabet)]):
        vocabulary.setdefault(token, len(vocabulary))
    merges = json.loads(trained.to_str())["model"]["merges"]
    (folder / "question_tokenizer.json").write_text(json.dumps({"vocab": vocabulary, "merges": merges}))


def _asset(name: str) -> Path:
    if not (ASSETS / name).exists():
        raise ValueError(f"no tokenizer at {str(ASSETS / name)!r}: run `python -m training tokenizers`")
    return ASSETS / name


@lru_cache
def language_tokenizer() -> PreTrainedTokenizerFast:
    """The language model's tokenizer: `<unk>`, `<s>`, `</s>`, `<pad>`, `<image>`, then letters and words."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(_asset("language_tokenizer.json"))),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


@lru_cache
def question_tokenizer() -> CLIPTokenizer:
    """The CLIP text tower's tokenizer: lower case, 77 tokens, padded with the end token as OpenAI's CLIP is."""
    parts = json.loads(_asset("question_tokenizer.json").read_text())
    return CLIPTokenizer(vocab=parts["vocab"], merges=[tuple(pair) for pair in parts["merges"]], model_max_length=77)


_PIECES = re.compile(r"\w+|[^\w\s]+")


class WordEncoder:
    """Encodes text of the recipe's own words without the tokenizer's overhead, to the same ids, no special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            found = self.known.get(piece)
            if found is None:
                found = self.known[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
            ids += found
        return ids


def dense_words(without_place: bool = False) -> list[list[str]]:
    """The tokens that name what a patch shows, one list for each of `render.GROUPS`.

    Args:
        without_place: whether a patch may lack a row and a column, and shows "nothing" of them.
    """

    def words(names: tuple[str, ...]) -> list[str]:
        return [name + WORD_END for name in names]

    nothing = [NOTHING + WORD_END]
    return [
        words(CLASSES) + nothing,
        words(tuple(COLORS)) + nothing,
        words(WORDS) + nothing,
        list(LETTERS) + nothing,
        words(ROWS) + nothing * without_place,
        words(COLUMNS) + nothing * without_place,
        [CENTER_MARK + WORD_END, *nothing],
    ]
