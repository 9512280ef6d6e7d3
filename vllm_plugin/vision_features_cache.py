"""Vision features by image, bounded in bytes.

The question belongs to the identity of an image in vLLM's caches, as it decides which tokens stay. What the vision
tower says does not depend on it, so many questions about one image need one pass of the tower. That is kept here.
"""

from collections import OrderedDict
from dataclasses import fields, replace

import torch

from recoverable_llava import VisionFeatures


class VisionFeaturesCache:
    """The features of the images used last, up to `max_bytes` of tensors in all.

    Raises:
        ValueError: if `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes!r}.")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._features: OrderedDict[bytes, VisionFeatures] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, image: bytes) -> VisionFeatures | None:
        """The features of one image, by the digest of its pixels."""
        features = self._features.get(image)
        if features is not None:
            self._features.move_to_end(image)
        return features

    def put(self, image: bytes, features: VisionFeatures) -> None:
        """Keep the features of one image; the images that were not asked about for longest make room."""
        size = num_bytes(features)
        if size > self.max_bytes or image in self._features:
            return
        self._features[image] = features
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= num_bytes(dropped)

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0


def _tensors(features: VisionFeatures) -> dict[str, torch.Tensor | None]:
    return {field.name: getattr(features, field.name) for field in fields(features)}


def num_bytes(features: VisionFeatures) -> int:
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
