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


class HostReads(TorchDispatchMode):
    """Records every operation whose result the host must wait for: values, and shapes that depend on values.

    On the CPU such a read costs nothing and goes unnoticed; on a GPU it empties the queue. `tolist` and `numpy` do not
    pass through the dispatcher there, so they are watched where they are called.
    """

    READS = {
        "_local_scalar_dense",
        "equal",
        "nonzero",
        "masked_select",
        "repeat_interleave",
        "_unique2",
        "unique_consecutive",
        "unique_dim",
        "histc",
        "bincount",
    }
    METHODS = ("tolist", "numpy", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in self.READS and not (name == "repeat_interleave" and "int" in function._overloadname):
            self.names.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.names.append(f"{name} by a mask")
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "HostReads":
        self.originals = {name: getattr(torch.Tensor, name) for name in self.METHODS}

        def watched(name: str) -> Any:
            def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.names.append(name)
                return self.originals[name](tensor, *args, **kwargs)

            return method

        for name in self.METHODS:
            setattr(torch.Tensor, name, watched(name))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)
        super().__exit__(*exception)
