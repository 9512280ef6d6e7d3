"""What the processors of all families add to stock's: the question of each prompt, for the CLIP text tower.

The question is the last thing that the user says: the text of the user's last turn, in a chat or in a raw prompt
(`question_text.py` finds it there), without sentences that only say how to answer, such as "Answer the question using a
single word or phrase." It never is the system prompt or an earlier turn. `questions=` takes its place as it is.
"""

from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

from transformers import BatchFeature, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_numpy_array, is_torch_tensor, logging

from .question_text import (
    IMAGE,
    KNOWN_TAGS,
    TurnTags,
    question_of_chat,
    question_of_prompt,
    strip_tokens,
    tags_of_template,
    without_instructions,
)


logger = logging.get_logger(__name__)

# Options of `from_pretrained` that say where files lie. All others are meant for the language model's tokenizer alone.
_WHERE_FILES_LIE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "token",
    "trust_remote_code",
    "_from_auto",
    "_from_pipeline",
)
# What `apply_chat_template` knows of the questions when stock's calls the processor: a list, or the conversation.
_CHAT: ContextVar[tuple[Any, Any]] = ContextVar("recoverable_llava_chat", default=(None, None))


class QuestionProcessorMixin(ProcessorMixin):
    """Put before a stock LLaVA processor, adds `question_input_ids` and `question_attention_mask` to what that returns.

    Args:
        image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens: as in `LlavaProcessor`.
        question_tokenizer: tokenizer of the CLIP text tower; its `model_max_length` is the length that every question
            is padded to on the right, or cut to.
        question_vocab_size (`int`, *optional*): the vocabulary size of `question_tokenizer`, written on saving and
            checked on loading.
        visual_token_budget (`int`, *optional*): as in the model's config. Prompts then carry exactly that many
            placeholders per image, and are short from the start.

    Raises:
        ValueError: if `question_tokenizer` is missing, not the one that was saved, or sets no maximum length.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        question_tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        question_vocab_size: int | None = None,
        visual_token_budget: int | None = None,
        **kwargs: Any,
    ):
        if question_tokenizer is None:
            raise ValueError("question_tokenizer is missing: pass the tokenizer of the CLIP text tower.")
        # As the stock processors' own, which know two sub-processors where there are three here.
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.encode(self.image_token, add_special_tokens=False)[0]
        ProcessorMixin.__init__(self, image_processor, tokenizer, question_tokenizer, chat_template=chat_template)

        # Without its subfolder, loading falls back to the language model's tokenizer with no more than a warning.
        if question_vocab_size is not None and question_vocab_size != len(question_tokenizer):
            raise ValueError(
                f"question_tokenizer has {len(question_tokenizer)} entries, but {question_vocab_size} were saved: the "
                "folder question_tokenizer/ is missing from the checkpoint or belongs to another one."
            )
        if question_tokenizer.model_max_length > 10_000:
            raise ValueError(
                "question_tokenizer sets no model_max_length: set it to the number of positions of the CLIP text tower "
                "(max_position_embeddings, 77 for OpenAI's CLIP)."
            )
        if visual_token_budget is not None and (not isinstance(visual_token_budget, int) or visual_token_budget < 1):
            raise ValueError(f"visual_token_budget must be a whole number of at least 1, got {visual_token_budget!r}.")
        self.question_vocab_size = len(question_tokenizer)
        self.visual_token_budget = visual_token_budget

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *args: Any,
        questions: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """As stock, with one row of `question_input_ids` [B, T] and `question_attention_mask` [B, T] per prompt.

        Args:
            questions: one question per prompt, in place of the one found in the prompt; without prompts, one per row
                that is wanted. An empty string, like a prompt without a question, gets a mask of zeros: its images are
                then compressed by class attention alone.

        Raises:
            ValueError: if the number of questions is not the number of prompts.
        """
        if isinstance(text, Iterator):
            text = list(text)  # It is read twice.
        inputs = super().__call__(images, text, *args, **kwargs)
        prompts = [text] if isinstance(text, str) else text
        given, conversation = _CHAT.get()
        questions = given if questions is None else questions
        if questions is None and prompts is not None:
            questions = self._found_questions(prompts, conversation)
        if questions is None:
            return inputs
        questions = [questions] if isinstance(questions, str) else list(questions)
        if prompts is not None and len(questions) != len(prompts):
            raise ValueError(
                f"questions has {len(questions)} entries for {len(prompts)} prompts: pass one question per prompt."
            )
        kind = _tensor_type(inputs["pixel_values" if prompts is None else "input_ids"])
        inputs.update(self.question_inputs(questions, return_tensors=kind))
        return inputs

    def apply_chat_template(
        self, conversation: Any, *args: Any, questions: str | list[str] | None = None, **kwargs: Any
    ) -> Any:
        """As stock; the question is what the user's last turn in each conversation says, unless `questions` is given.

        Args:
            questions: one question per conversation; used where `tokenize` is set.
        """
        # Stock's calls this processor with the prompt that it wrote. Not every version hands all options on.
        outer = _CHAT.set((questions, conversation))
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        finally:
            _CHAT.reset(outer)

    def question_inputs(self, questions: list[str], return_tensors: str | None = None) -> BatchFeature:
        """`question_input_ids` and `question_attention_mask`, both [B, T], of questions without images or prompts.

        Args:
            questions: as they are to be read; an empty one gets a mask of zeros, which means that there is none.
            return_tensors: as in a call of the processor.

        Raises:
            ValueError: if a question is no string.
        """
        for number, question in enumerate(questions):
            if not isinstance(question, str):
                raise ValueError(f"questions[{number}] is {question!r}: pass a string, which may be empty.")
        # Always of one length: what batches them later pads with its own ideas of side and value.
        tokenized = self.question_tokenizer(
            questions, padding="max_length", truncation=True, padding_side="right", return_attention_mask=True
        )
        mask = [
            row if question.strip() else [0] * len(row) for row, question in zip(tokenized["attention_mask"], questions)
        ]
        rows = {"question_input_ids": tokenized["input_ids"], "question_attention_mask": mask}
        return BatchFeature(rows, tensor_type=return_tensors)

    def find_question(self, prompt: str) -> str:
        """The question within a raw prompt, which may also be one that was decoded from token ids; may be empty.

        Decode with special tokens: without them the turns of ChatML cannot be told apart.
        """
        text = strip_tokens(prompt.replace(self.image_token, IMAGE), self._special_tokens())
        return self._guiding(question_of_prompt(text, self._turn_tags()))

    def find_question_in_chat(self, messages: Any) -> str:
        """The question within the messages of a chat; may be empty."""
        return self._guiding(question_of_chat(messages))

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> Any:
        # Stock hands every option to every tokenizer. A name of transformers' own: where a version calls it otherwise,
        # options reach both tokenizers.
        if sub_processor_type == "question_tokenizer":
            kwargs = {name: value for name, value in kwargs.items() if name in _WHERE_FILES_LIE}
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As stock. transformers 5.12 loads a tokenizer from a subfolder on the Hub only beside a config.json."""
        PreTrainedConfig().save_pretrained(f"{save_directory}/question_tokenizer")
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, "question_input_ids", "question_attention_mask"]

    def _found_questions(self, prompts: list[str], conversation: Any) -> list[str]:
        """The question of each prompt, or of each chat that the prompts were written from."""
        if conversation is None:
            # Some versions of stock's processors take a prompt as a list of words, too.
            prompts = [prompt if isinstance(prompt, str) else " ".join(prompt) for prompt in prompts]
            questions = [self.find_question(prompt) for prompt in prompts]
        else:
            questions = [self.find_question_in_chat(messages) for messages in _chats(conversation)]
        if any(self.image_token in prompt and not question for prompt, question in zip(prompts, questions)):
            logger.warning_once(
                "No question was found in a prompt that has images: their visual tokens are chosen by class attention "
                "alone. Pass questions=[...], one for each prompt, to guide the choice."
            )
        return questions

    def _guiding(self, text: str) -> str:
        """A text as it guides: without tokens that are no words, and without sentences that say how to answer."""
        for token in (self.image_token, *self._special_tokens()):
            text = text.replace(token, " ")
        return without_instructions(text)

    def _turn_tags(self) -> Iterator[TurnTags]:
        """How prompts for this model may mark their turns: as its chat templates write them, or as people know them."""
        for templates in (self.chat_template, getattr(self.tokenizer, "chat_template", None)):
            for template in templates.values() if isinstance(templates, dict) else [templates]:
                if template and (tags := tags_of_template(partial(self._render, template), self._special_tokens())):
                    yield tags
        yield from KNOWN_TAGS

    def _render(self, template: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        text = super().apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt
        )
        return text.replace(self.image_token, " ")

    def _special_tokens(self) -> list[str]:
        """Tokens around a turn, none of which is a word of the question."""
        names = ("bos_token", "eos_token", "pad_token")
        return [token for name in names if (token := getattr(self.tokenizer, name, None))]


def _chats(conversation: Any) -> list[Any]:
    """One conversation or several, told apart as stock's `apply_chat_template` does it."""
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    is_batch = isinstance(first, (list, tuple)) or hasattr(first, "messages")
    return list(conversation) if is_batch else [conversation]


def _tensor_type(value: Any) -> str | None:
    """The `return_tensors` that made this value."""
    if isinstance(value, list):
        return None
    if is_torch_tensor(value):
        return "pt"
    return "np" if is_numpy_array(value) else "mlx"
