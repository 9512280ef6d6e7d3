"""Stand-in until recoverable_llava has the class of this name."""

import torch
from transformers.utils.generic import can_return_tuple  # noqa: F401

from recoverable_llava import RecoverableLlavaModel


class RecoverableLlavaVisionModel(RecoverableLlavaModel):
    def __init__(self, config):
        super().__init__(config)
        self.language_model = torch.nn.Identity()

    def get_image_features(
        self, pixel_values, question_input_ids=None, question_attention_mask=None, vision_features=None
    ):
        vision = vision_features if vision_features is not None else self.get_vision_features(pixel_values)
        if not self.config.compress:
            return list(self.multi_modal_projector(vision.with_class_token(vision.patches)))
        question = self._read_question(len(vision.patches), question_input_ids, question_attention_mask, None)
        if self.config.visual_token_budget is not None:
            return list(self._budget_tokens(vision, question, None))
        text_scores, has_question = self._text_scores(vision, question, None)
        selection = self._select_tokens(vision, text_scores, has_question)
        longest, merged = int(selection.num_tokens.max()), int(selection.num_merged.max())
        assembly = self._assemble_tokens(selection, vision, text_scores, has_question, longest, merged)
        tokens = self._project_tokens(vision, assembly)
        return [t[: n + vision.num_class_tokens] for t, n in zip(tokens, selection.num_tokens.tolist())]


def question_inputs(processor, questions):
    t = processor.question_tokenizer(
        questions, padding="max_length", truncation=True, padding_side="right", return_attention_mask=True
    )
    mask = [row if q else [0] * len(row) for row, q in zip(t["attention_mask"], questions)]
    return {"question_input_ids": torch.tensor(t["input_ids"]), "question_attention_mask": torch.tensor(mask)}


def find_question(processor, text):
    return processor.find_question(text.replace("USER :", "USER:").replace("ASSISTANT :", "ASSISTANT:"))
