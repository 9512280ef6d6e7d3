"""What the vision tower said about images, part by part: so that it can be kept by image and used in any batch.

The question belongs to the identity of an image in vLLM's caches, as it decides which tokens stay. What the vision
tower says does not depend on it, so many questions about one image need one pass of the tower.
"""

from dataclasses import fields, replace

import torch

from recoverable_llava import VisionFeatures


def _tensors(features: VisionFeatures) -> dict[str, torch.Tensor | None]:
    return {field.name: getattr(features, field.name) for field in fields(features)}


def num_bytes(features: VisionFeatures) -> int:
    """The memory of all tensors."""
    return sum(tensor.nbytes for tensor in _tensors(features).values() if tensor is not None)


def split_images(features: VisionFeatures) -> list[VisionFeatures]:
    """The features of each image, in storage of their own: a slice would keep the whole batch alive.

    Without the tower's last state, which is for callers of stock LLaVA alone.
    """
    features = replace(features, last_hidden_state=None)
    return [
        VisionFeatures(
            **{
                name: None if tensor is None else tensor[index : index + 1].clone()
                for name, tensor in _tensors(features).items()
            }
        )
        for index in range(len(features.patches))
    ]


def join_images(features: list[VisionFeatures]) -> VisionFeatures:
    """One batch of the features of several images."""
    columns = {name: [_tensors(image)[name] for image in features] for name in _tensors(features[0])}
    return VisionFeatures(
        **{
            name: None if column[0] is None else torch.cat([tensor for tensor in column if tensor is not None])
            for name, column in columns.items()
        }
    )
