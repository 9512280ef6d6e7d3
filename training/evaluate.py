"""The checkpoint's figures on held-out questions, through the stock classes and the library's own pipeline.

Accuracy per kind of question (one question per image, greedy, all visual tokens), retrieval of captions by the CLIP
half in batches of 256, and the time of one answer on the CPU.
"""

import json
import math
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor, pipeline
from transformers.pipelines.image_text_to_text import ReturnType

from .examples import SceneExample, scene_examples
from .questions import KINDS, scene_facts

RETRIEVAL_BATCH = 256


def _message(example: SceneExample) -> list[dict]:
    content = [{"type": "image", "image": example.image()}, {"type": "text", "text": example.question}]
    return [{"role": "user", "content": content}]


def _block(split: str, kind: str, first: int, count: int) -> list[tuple[list[dict], str]]:
    torch.set_num_threads(1)
    chosen = islice(scene_examples(split, first + count, (kind,)), first, first + count)
    return [(_message(example), example.answer) for example in chosen]


def interval(share: float, number: int) -> float:
    """Half width of the 95 % confidence interval of a share."""
    return 1.96 * math.sqrt(max(share * (1 - share), 1e-9) / number)


def answer_accuracy(
    folder: str, split: str, count: int, kinds: Iterable[str] = KINDS, device: str = "cpu", batch_size: int = 16, workers: int = 0
) -> dict[str, dict[str, float]]:
    """Share of exactly right answers of `pipeline("image-text-to-text")` for each kind on `count` questions of a split."""
    answering = pipeline(
        "image-text-to-text",
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"),
        processor=AutoProcessor.from_pretrained(folder),
        device=device,
    )
    block = 250
    result = {}
    pool = ProcessPoolExecutor(workers) if workers else None
    jobs = {
        (kind, first): (split, kind, first, min(block, count - first)) for kind in kinds for first in range(0, count, block)
    }
    pending = {key: pool.submit(_block, *job) for key, job in jobs.items()} if pool else {}
    for kind in kinds:
        right = 0
        for first in tqdm(range(0, count, block), desc=f"{split} {kind}"):
            examples = pending.pop((kind, first)).result() if pool else _block(*jobs[kind, first])
            answers = answering(
                [message for message, _ in examples],
                batch_size=batch_size,
                return_type=ReturnType.NEW_TEXT,
                generate_kwargs={"max_new_tokens": 6, "do_sample": False},
            )
            for (_, expected), answer in zip(examples, answers, strict=True):
                answer = answer[0] if isinstance(answer, list) else answer
                right += answer["generated_text"].strip() == expected
        result[kind] = {"accuracy": round(right / count, 4), "plus_minus": round(interval(right / count, count), 4)}
    if pool:
        pool.shutdown()
    return result


def retrieval(folder: str, split: str, batches: int, device: str = "cpu") -> float:
    """Share of captions whose best image, among 256 of the split, is one that the caption fits."""
    clip = CLIPModel.from_pretrained(folder, dtype="auto").to(device)
    processor = CLIPProcessor.from_pretrained(folder)
    examples = scene_examples(split, batches * RETRIEVAL_BATCH, ("existence",))
    right = 0
    for _ in tqdm(range(batches), desc="retrieval"):
        batch = list(islice(examples, RETRIEVAL_BATCH))
        inputs = processor(
            text=[example.caption for example in batch],
            images=[example.image() for example in batch],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        with torch.no_grad():
            best = clip(**inputs).logits_per_text.argmax(1).tolist()
        for example, chosen in zip(batch, best, strict=True):
            right += example.caption_facts <= scene_facts(batch[chosen].scene)
    return round(right / (batches * RETRIEVAL_BATCH), 4)


def answer_seconds(folder: str, repeats: int = 5) -> float:
    """Median seconds of one answer through the pipeline on this machine's CPU."""
    answering = pipeline("image-text-to-text", model=folder, device="cpu")
    message = _message(next(scene_examples("test", 1)))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        answering(message, generate_kwargs={"max_new_tokens": 6, "do_sample": False}, return_full_text=False)
        times.append(time.perf_counter() - began)
    return round(sorted(times[1:])[repeats // 2], 3)


def evaluate(
    llava: str, clip: str, output: str, count: int = 2000, device: str = "cpu", batch_size: int = 16, workers: int = 0
) -> dict:
    """All figures of the checkpoint, written to `output` as JSON."""
    result = {
        "questions_per_kind": count,
        "test": answer_accuracy(llava, "test", count, device=device, batch_size=batch_size, workers=workers),
        "combination": answer_accuracy(
            llava, "combination", max(count // 4, 1), device=device, batch_size=batch_size, workers=workers
        ),
        "retrieval_top1": retrieval(clip, "test", max(count // RETRIEVAL_BATCH // 2, 1), device),
    }
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
    return result
