"""Serving with vLLM, compressed against uncompressed: starts each server, drives it with vLLM's own benchmark client.

    python -m benchmarks.serving REPO                                   # against the same repo, compression off
    python -m benchmarks.serving REPO --stock llava-hf/llava-1.5-7b-hf  # against stock LLaVA in vLLM's own class
    python -m benchmarks.serving checkpoints/tiny --config vllm_plugin/cpu_server.yaml   # here, for its correctness

Two loads: as many images as requests, and few images with many questions each. Needs vLLM (extra `vllm`) and no network
beyond 127.0.0.1. Prints a table and writes it as JSON with --report.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from training.examples import scene_examples


# The server is on this machine, whatever proxy the environment names.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
STARTUP_SECONDS = 1800  # to download and load a large model


class Server:
    """A vLLM server on 127.0.0.1, in processes of its own, until `stop`.

    Args:
        log: file for what it prints.
        arguments: as `vllm serve` takes them.

    Raises:
        RuntimeError: with the end of the log, if it does not start.
    """

    def __init__(self, log: Path, arguments: list[str], **environment: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self.log = f"http://127.0.0.1:{port}", log
        # What `vllm serve` runs; that command itself crashes in the CPU build 0.32.0.
        command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *arguments]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server did not start:\n{self.log.read_text()[-5000:]}")
            try:
                self.read("/health")
                return
            except OSError:
                time.sleep(0.5)

    def read(self, path: str) -> str:
        """What the server answers to a GET request.

        Raises:
            OSError: if it does not answer, or with an error.
        """
        return _direct.open(f"{self.address}{path}", timeout=30).read().decode()

    def cpu_seconds(self) -> float:
        """CPU time of the server's processes so far."""
        root = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in [root, *root.children(recursive=True)]]
        return sum(each.user + each.system for each in times)

    def metric(self, name: str) -> float:
        """The sum over engines of one of the numbers under /metrics."""
        return sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", self.read("/metrics"), re.MULTILINE)))

    def kv_blocks(self) -> int:
        """Blocks of the cache of keys and values, of the first engine."""
        return int(re.findall(r'num_gpu_blocks="(\d+)"', self.read("/metrics"))[0])

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def peak_kv_usage(server: Server) -> Iterator[list[float]]:
    """A list whose one entry becomes the largest share of the blocks that was in use meanwhile."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], server.metric("vllm:kv_cache_usage_perc"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def write_requests(folder: Path, num_images: int, questions_per_image: int) -> Path:
    """Scenes and questions about them, in the format of vLLM's client; always the same."""
    examples = list(scene_examples("test", num_images))
    path = folder / f"{num_images}_images.jsonl"
    with path.open("w") as lines:
        for index, example in enumerate(tqdm(examples, desc="images", leave=False)):
            picture = folder / f"{num_images}_{index}.png"
            example.image().save(picture)
            for offset in range(questions_per_image):
                question = examples[(index + offset) % num_images].question
                prompt = question if offset < num_images else f"{question} ({offset})"
                lines.write(json.dumps({"prompt": prompt, "image_files": [str(picture)]}) + "\n")
    return path


def run_client(server: Server, requests: Path, num_requests: int, settings: argparse.Namespace) -> dict[str, Any]:
    """What vLLM's benchmark client measured over all requests."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()  # the client reads the tokenizer of the repo
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    model = json.loads(server.read("/v1/models"))["data"][0]
    arguments = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.address]
    arguments += ["--model", model["id"], "--tokenizer", model["root"]]
    arguments += ["--dataset-name", "custom_image", "--dataset-path", str(requests), "--custom-ensure-client-side-data"]
    arguments += ["--num-prompts", str(num_requests), "--max-concurrency", str(settings.concurrency)]
    arguments += ["--custom-output-len", str(settings.output_tokens), "--ignore-eos", "--temperature", "0"]
    result = main(parser.parse_args(arguments))
    if result["completed"] != num_requests:
        raise RuntimeError(f"{num_requests - result['completed']} of {num_requests} requests failed: {server.log}")
    return result


def measure(repo: str, more: list[str], settings: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """One row of measurements for each load."""
    arguments = ["--model", repo, *(["--config", settings.config] if settings.config else []), *more]
    server = Server(folder / "server.log", arguments, VLLM_LOGGING_LEVEL="WARNING")
    rows = []
    try:
        run_client(server, write_requests(folder, 4, 1), 4, settings)  # what is compiled or loaded at first use
        for num_images, questions in settings.loads:
            before = server.cpu_seconds()
            requests = write_requests(folder, num_images, questions)
            with peak_kv_usage(server) as peak:
                result = run_client(server, requests, num_images * questions, settings)
            rows.append(
                {
                    "requests a second": result["request_throughput"],
                    "mean time to first token, ms": result["mean_ttft_ms"],
                    "output tokens a second": result["output_throughput"],
                    "KV blocks in use at most": peak[0] * server.kv_blocks(),
                    "CPU seconds of the server": server.cpu_seconds() - before,
                }
            )
    finally:
        server.stop()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="folder or Hub repo with compression")
    parser.add_argument("--stock", help="what to compare with; by default the same repo with compression off")
    parser.add_argument("--budget", type=int, help="visual tokens; by default the repo's, or 64")
    parser.add_argument("--requests", type=int, default=200, help="in each load")
    parser.add_argument("--few", type=int, default=4, help="images of the load with few images")
    parser.add_argument("--concurrency", type=int, default=16, help="requests under way at once")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--config", help="YAML file of server flags, for both")
    parser.add_argument("--report", type=Path, help="file to write the numbers to, as JSON")
    settings = parser.parse_args()
    if settings.requests % settings.few:
        parser.error(f"--requests {settings.requests} must be a multiple of --few {settings.few}.")
    settings.loads = [(settings.requests, 1), (settings.few, settings.requests // settings.few)]

    budget = [] if settings.budget is None else ["--hf-overrides", json.dumps({"visual_token_budget": settings.budget})]
    off = [] if settings.stock else ["--hf-overrides", json.dumps({"compress": False})]
    runs = {"stock": (settings.stock or settings.repo, off), "compressed": (settings.repo, budget)}
    measured = {}
    for name, (repo, more) in tqdm(runs.items(), desc="servers"):
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = measure(repo, more, settings, Path(folder))

    for index, (num_images, questions) in enumerate(settings.loads):
        print(f"\n{num_images} images, {questions} questions about each")
        print(f"{'':30}{'stock':>12}{'compressed':>12}{'ratio':>8}")
        for quantity, stock in measured["stock"][index].items():
            ours = measured["compressed"][index][quantity]
            ratio = f"{ours / stock:8.2f}" if stock else f"{'':>8}"
            print(f"{quantity:30}{stock:12.2f}{ours:12.2f}{ratio}")
    if settings.report:
        settings.report.write_text(json.dumps({"settings": vars(settings) | {"report": None}, **measured}, indent=1))


if __name__ == "__main__":
    main()
