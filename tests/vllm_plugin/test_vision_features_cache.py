"""What was used last stays, within a limit in bytes, and nothing is shared by accident."""

import pytest
import torch

from recoverable_llava import VisionFeatures
from vllm_plugin.vision_features_cache import VisionFeaturesCache, join_images, num_bytes, split_images


def features(num_images, class_tokens=False):
    tokens = torch.randn(num_images, 1, 8) if class_tokens else None
    return VisionFeatures(
        patches=torch.randn(num_images, 36, 8),
        class_tokens=tokens,
        visual_scores=torch.randn(num_images, 36),
        keys=torch.randn(num_images, 36, 8),
        relevance_embeds=torch.randn(num_images, 36, 4),
    )


SIZE = num_bytes(features(1))


def test_the_image_used_longest_ago_makes_room():
    cache = VisionFeaturesCache(2 * SIZE)
    one, two, three = split_images(features(3))
    cache.put(b"one", one)
    cache.put(b"two", two)
    assert cache.get(b"one") is one
    cache.put(b"three", three)
    assert (cache.get(b"one"), cache.get(b"two"), cache.get(b"three")) == (one, None, three)
    assert cache.num_bytes == 2 * SIZE and len(cache) == 2


def test_what_is_too_large_or_known_changes_nothing():
    cache = VisionFeaturesCache(SIZE)
    one, other = split_images(features(2))
    cache.put(b"one", one)
    cache.put(b"one", other)
    cache.put(b"large", features(2))
    assert cache.get(b"one") is one and cache.num_bytes == SIZE


def test_no_room_at_all():
    cache = VisionFeaturesCache(0)
    cache.put(b"one", features(1))
    assert cache.get(b"one") is None and cache.num_bytes == 0
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        VisionFeaturesCache(-1)


@pytest.mark.parametrize("class_tokens", [False, True])
def test_images_part_and_join(class_tokens):
    batch = features(3, class_tokens)
    parts = split_images(batch)
    joined = join_images(parts)
    for name in ("patches", "class_tokens", "visual_scores", "keys", "relevance_embeds"):
        whole, again = getattr(batch, name), getattr(joined, name)
        assert (whole is None and again is None) or torch.equal(whole, again)
        part = getattr(parts[0], name)
        assert part is None or part.untyped_storage().nbytes() == part.nbytes
