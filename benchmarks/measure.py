"""Times and memory: CUDA events around work that starts on an idle device, warm-up, medians; plain clocks on a CPU."""

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], repeats: int = 7, warm_up: int = 2) -> float:
    """Median time of one call, from the idle device to its last kernel, with the host's time where the device waits."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        synchronize()
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return median(times)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory in use during one call, above what was in use before it. 0 without a GPU."""
    if not torch.cuda.is_available():
        function()
        return 0
    release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Captured:
    """A function whose kernels are recorded once as a CUDA graph and replayed by each call; run plainly on a CPU.

    What it returns stays in place: each replay writes its results into the tensors of `result`.
    """

    def __init__(self, function: Callable[[], Any]):
        self.function, self.graph = function, None
        if not torch.cuda.is_available():
            self.result = function()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def __call__(self) -> Any:
        if self.graph is None:
            self.result = self.function()
        else:
            self.graph.replay()
        return self.result


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
