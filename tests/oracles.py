"""What tests watch tensors with: the largest one made, and every read that makes the host wait for a device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for output in torch.utils._pytree.tree_leaves(result):
            if isinstance(output, torch.Tensor):
                self.num_elements = max(self.num_elements, output.numel())
        return result
