"""Features of several images come apart and together again, and nothing is shared by accident."""

import pytest
import torch

from recoverable_llava import VisionFeatures
from vllm_plugin.vision_features import join_images, num_bytes, split_images


NAMES = ("patches", "class_tokens", "visual_scores", "keys", "relevance_embeds")


@pytest.mark.parametrize("class_tokens", [False, True])
def test_images_part_and_join(class_tokens):
    batch = VisionFeatures(
        patches=torch.randn(3, 36, 8),
        class_tokens=torch.randn(3, 1, 8) if class_tokens else None,
        visual_scores=torch.randn(3, 36),
        keys=torch.randn(3, 36, 8),
        relevance_embeds=torch.randn(3, 36, 4),
        last_hidden_state=torch.randn(3, 37, 8),
    )
    parts = split_images(batch)
    joined = join_images(parts)
    for name in NAMES:
        whole, again = getattr(batch, name), getattr(joined, name)
        assert (whole is None and again is None) or torch.equal(whole, again)
    kept = [tensor for name in NAMES if (tensor := getattr(parts[0], name)) is not None]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)
    assert num_bytes(parts[0]) == sum(tensor.nbytes for tensor in kept)
    assert parts[0].last_hidden_state is None
