"""The checkpoint's figures on held-out questions, through the stock classes and the library's own pipeline.

Accuracy per kind of question (one question per image, greedy, all visual tokens), retrieval of captions by the CLIP
half in batches of 256, and the time of one answer on the CPU.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor, pipeline

from .examples import SceneExample, scene_examples, tiled_examples
from .questions import KINDS, scene_facts
from .scenes import IMAGE_SIZE


RETRIEVAL_BATCH = 256
BLOCK = 150  # questions of one job
PARTS = ("test", "retrieval_top1", "combination", "seconds_per_answer_cpu")
THREADS = 1  # of one job: drawing a scene does not gain from more


def _sees_tiles(folder: str) -> bool:
    """Whether the LLaVA in `folder` is a LLaVA-NeXT, which is asked about larger pictures."""
    return AutoConfig.from_pretrained(folder).model_type == "llava_next"


def _examples(tiled: bool) -> Callable[..., Iterator[SceneExample]]:
    return tiled_examples if tiled else scene_examples


def _message(example: SceneExample) -> list[dict]:
    content = [{"type": "image", "image": example.image()}, {"type": "text", "text": example.question}]
    return [{"role": "user", "content": content}]


def interval(share: float, number: int) -> float:
    """Half width of the 95 % (Wilson) confidence interval of a share, wide enough also when every answer is right."""
    return 1.96 / (1 + 1.96**2 / number) * math.sqrt(share * (1 - share) / number + (1.96 / (2 * number)) ** 2)


def _right_answers(folder: str, split: str, kind: str, first: int, count: int, device: str, batch_size: int) -> int:
    """How many of the questions `first` to `first + count` of one kind the pipeline answers exactly right."""
    torch.set_num_threads(THREADS)
    tiled = _sees_tiles(folder)
    answering = pipeline(
        "image-text-to-text",
        model=AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"),
        processor=AutoProcessor.from_pretrained(folder),
        device=device,
    )
    examples = list(islice(_examples(tiled)(split, first + count, (kind,)), first, first + count))
    answers = answering(
        [_message(example) for example in examples],
        batch_size=1 if tiled else batch_size,  # stock's pipeline cannot batch pictures of different numbers of tiles
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 6, "do_sample": False},
    )
    texts = [(answer[0] if isinstance(answer, list) else answer)["generated_text"].strip() for answer in answers]
    return sum(text == example.answer for text, example in zip(texts, examples, strict=True))


def answer_accuracy(
    folder: str,
    split: str,
    count: int,
    kinds: Iterable[str] = KINDS,
    devices: Sequence[str] = ("cpu",),
    batch_size: int = 16,
    workers: int = 0,
) -> dict[str, dict[str, float]]:
    """Share of exactly right answers of `pipeline("image-text-to-text")` for each kind on `count` questions of a split.

    Args:
        workers: processes that share the work, in turn over `devices`; 0 works in this one.
    """
    kinds = tuple(kinds)
    jobs = [(kind, first, min(BLOCK, count - first)) for kind in kinds for first in range(0, count, BLOCK)]
    calls = [(folder, split, *job, devices[index % len(devices)], batch_size) for index, job in enumerate(jobs)]
    bar = tqdm(total=len(jobs), desc=split)
    if workers:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            futures = [pool.submit(_right_answers, *call) for call in calls]
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            right = [future.result() for future in futures]
    else:
        right = []
        for call in calls:
            right.append(_right_answers(*call))
            bar.update()
    bar.close()
    result = {}
    for kind in kinds:
        share = sum(number for number, job in zip(right, jobs, strict=True) if job[0] == kind) / count
        result[kind] = {
            "accuracy": round(share, 4),
            "plus_minus": round(interval(share, count), 4),
            "questions": count,
        }
    return result


def retrieval(folder: str, split: str, batches: int, device: str = "cpu", tiled: bool = False) -> float:
    """Share of captions whose best image, among 256 of the split, is one that the caption fits.

    Args:
        tiled: of the larger pictures; they are seen whole, in the base view.
    """
    clip = CLIPModel.from_pretrained(folder, dtype="auto").to(device)
    processor = CLIPProcessor.from_pretrained(folder)
    examples = _examples(tiled)(split, batches * RETRIEVAL_BATCH, ("existence",))
    view = (IMAGE_SIZE, IMAGE_SIZE)
    right = 0
    for _ in tqdm(range(batches), desc="retrieval"):
        batch = list(islice(examples, RETRIEVAL_BATCH))
        inputs = processor(
            text=[example.caption for example in batch],
            images=[example.image().resize(view, Image.Resampling.BICUBIC) for example in batch],
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
    answering = pipeline("image-text-to-text", model=folder, device="cpu", dtype="auto")
    message = _message(next(_examples(_sees_tiles(folder))("test", 1)))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        answering(message, generate_kwargs={"max_new_tokens": 6, "do_sample": False}, return_full_text=False)
        times.append(time.perf_counter() - began)
    return round(sorted(times[1:])[repeats // 2], 3)


def evaluate(
    llava: str,
    clip: str,
    output: str,
    count: int = 2000,
    devices: str = "cpu",
    batch_size: int = 16,
    workers: int = 0,
    parts: Sequence[str] = PARTS,
) -> dict:
    """The figures of the checkpoint, written to `output` as JSON; `devices` are separated by commas.

    Args:
        parts: what to measure, of `PARTS`; the others stay in the file as they are.
    """
    names = devices.split(",")
    settings = {"devices": names, "batch_size": batch_size, "workers": workers}
    batches = max(count // RETRIEVAL_BATCH // 2, 1)
    file = Path(output)
    result: dict = json.loads(file.read_text()) if file.exists() and set(parts) != set(PARTS) else {}

    measures = {
        "test": lambda: answer_accuracy(llava, "test", count, **settings),
        "retrieval_top1": lambda: retrieval(clip, "test", batches, names[0], _sees_tiles(llava)),
        "combination": lambda: answer_accuracy(llava, "combination", max(count // 4, 1), **settings),
        "seconds_per_answer_cpu": lambda: answer_seconds(llava),
    }
    for name in parts:
        result[name] = measures[name]()
        if name == "retrieval_top1":
            result["retrieval_captions"] = batches * RETRIEVAL_BATCH
        file.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept if the rest fails
    return result
