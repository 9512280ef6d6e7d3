"""Asks every question of every method, the vision tower run once per batch of images for all of them.

B prompts, I images of a batch.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from evaluation.compared_model import CONSTANT_PROMPT, gather_evidence
from evaluation.evidence import Evidence
from evaluation.examples import Example, is_correct
from evaluation.methods import Method
from evaluation.peers import Greedy
from evaluation.report import ALL_TOKENS, Outcome
from recoverable_llava import VisionFeatures
from recoverable_llava.tools.settings import configured


# Fields of the configuration that change what is read off the vision tower.
TOWER_FIELDS = ("attention_layer", "text_relevance")
# Of questions, that a worker process prepares at once: large pictures take it a third of a second each.
PREPARED_AT_ONCE = 8


@dataclass(frozen=True)
class Run:
    """One method at one budget; None lets the method decide per image."""

    name: str
    method: Method
    budget: int | None

    def shares_picks(self, others: "Iterable[Run]") -> bool:
        """Whether a run with a larger budget has made its picks already, so that its time says nothing."""
        rule: Any = self.method.rule
        if not isinstance(rule.func if isinstance(rule, partial) else getattr(rule, "rule", rule), Greedy):
            return False
        return any(run.name == self.name and (run.budget or 0) > (self.budget or 0) for run in others)


def plan_runs(methods: dict[str, Method], budgets: list[int | None]) -> list[Run]:
    """Every method at every budget that it can run with."""
    runs = []
    for name, method in methods.items():
        wanted = [b for b in budgets if (method.is_adaptive if b is None else method.is_fixed)]
        runs += [Run(name, method, budget) for budget in ([None] if name == ALL_TOKENS else wanted)]
    return runs


class Batches(torch.utils.data.Dataset):
    """Examples as inputs of the model, a batch an item, so that worker processes can prepare them."""

    def __init__(self, processor: Any, images: Sequence[Image.Image], examples: list[Example], batch_size: int) -> None:
        self.processor, self.images, self.examples, self.batch_size = processor, images, examples, batch_size

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        if number >= len(self):
            raise IndexError(f"There are {len(self)} batches, got number {number}.")
        batch = self.examples[number * self.batch_size : (number + 1) * self.batch_size]
        prompts = [self.processor.apply_chat_template(conversation(e), add_generation_prompt=True) for e in batch]
        inputs = self.processor(
            images=[self.images[example.image] for example in batch],
            text=prompts,
            questions=[example.question for example in batch],
            padding=True,
            return_tensors="pt",
        )
        wrong = self.processor.question_tokenizer(
            [example.wrong_question for example in batch],
            padding="max_length",
            truncation=True,
            padding_side="right",
            return_tensors="pt",
        )
        # Each image once; which one belongs to which row.
        numbers = [example.image for example in batch]
        unique = list(dict.fromkeys(numbers))
        of_images = {
            name: inputs[name][[numbers.index(image) for image in unique]]
            for name in ("pixel_values", "image_sizes")
            if name in inputs
        }
        return {
            **inputs,
            **of_images,
            "row_of_question": torch.tensor([unique.index(image) for image in numbers]),
            "wrong_input_ids": wrong["input_ids"],
            "wrong_attention_mask": wrong["attention_mask"],
        }


def join(batches: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Several batches as one: prompts padded on the left to the longest, rows of questions counted on."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": pad_token_id, "attention_mask": 0}
    joined: dict[str, list[torch.Tensor]] = {name: [] for name in batches[0]}
    num_images = 0
    for batch in batches:
        for name, value in batch.items():
            if name in fill:
                value = torch.nn.functional.pad(value, (longest - value.shape[1], 0), value=fill[name])
            joined[name].append(value + num_images if name == "row_of_question" else value)
        num_images += len(batch["pixel_values"])
    return {name: torch.cat(values) for name, values in joined.items()}


def conversation(example: Example) -> list[dict[str, Any]]:
    """The chat of an example, the picture in its first turn."""
    questions = [*(question for question, _ in example.history), example.question]
    answers = [answer for _, answer in example.history]
    messages: list[dict[str, Any]] = []
    for turn, question in enumerate(questions):
        image = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        if turn < len(answers):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[turn]}]})
    return messages


@torch.no_grad()
def run_all(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    examples: list[Example],
    runs: list[Run],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 8,
    workers: int = 0,
    seconds: float | None = None,
) -> list[Outcome]:
    """Greedy answers of every run to every example; with `seconds`, to those whose batch began within them."""
    begin = time.perf_counter()
    batches = prepared_batches(processor, images, examples, batch_size, workers)
    constant = constant_ids(processor).to(model.device)
    answers: list[list[str]] = [[] for _ in runs]
    num_tokens: list[list[int]] = [[] for _ in runs]
    spent = [0.0 for _ in runs]
    progress = tqdm(total=-(-len(examples) // batch_size) * len(runs), desc="answers", unit="run")
    for inputs in batches:
        batch = PreparedBatch(model, inputs, constant)
        for number, run in enumerate(runs):
            texts, counts, of_batch = batch.answer(run, processor, max_new_tokens)
            answers[number] += texts
            num_tokens[number] += counts
            spent[number] += of_batch
            progress.update()
        if seconds is not None and time.perf_counter() - begin > seconds:
            break
    progress.close()
    asked = examples[: len(answers[0])]
    expected = next(answers[number] for number, run in enumerate(runs) if run.name == ALL_TOKENS)
    return [
        Outcome(
            method=run.name,
            budget=run.budget,
            correct=np.array([is_correct(text, e.answer) for text, e in zip(texts, asked, strict=True)]),
            agrees=np.array([text == full for text, full in zip(texts, expected, strict=True)]),
            num_tokens=np.array(counts, dtype=float),
            selector_milliseconds=None if run.shares_picks(runs) else 1000 * of_run / len(asked),
            answers=texts,
        )
        for run, texts, counts, of_run in zip(runs, answers, num_tokens, spent, strict=True)
    ]


def prepared_batches(
    processor: Any, images: Sequence[Image.Image], examples: list[Example], batch_size: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of `batch_size` examples at a time, which worker processes prepare in smaller pieces."""
    at_once = min(batch_size, PREPARED_AT_ONCE)
    pieces = iter(
        torch.utils.data.DataLoader(Batches(processor, images, examples, at_once), batch_size=None, num_workers=workers)
    )
    while batch := list(islice(pieces, -(-batch_size // at_once))):
        yield join(batch, processor.tokenizer.pad_token_id)


def constant_ids(processor: Any) -> torch.Tensor:
    """[1, T] the constant prompt for the text tower."""
    return processor.question_tokenizer(
        CONSTANT_PROMPT, padding="max_length", truncation=True, padding_side="right", return_tensors="pt"
    )["input_ids"]


class PreparedBatch:
    """One batch on the device, with what the towers say about it kept for all runs."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], constant: torch.Tensor) -> None:
        self.model, self.constant = model, constant
        self.inputs = {name: value.to(model.device) for name, value in inputs.items()}
        self._vision: dict[tuple, VisionFeatures] = {}
        self._evidence: dict[str, Evidence] = {}

    def answer(self, run: Run, processor: Any, max_new_tokens: int) -> tuple[list[str], list[int], float]:
        """Answers, tokens per image, and the seconds that choosing them took."""
        sequences = self.generate(run, max_new_tokens=max_new_tokens)
        new = sequences[:, self.inputs["input_ids"].shape[1] :]
        texts = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        return texts, self.model.model.num_tokens.tolist(), self.model.model.selector_seconds

    def generate(self, run: Run, **options: Any) -> Any:
        """Greedy generation under one run's choice of tokens; options go to the model's own `generate`."""
        base, method = self.model.model, run.method
        base.rule, base.budget, base.selector_seconds = method.rule, run.budget, 0.0
        base.evidence = None if method.rule is None else self.evidence(method.question)
        budget = {} if method.rule is not None else {"visual_token_budget": run.budget}
        with configured(self.model.config, **method.settings, **budget):
            return self.model.generate(
                input_ids=self.inputs["input_ids"],
                attention_mask=self.inputs["attention_mask"],
                vision_features=self.vision(),
                do_sample=False,
                **self.question(method.question),
                **options,
            )

    def question(self, which: str) -> dict[str, torch.Tensor]:
        source = "wrong" if which == "wrong" else "question"
        ids, mask = self.inputs[f"{source}_input_ids"], self.inputs[f"{source}_attention_mask"]
        return {
            "question_input_ids": ids,
            "question_attention_mask": torch.zeros_like(mask) if which == "none" else mask,
        }

    def vision(self) -> VisionFeatures:
        """What the model reads off the tower under its present configuration, a row per question."""
        key = tuple(getattr(self.model.config, name) for name in TOWER_FIELDS)
        if key not in self._vision:
            sizes = {"image_sizes": self.inputs["image_sizes"]} if "image_sizes" in self.inputs else {}
            self._vision[key] = self.model.get_vision_features(self.inputs["pixel_values"], **sizes)
        vision, rows = replace(self._vision[key], last_hidden_state=None), self.inputs["row_of_question"]
        each = {field.name: getattr(vision, field.name) for field in fields(vision)}
        of_questions = {name: value[rows] for name, value in each.items() if isinstance(value, torch.Tensor)}
        if vision.tiles is not None:
            of_questions["tiles"] = [vision.tiles[row] for row in rows.tolist()]
        return replace(vision, **of_questions)

    def evidence(self, which: str) -> Evidence:
        if which not in self._evidence:
            question = self.question(which)
            self._evidence[which] = gather_evidence(
                self.model.model,
                self.inputs["pixel_values"],
                question["question_input_ids"],
                question["question_attention_mask"],
                self.constant,
                self.inputs["row_of_question"],
                self.inputs.get("image_sizes"),
            )
        return self._evidence[which]
