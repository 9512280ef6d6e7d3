"""Processor of LLaVA with recoverable compression: stock LLaVA's, plus the question for the CLIP text tower.

The question is the last thing that the user says: of a chat, the text of the last user message; of a raw prompt, what
stands between the user's last role tag and the assistant's next one, as the chat template writes them; or whatever
`questions=` says. It never is the system prompt or an earlier turn.
"""

from os.path import commonprefix
from typing import Any

from transformers import BatchFeature, LlavaProcessor, PreTrainedConfig
from transformers.processing_utils import ProcessorMixin

from .centre_crop import resize_what_is_seen


# How LLaVA-1.5 marks the user's and the assistant's turn; scripts write these by hand whatever the chat template.
_LLAVA_TAGS = ("USER:", "ASSISTANT:")


class RecoverableLlavaProcessor(LlavaProcessor):
    """A `LlavaProcessor` that also returns `question_input_ids` and `question_attention_mask`.

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
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        question_vocab_size: int | None = None,
        visual_token_budget: int | None = None,
        **kwargs: Any,
    ):
        if question_tokenizer is None:
            raise ValueError("question_tokenizer is missing: pass the tokenizer of the CLIP text tower.")
        # As LlavaProcessor.__init__, which knows two sub-processors where there are three here.
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
        *,
        questions: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """As stock, with one row of `question_input_ids` [B, T] and `question_attention_mask` [B, T] per prompt.

        Args:
            questions: one question per prompt, in place of the one found in the prompt. An empty string, like a prompt
                without a question, gets a mask of zeros: its images are then compressed by class attention alone.

        Raises:
            ValueError: if the number of questions is not the number of prompts.
        """
        inputs = super().__call__(images=images, text=text, **kwargs)
        if text is None:
            return inputs
        prompts = [text] if isinstance(text, str) else list(text)
        if questions is None:
            questions = [self.find_question(prompt) for prompt in prompts]
        questions = [questions] if isinstance(questions, str) else list(questions)
        if len(questions) != len(prompts):
            raise ValueError(
                f"questions has {len(questions)} entries for {len(prompts)} prompts: pass one question per prompt."
            )
        # Always of one length: what batches them later pads with its own ideas of side and value.
        tokenized = self.question_tokenizer(
            questions, padding="max_length", truncation=True, padding_side="right", return_attention_mask=True
        )
        mask = [row if question else [0] * len(row) for row, question in zip(tokenized["attention_mask"], questions)]
        return_tensors = kwargs.get("return_tensors") or kwargs.get("text_kwargs", {}).get("return_tensors")
        added = BatchFeature(
            {"question_input_ids": tokenized["input_ids"], "question_attention_mask": mask}, tensor_type=return_tensors
        )
        inputs.update(added)
        return inputs

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As stock; the question is the text of the last user message of each conversation."""
        if not kwargs.get("tokenize"):
            return super().apply_chat_template(conversation, *args, **kwargs)
        is_batch = isinstance(conversation, (list, tuple)) and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batch else [conversation]
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        if "questions" in kwargs:
            processor_kwargs["questions"] = kwargs.pop("questions")
        processor_kwargs.setdefault("questions", [_last_user_text(messages) for messages in conversations])
        return super().apply_chat_template(conversation, *args, processor_kwargs=processor_kwargs, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As stock. transformers 5.12 loads a tokenizer from a subfolder on the Hub only beside a config.json."""
        PreTrainedConfig().save_pretrained(f"{save_directory}/question_tokenizer")
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def find_question(self, prompt: str) -> str:
        """The question within a raw prompt: what the user says last, without image tokens."""
        tags = [self._role_tags(), _LLAVA_TAGS]
        user_tag, assistant_tag = next((pair for pair in tags if pair[0] in prompt), tags[0])
        question = prompt.rsplit(user_tag, 1)[-1].split(assistant_tag, 1)[0]
        return question.replace(self.image_token, " ").strip()

    def _role_tags(self) -> tuple[str, str]:
        """What stands before and after a user's text, as the chat template writes it; LLaVA-1.5's without one."""
        if self.chat_template is None:
            return _LLAVA_TAGS
        marks = ["\x00first\x00", "\x00answer\x00", "\x00second\x00"]
        messages = [
            {"role": role, "content": [{"type": "text", "text": mark}]}
            for role, mark in zip(("user", "assistant", "user"), marks)
        ]
        rendered = super().apply_chat_template(messages, add_generation_prompt=True)
        before_first, rest = rendered.split(marks[0])
        after_first, rest = rest.split(marks[1])
        before_second, after_second = rest.split(marks[2])
        # What is common to both turns is the tag; the rest is a system prompt or the end of the answer.
        user_tag = commonprefix([before_first[::-1], before_second[::-1]])[::-1].strip()
        assistant_tag = commonprefix([after_first, after_second]).strip()
        return user_tag or _LLAVA_TAGS[0], assistant_tag or _LLAVA_TAGS[1]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        if self.visual_token_budget is not None:
            return self.image_token * self.visual_token_budget
        return super().replace_image_token(image_inputs, image_idx, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        """As stock, which would enlarge all of a long picture to crop its middle."""
        return super()._process_images(resize_what_is_seen(images, self.image_processor, **kwargs), **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> Any:
        """As stock; engines such as vLLM ask this for the number of placeholders before an image is encoded."""
        data = super()._get_num_multimodal_tokens(image_sizes=image_sizes, **kwargs)
        if self.visual_token_budget is not None and image_sizes is not None:
            data.num_image_tokens = [self.visual_token_budget] * len(image_sizes)
        return data

    @property
    def model_input_names(self) -> list[str]:
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return [*names, "question_input_ids", "question_attention_mask"]


def _last_user_text(messages: Any) -> str:
    """The text parts of the last user message of a chat, joined; empty if there is none."""
    for message in reversed(getattr(messages, "messages", messages)):
        if message["role"] == "user":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content.strip()
            texts = (part["text"] for part in content if part.get("type") == "text")
            return " ".join(text.strip() for text in texts).strip()
    return ""


__all__ = ["RecoverableLlavaProcessor"]
