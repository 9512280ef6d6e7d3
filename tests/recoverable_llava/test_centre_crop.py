"""Long pictures: what stock sees, without what stock takes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor

from recoverable_llava.centre_crop import LONG, _resized_middle, resize_what_is_seen


EXACT = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
PROMPT = "USER: <image>\nwhat is it? ASSISTANT:"


def clip_processor(short_edge=84, crop=(84, 84), **options):
    crop_size = {"height": crop[0], "width": crop[1]}
    return CLIPImageProcessor(size={"shortest_edge": short_edge}, crop_size=crop_size, **options)


def noise(width, height, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.integers(1, 90),
    st.floats(LONG, 40),
    st.booleans(),
    st.sampled_from([(84, (84, 84)), (336, (336, 336)), (84, (60, 61)), (83, (83, 84)), (84, (99, 99))]),
    st.sampled_from([3, 3, 2, 1]),
    st.sampled_from(["RGB", "L", "P"]),
    st.integers(0, 2**32 - 1),
)
def test_sees_what_stock_sees(short, ratio, is_wide, sizes, resample, mode, seed):
    """Noise is the hardest picture. Where stock's value lies between two whole numbers, ours may be the other one;
    where that happens in both directions of resizing, it adds up to two of 255.
    """
    long = int(short * ratio) + 1
    image = noise(*((long, short) if is_wide else (short, long)), seed).convert(mode)
    image_processor = clip_processor(*sizes, resample=resample)
    stock = image_processor(image, **EXACT).pixel_values.float()
    ours = image_processor(resize_what_is_seen(image, image_processor), **EXACT).pixel_values.float()
    difference = (stock - ours).abs()
    assert stock.shape == ours.shape
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 0.2 and (difference > 1).float().mean() <= 0.001


def test_it_is_used_and_cuts(processor, monkeypatch):
    """Through the processor, in a batch of both kinds: what stock gets is small, and the pictures stay untouched."""
    images = [noise(900, 20), noise(100, 80), noise(7, 300)]
    before, sizes = [image.tobytes() for image in images], []
    image_processor = type(processor.image_processor)
    resize = image_processor.resize
    monkeypatch.setattr(
        image_processor,
        "resize",
        lambda self, image, *a, **k: sizes.append(image.shape) or resize(self, image, *a, **k),
    )
    pixels = processor(images=images, text=[PROMPT] * 3, return_tensors="pt").pixel_values
    assert all(max(size[-2:]) <= 100 for size in sizes) and len(sizes) == 3
    expected = processor.image_processor(images, return_tensors="pt").pixel_values
    assert torch.allclose(pixels, expected, atol=2 / 255 / 0.26)
    assert torch.equal(pixels[1], expected[1])
    assert [image.tobytes() for image in images] == before


def test_memory_is_that_of_any_picture(repo_folder):
    """12,000 x 1 pixels, which stock enlarges to 13 GiB for this tower of CLIP ViT-L/14-336's size."""
    script = f"""
import resource
from PIL import Image
from recoverable_llava import RecoverableLlavaProcessor
processor = RecoverableLlavaProcessor.from_pretrained({repo_folder!r})
sizes = {{"size": {{"shortest_edge": 336}}, "crop_size": {{"height": 336, "width": 336}}}}
call = lambda *size: processor(images=Image.new("RGB", size), text={PROMPT!r}, **sizes)
call(336, 336)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(12_000, 1), call(1, 12_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 100  # MiB


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_convert_rgb": False},
        {"size": {"height": 84, "width": 84}},
        {"size": {"shortest_edge": 84, "longest_edge": 200}},
        {"size": 84},
        {"resample": 0},
    ],
    ids=str,
)
def test_other_settings_are_stocks(settings):
    image_processor, image = clip_processor(), noise(900, 20)
    assert resize_what_is_seen([[image]], image_processor, **settings) == [[image]]


def test_other_images_are_stocks():
    image_processor = clip_processor()
    array, transparent, square = np.zeros((3, 5, 900), np.uint8), noise(900, 20).convert("RGBA"), noise(90, 90)
    for image in (array, torch.from_numpy(array), transparent, square, noise(10 * LONG, 10)):
        assert resize_what_is_seen(image, image_processor) is image


def test_the_filter_of_torchvision_agrees():
    """The image processor resizes with torch where torchvision is installed: the same to two of 255, too."""
    for short, long in [(1, 40), (7, 200), (100, 1500), (400, 4500)]:
        image = noise(long, short)
        tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        whole = (336, int(336 * long / short))
        stock = torch.nn.functional.interpolate(tensor, whole, mode="bicubic", antialias=True)
        middle = torch.from_numpy(np.asarray(_resized_middle(image, 336, 336, 3)).copy()).permute(2, 0, 1)[None]
        starts = [int((each.shape[-1] - 336) / 2) for each in (stock, middle)]
        cropped = [each[..., start : start + 336].int() for each, start in zip((stock, middle), starts)]
        difference = (cropped[0] - cropped[1]).abs()
        assert difference.max() <= 2 and (difference > 0).float().mean() < 0.02
