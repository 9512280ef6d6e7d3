"""What is measured, most important first. Each step yields rows; a step that no longer fits the time is left out.

A row: shape, batch, method, mode ("eager", "captured" as one CUDA graph, "compiled" by torch.compile), quantity, value.
Quantities end in their unit: `_ms`, `_bytes`, `_per_s`, or none for counts.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StaticCache

from recoverable_llava.local_outlier_factor import local_outlier_factor
from recoverable_llava.modeling_recoverable_llava import VisionFeatures
from recoverable_llava.token_recovery import assemble_tokens, gather_tokens, select_tokens

from . import paper_release
from .measure import Captured, cache_bytes, milliseconds, peak_bytes, release
from .models import Models, Shape, draw_scores, make_inputs, without_question


Row = dict[str, Any]
NEW_TOKENS = 128
METHODS = ("stock", "adaptive", "fixed", "bound")


@dataclass
class Bench:
    """A built model and how to call each method on it."""

    shape: Shape
    models: Models
    device: torch.device
    dtype: torch.dtype
    budget: int
    repeats: int = 5

    def row(self, batch_size: int, method: str, mode: str, quantity: str, value: float) -> Row:
        return {
            "shape": self.shape.name,
            "batch": batch_size,
            "method": method,
            "mode": mode,
            "quantity": quantity,
            "value": value,
        }

    def prepare(self, method: str, batch_size: int) -> tuple[Any, dict[str, torch.Tensor]]:
        """The model of a method, set to it, and its inputs."""
        models = self.models
        if method in ("adaptive", "fixed"):
            models.ours.config.visual_token_budget = self.budget if method == "fixed" else None
            placeholders = self.budget if method == "fixed" else self.shape.num_patches
            return models.ours, make_inputs(self.shape, batch_size, placeholders, self.device, self.dtype)
        model = models.stock if method == "stock" else models.bound
        placeholders = self.shape.num_patches if method == "stock" else models.bound.model.num_tokens
        return model, without_question(make_inputs(self.shape, batch_size, placeholders, self.device, self.dtype))

    def first_token(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """From pixels and ids on the device to the first answer token, and the KV cache."""
        outputs = model(**inputs, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1].argmax(-1), outputs.past_key_values

    def prefill(self, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any = None) -> Any:
        language_model, head = self.models.stock.model.language_model, self.models.stock.lm_head
        outputs = language_model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True)
        return head(outputs.last_hidden_state[:, -1:]).argmax(-1), outputs.past_key_values

    def random_embeds(self, batch_size: int, length: int) -> torch.Tensor:
        return 0.02 * torch.randn(batch_size, length, self.shape.hidden_size, device=self.device, dtype=self.dtype)


@contextmanager
def unchecked() -> Iterator[None]:
    """Without transformers' check that placeholders match features, which waits for the device and cannot be captured."""
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    try:
        yield
    finally:
        del os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"]


# ------------------------------------------------------------------------------------------------------- the selector


def choose(
    vision: VisionFeatures, text_scores: torch.Tensor, has_question: torch.Tensor, budget: int | None, neighbors: int
) -> torch.Tensor:
    """The selector: from scores to gathered tokens, with one copy to the host if there is no budget."""
    selection = select_tokens(
        vision.visual_scores,
        text_scores,
        has_question,
        visual_lof_neighbors=neighbors,
        text_lof_neighbors=neighbors,
        visual_token_budget=budget,
    )
    if budget is None:
        longest, merged = torch.stack([selection.num_tokens.max(), selection.num_merged.max()]).tolist()
    else:
        longest = merged = budget
    assembly = assemble_tokens(
        selection,
        vision.visual_scores,
        vision.keys,
        text_scores,
        has_question,
        num_tokens=longest,
        num_merged=merged,
    )
    return gather_tokens(vision.patches, assembly)


def random_vision(bench: Bench, batch_size: int, num_patches: int) -> tuple[VisionFeatures, torch.Tensor, torch.Tensor]:
    visual, text = (scores.to(bench.device) for scores in draw_scores(batch_size, num_patches))
    patches = torch.randn(batch_size, num_patches, bench.shape.tower_width, device=bench.device, dtype=bench.dtype)
    keys = torch.randn_like(patches)
    vision = VisionFeatures(patches, None, visual, keys, relevance_embeds=visual[:, :, None])
    return vision, text, torch.ones(batch_size, dtype=torch.bool, device=bench.device)


