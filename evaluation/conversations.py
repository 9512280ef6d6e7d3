"""A second question on the cache of the first one:

    python -m evaluation.conversations --model checkpoints/tiny --split test --budget 58

A returned cache holds the tokens that the *first* question chose. The second question here is about another object, so
this is where compression guided by the question can hurt: the table shows each method's second answers on the returned
cache beside those with the full history, which is compressed anew for the second question.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging

from evaluation.compared_model import load_compared
from evaluation.examples import SECOND_TURN, Example, is_correct, load_examples
from evaluation.methods import METHODS, find_methods
from evaluation.runner import Batches, PreparedBatch, Run, constant_ids, conversation, plan_runs
from evaluation.statistics import wilson
from recoverable_llava.transformers_names import CACHE, cache_of


@torch.no_grad()
def answer_on_returned_cache(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    example: Example,
    runs: list[Run],
    max_new_tokens: int = 8,
) -> list[tuple[str, str]]:
    """Of each run, the second answer on the cache that the first answer returned, and on the full history anew.

    Raises:
        ValueError: if the example is not the second turn of a conversation.
    """
    if len(example.history) != 1:
        raise ValueError(f"example.history must hold one turn, got {len(example.history)}: pass a second turn.")
    constant = constant_ids(processor)
    opening = Example(example.image, example.history[0][0], "", example.kind, wrong_question=example.wrong_question)
    first = PreparedBatch(model, Batches(processor, images, [opening], 1)[0], constant)
    answers = []
    for run in runs:
        outputs = first.generate(run, max_new_tokens=max_new_tokens, return_dict_in_generate=True)
        reply = processor.decode(outputs.sequences[0, first.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        history = ((opening.question, reply.strip()),)
        second = Example(example.image, example.question, "", example.kind, history, None, example.wrong_question)

        sequences = torch.cat([outputs.sequences, _what_follows(outputs.sequences, second, processor)], dim=1)
        continued = model.generate(
            input_ids=sequences,
            attention_mask=torch.ones_like(sequences),
            **{CACHE: cache_of(outputs)},
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
        on_cache = processor.decode(continued[0, sequences.shape[1] :], skip_special_tokens=True).strip()
        anew = PreparedBatch(model, Batches(processor, images, [second], 1)[0], constant)
        anew.inputs |= {"input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
        answers.append((on_cache, anew.answer(run, processor, max_new_tokens)[0][0]))
    return answers


def _what_follows(sequences: torch.Tensor, second: Example, processor: Any) -> torch.Tensor:
    """[1, S] ids of what the chat template writes behind the first reply, up to the second one."""
    messages = conversation(second)
    opening = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    behind = processor.apply_chat_template(messages, add_generation_prompt=True)[len(opening) :]
    reply = second.history[0][1]
    behind = behind[behind.index(reply) + len(reply) :].removeprefix(processor.tokenizer.eos_token)
    ids = processor.tokenizer(behind, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if sequences[0, -1] != processor.tokenizer.eos_token_id:
        ids = torch.cat([ids.new_full((1, 1), processor.tokenizer.eos_token_id), ids], dim=1)
    return ids.to(sequences.device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.conversations", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or repo id of a recoverable-llava checkpoint")
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--split", default="validation", choices=("validation", "test", "combination"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=["ours", "paper", "class attention", "CDPruner", "Cen-Prune"])
    parser.add_argument("--budget", type=int, default=58)
    parser.add_argument("--output", type=Path, default=Path("evaluation/results/conversations.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"))
    options = parser.parse_args(arguments)

    logging.set_verbosity_error()
    images, examples = load_examples(options.data, options.split, options.images)
    examples = [example for example in examples if example.kind == SECOND_TURN]
    if not examples:
        raise ValueError(f"data={options.data!r} holds no question of kind {SECOND_TURN!r} with a history.")
    runs = plan_runs(find_methods([name for name in options.methods if name in METHODS]), [options.budget])
    model, processor = load_compared(options.model, options.dtype)
    model = model.to(options.device)
    correct = np.zeros((len(runs), 2), dtype=int)
    for example in tqdm(examples, desc="conversations"):
        for number, answers in enumerate(answer_on_returned_cache(model, processor, images, example, runs)):
            correct[number] += [is_correct(answer, example.answer) for answer in answers]

    print("| method | tokens | on the returned cache | on the full history |", "| --- | --- | --- | --- |", sep="\n")
    rows = []
    for run, counts in zip(runs, correct, strict=True):
        shares = [wilson(int(count), len(examples)) for count in counts]
        rows.append({"method": run.name, "budget": run.budget, "cache": vars(shares[0]), "history": vars(shares[1])})
        cells = [f"{100 * part.value:.1f} [{100 * part.low:.1f}, {100 * part.high:.1f}]" for part in shares]
        print(f"| {run.name} | {run.budget or 'all'} | {cells[0]} | {cells[1]} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"conversations": len(examples), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
