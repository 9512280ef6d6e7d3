"""Batches of prompts and pictures for a tiny model, the rows they are made of, and the answers to them."""

import pytest
import tiny
import torch


# For a test, or a file of them: it runs once with each family's `model`, `processor`, `stock` and repos.
both_families = pytest.mark.parametrize("family", list(tiny.FAMILIES), indirect=True)
GREEDY = {"do_sample": False, "max_new_tokens": 6}
PROMPTS = [
    "USER: <image>\nwhat is the colour of the cat ? ASSISTANT:",
    "USER: <image>\nhow many dog are there in this picture please tell me ? ASSISTANT:",
    "USER: <image>\nwhy ? ASSISTANT:",
]


def batch_of(processor, pictures, prompts=None, **kwargs):
    prompts = PROMPTS if prompts is None else prompts
    images, picture = [], iter(pictures * 3)
    for prompt in prompts:
        images.append([next(picture) for _ in range(prompt.count("<image>"))])
    if not any(images):
        images = None
    return processor(images=images, text=prompts, padding=True, return_tensors="pt", **kwargs)


def answers(model, inputs, **settings):
    """The new tokens alone."""
    sequences = model.generate(**inputs, **{**GREEDY, **settings})
    if not isinstance(sequences, torch.Tensor):
        sequences = sequences.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


def row_of(processor, pictures, prompts, index):
    first = sum(prompt.count("<image>") for prompt in prompts[:index])
    images = (pictures * 3)[first : first + prompts[index].count("<image>")]
    return processor(images=[images] if images else None, text=[prompts[index]], return_tensors="pt")


def without_question(inputs):
    return {name: value for name, value in inputs.items() if "question" not in name}


def images_of(inputs, rows=slice(None)):
    """Of inputs with one image a row, what a model wants of the images: pixels, and the sizes where there are any."""
    return {name: inputs[name][rows] for name in ("pixel_values", "image_sizes") if name in inputs}


def joined(*several):
    """The images of several inputs as one."""
    return {name: torch.cat([images[name] for images in several]) for name in several[0]}