def selector(bench: Bench, batch_sizes: tuple[int, ...]) -> Iterator[Row]:
    neighbors, repeats = bench.shape.lof_neighbors, 4 * bench.repeats
    for batch_size in batch_sizes:
        arguments = random_vision(bench, batch_size, bench.shape.num_patches)
        scores = arguments[0].visual_scores
        for method, budget in (("adaptive", None), ("fixed", bench.budget)):
            time = milliseconds(lambda: choose(*arguments, budget, neighbors), repeats)  # noqa: B023
            yield bench.row(batch_size, method, "eager", "selector_ms", time)
        captured = Captured(lambda: choose(*arguments, bench.budget, neighbors))  # noqa: B023
        yield bench.row(batch_size, "fixed", "captured", "selector_ms", milliseconds(captured, repeats))
        time = milliseconds(lambda: local_outlier_factor(scores, neighbors), repeats)  # noqa: B023
        yield bench.row(batch_size, "lof", "eager", "lof_ms", time)
        captured = Captured(lambda: local_outlier_factor(scores, neighbors))  # noqa: B023
        yield bench.row(batch_size, "lof", "captured", "lof_ms", milliseconds(captured, repeats))


def selector_growth(bench: Bench, batch_sizes: tuple[int, ...]) -> Iterator[Row]:
    """How the selector's cost grows with the number of patches, captured so that launches do not hide it."""
    for num_patches in (bench.shape.num_patches * factor for factor in (1, 4, 16)):
        for batch_size in batch_sizes:
            arguments = random_vision(bench, batch_size, num_patches)
            run = Captured(lambda: choose(*arguments, bench.budget, bench.shape.lof_neighbors))  # noqa: B023
            yield bench.row(batch_size, "fixed", "captured", f"selector_{num_patches}_patches_ms", milliseconds(run))
            del arguments, run
            release()


def released_step(bench: Bench) -> Iterator[Row]:
    """Our step and the paper's released one, batch 1, 60 kept patches and 20 centres in both."""
    vision, text, has_question = random_vision(bench, 1, bench.shape.num_patches)
    counts = (30, 30, 20) if bench.shape.num_patches >= 200 else (5, 5, 3)
    merge_neighbors = min(32, bench.shape.num_patches // 8)
    for quantity, given in (("released_step_ms", counts), ("released_step_own_counts_ms", None)):

        def released() -> torch.Tensor:
            return paper_release.recover(
                vision.visual_scores.to(bench.dtype),
                text.to(bench.dtype),
                vision.keys,
                vision.patches,
                given,  # noqa: B023
                merge_neighbors,
            )

        yield bench.row(1, "paper, as released", "eager", quantity, milliseconds(released, bench.repeats))
    num_tokens = sum(counts) + 1

    def ours() -> torch.Tensor:
        return choose(vision, text, has_question, num_tokens, bench.shape.lof_neighbors)

    yield bench.row(1, "fixed", "eager", "same_step_ms", milliseconds(ours, 2 * bench.repeats))
    yield bench.row(1, "fixed", "captured", "same_step_ms", milliseconds(Captured(ours), 2 * bench.repeats))


# ---------------------------------------------------------------------------------------------------------- the towers


def towers(bench: Bench, batch_sizes: tuple[int, ...]) -> Iterator[Row]:
    ours, stock = bench.models.ours.model, bench.models.stock
    for batch_size in batch_sizes:
        _, inputs = bench.prepare("adaptive", batch_size)
        pixels, questions = inputs["pixel_values"], inputs["question_input_ids"]
        layers = [bench.shape.tower_layers - 1]
        parts: dict[str, tuple[str, Callable[[], Any]]] = {
            "vision_tower_ms": ("stock", lambda: stock.model.vision_tower(pixels, output_hidden_states=layers)),  # noqa: B023
            "vision_features_ms": ("adaptive", lambda: ours.get_vision_features(pixels)),  # noqa: B023
            "question_tower_ms": ("adaptive", lambda: ours.get_question_embeds(questions)),  # noqa: B023
        }
        for quantity, (method, function) in parts.items():
            yield bench.row(batch_size, method, "eager", quantity, milliseconds(function, bench.repeats))
            run = Captured(function)
            yield bench.row(batch_size, method, "captured", quantity, milliseconds(run, bench.repeats))
            del run
            release()


# ---------------------------------------------------------------------------------------------------------- whole calls


def eager(bench: Bench, batch_sizes: tuple[int, ...], methods: tuple[str, ...] = METHODS) -> Iterator[Row]:
    """Time to first token, prefill alone, decode step, memory."""
    for batch_size in batch_sizes:
        for method in methods:
            model, inputs = bench.prepare(method, batch_size)
            time = milliseconds(lambda: bench.first_token(model, inputs), bench.repeats)  # noqa: B023
            yield bench.row(batch_size, method, "eager", "first_token_ms", time)
            peak = peak_bytes(lambda: bench.first_token(model, inputs))  # noqa: B023
            yield bench.row(batch_size, method, "eager", "first_token_peak_bytes", peak)
            mask = None
            if method == "adaptive":
                counts = model.recover_tokens(**inputs).selection.num_tokens
                yield bench.row(batch_size, method, "eager", "mean_visual_tokens", counts.float().mean().item())
                yield bench.row(batch_size, method, "eager", "most_visual_tokens", counts.max().item())
            _, cache = bench.first_token(model, inputs)
            length = cache.get_seq_length()
            yield bench.row(batch_size, method, "eager", "prompt_length", length)
            yield bench.row(batch_size, method, "eager", "cache_bytes", cache_bytes(cache))
            del cache
            mask = torch.ones(batch_size, length, dtype=torch.long, device=bench.device)
            if method == "adaptive":
                mask = (torch.arange(length, device=bench.device) >= (counts.max() - counts)[:, None]).long()
            embeds = bench.random_embeds(batch_size, length)
            time = milliseconds(lambda: bench.prefill(embeds, mask), bench.repeats)  # noqa: B023
            yield bench.row(batch_size, method, "eager", "prefill_ms", time)
            peak = peak_bytes(lambda: bench.prefill(embeds, mask))  # noqa: B023
            yield bench.row(batch_size, method, "eager", "prefill_peak_bytes", peak)
            token, cache = bench.prefill(embeds, mask)
            step = bench.random_embeds(batch_size, 1)
            time = milliseconds(lambda: bench.prefill(step, None, cache), 2 * bench.repeats)  # noqa: B023
            yield bench.row(batch_size, method, "eager", "decode_step_ms", time)
            del cache, embeds, token
            release()


def captured(bench: Bench, batch_sizes: tuple[int, ...], methods: tuple[str, ...] = ("stock", "fixed")) -> Iterator[Row]:
    """Towers, selector, projector and prefill as one CUDA graph, the decode step as another, on a static cache."""
    for batch_size in batch_sizes:
        for method in methods:
            model, inputs = bench.prepare(method, batch_size)
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
            with unchecked():
                first = Captured(lambda: bench.first_token(model, inputs))  # noqa: B023
            time = milliseconds(first, 2 * bench.repeats)
            yield bench.row(batch_size, method, "captured", "first_token_ms", time)
            token, cache = first.result
            length = cache.get_seq_length()
            static = StaticCache(config=model.config.text_config, max_cache_len=length + NEW_TOKENS)
            bench.prefill(bench.random_embeds(batch_size, length), None, static)
            embed = model.get_input_embeddings()

            def keep_prompt() -> None:
                for layer, source in zip(static.layers, cache.layers):  # noqa: B023
                    layer.keys[:, :, :length].copy_(source.keys)  # noqa: B023
                    layer.values[:, :, :length].copy_(source.values)  # noqa: B023
                    layer.cumulative_length.fill_(length)  # noqa: B023

            def next_token() -> None:
                token.copy_(bench.prefill(embed(token[:, None]), None, static)[0][:, 0])  # noqa: B023

            keep_prompt()
            step = Captured(next_token)
            keep_prompt()
            time = milliseconds(step, 4 * bench.repeats)
            yield bench.row(batch_size, method, "captured", "decode_step_ms", time)

            def answer() -> None:
                first()  # noqa: B023
                keep_prompt()  # noqa: B023
                for _ in range(NEW_TOKENS - 1):
                    step()  # noqa: B023

            time = milliseconds(answer, repeats=1, warm_up=0)
            yield bench.row(batch_size, method, "captured", "tokens_per_s", batch_size * NEW_TOKENS / time * 1e3)
            del first, step, static, cache, token, keep_prompt, next_token, answer
            release()


def answers(bench: Bench, batch_sizes: tuple[int, ...], methods: tuple[str, ...] = METHODS[:3]) -> Iterator[Row]:
    """Tokens per second of a whole `generate` of 128 tokens, as users call it."""
    for batch_size in batch_sizes:
        for method in methods:
            model, inputs = bench.prepare(method, batch_size)

            def generate() -> Any:
                return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)  # noqa: B023

            time = milliseconds(generate, repeats=1, warm_up=0)
            yield bench.row(batch_size, method, "eager", "tokens_per_s", batch_size * NEW_TOKENS / time * 1e3)
            release()


def same_question(bench: Bench, batch_sizes: tuple[int, ...]) -> Iterator[Row]:
    """One question, many images: its embedding given; one image, many questions: its vision features given."""
    for batch_size in batch_sizes:
        model, inputs = bench.prepare("fixed", batch_size)
        pixels = inputs.pop("pixel_values")
        questions = {name: inputs.pop(name) for name in ("question_input_ids", "question_attention_mask")}
        embeds = model.get_question_embeds(questions["question_input_ids"][:1]).expand(batch_size, -1)
        given = {**inputs, "pixel_values": pixels, "question_embeds": embeds}
        time = milliseconds(lambda: bench.first_token(model, given), bench.repeats)  # noqa: B023
        yield bench.row(batch_size, "fixed", "eager", "first_token_question_given_ms", time)
        given = {**inputs, **questions, "vision_features": model.get_vision_features(pixels)}
        time = milliseconds(lambda: bench.first_token(model, given), bench.repeats)  # noqa: B023
        yield bench.row(batch_size, "fixed", "eager", "first_token_vision_given_ms", time)


def even_batch(bench: Bench, batch_sizes: tuple[int, ...]) -> Iterator[Row]:
    """Adaptive with one image repeated: what the raggedness of a batch costs."""
    drawn = bench.models.ours.model.drawn
    mean = bench.models.bound.model.num_tokens
    counts = select_tokens(
        *drawn, visual_lof_neighbors=bench.shape.lof_neighbors, text_lof_neighbors=bench.shape.lof_neighbors
    ).num_tokens
    typical = int((counts - mean).abs().argmin())
    bench.models.ours.model.drawn = tuple(scores[typical].expand_as(scores) for scores in drawn)
    try:
        for batch_size in batch_sizes:
            model, inputs = bench.prepare("adaptive", batch_size)
            time = milliseconds(lambda: bench.first_token(model, inputs), bench.repeats)  # noqa: B023
            yield bench.row(batch_size, "adaptive, even", "eager", "first_token_ms", time)
            length = bench.first_token(model, inputs)[1].get_seq_length()
            yield bench.row(batch_size, "adaptive, even", "eager", "prompt_length", length)
    finally:
        bench.models.ours.model.drawn = drawn


def compiled(bench: Bench, batch_sizes: tuple[int, ...], methods: tuple[str, ...] = ("fixed",)) -> Iterator[Row]:
    """The switch of docs/performance.md: `forward` compiled whole, replayed from a CUDA graph."""
    for batch_size in batch_sizes:
        for method in methods:
            model, inputs = bench.prepare(method, batch_size)
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
            mode = "reduce-overhead" if torch.cuda.is_available() else None
            backend = "inductor" if torch.cuda.is_available() else "eager"
            forward = torch.compile(model.forward, mode=mode, backend=backend, fullgraph=True, dynamic=False)

            def first() -> torch.Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                outputs = forward(**inputs, use_cache=True, logits_to_keep=1)  # noqa: B023
                return outputs.logits[:, -1].argmax(-1)

            time = milliseconds(first, 2 * bench.repeats, warm_up=4)
            yield bench.row(batch_size, method, "compiled", "first_token_ms", time)
            del forward
            torch._dynamo.reset()
            release()


def largest_batch(bench: Bench, methods: tuple[str, ...] = ("stock", "adaptive", "fixed")) -> Iterator[Row]:
    """The largest batch whose first token and cache of 128 more fit; tried from an estimate, to within 5 %."""
    if not torch.cuda.is_available():
        return
    for method in methods:

        def needs(batch_size: int) -> int:
            """Bytes for a batch; raises OutOfMemoryError if there are not that many."""
            model, inputs = bench.prepare(method, batch_size)  # noqa: B023
            release()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _, cache = bench.first_token(model, inputs)
            grown = cache_bytes(cache) // cache.get_seq_length() * NEW_TOKENS
            room = torch.empty(grown, dtype=torch.uint8, device=bench.device)
            needed = torch.cuda.max_memory_allocated() - before
            del cache, room
            return needed

        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        per_image = needs(16) / 16
        fits, fails = 16, None
        guess = int(free / per_image)
        for _ in range(4):
            guess = min(max(guess, fits + 1), 1024)
            try:
                needs(guess)
                fits = max(fits, guess)
                guess = int(1.06 * guess) if fails is None else (fits + fails) // 2
            except torch.OutOfMemoryError:
                fails = guess if fails is None else min(fails, guess)
                guess = int(0.95 * guess) if fits <= 16 else (fits + fails) // 2
            release()
            if fails is not None and fails <= 1.05 * fits:
                break
        yield bench.row(fits, method, "eager", "largest_batch", fits)
