"""What is measured, most important first. Each step yields rows; a step that no longer fits the time is left out.

A row: shape, batch, method, mode ("eager", "captured" as one CUDA graph, "compiled" by torch.compile), quantity, value.
Quantities end in their unit: `_ms`, `_bytes`, `_per_s`, or none for counts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache

from recoverable_llava.local_outlier_factor import local_outlier_factor
from recoverable_llava.novelty_selection import cosine_distance, highest_around, select_by_novelty
from recoverable_llava.paper_selection import select_by_outliers
from recoverable_llava.selection import Selection
from recoverable_llava.token_assembly import assemble_tokens, gather_tokens
from recoverable_llava.transformers_names import CACHE, cache_of

from . import paper_release
from .measure import Captured, cache_bytes, milliseconds, peak_bytes, release
from .models import Drawn, Models, Shape, draw, make_inputs, without_question


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
    left_out: list[str] = field(default_factory=list)  # what did not fit into memory

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
        if method.startswith(("adaptive", "fixed")):
            budget = None if method == "adaptive" else self.budget_of(method)
            models.ours.config.visual_token_budget = budget
            placeholders = self.shape.num_tokens if budget is None else budget
            return models.ours, make_inputs(self.shape, batch_size, placeholders, self.device, self.dtype)
        model = models.stock if method == "stock" else models.bound
        placeholders = self.shape.num_tokens if method == "stock" else models.bound.model.num_tokens
        return model, without_question(make_inputs(self.shape, batch_size, placeholders, self.device, self.dtype))

    def budget_of(self, method: str) -> int:
        """Of "fixed", or of a method with its own, like "fixed 320"."""
        return int(method.removeprefix("fixed") or self.budget)

    @property
    def our_methods(self) -> list[str]:
        """Where the fixed mode is measured with several budgets: each of them, and the adaptive mode."""
        return [*(f"fixed {budget}" for budget in self.shape.budgets), "adaptive"]

    def first_token(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """From pixels and ids on the device to the first answer token, and the KV cache."""
        outputs = model(**inputs, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1].argmax(-1), cache_of(outputs)

    def prefill(self, embeds: torch.Tensor, mask: torch.Tensor | None, cache: Any = None) -> Any:
        language_model, head = self.models.stock.model.language_model, self.models.stock.lm_head
        outputs = language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=True, **{CACHE: cache})
        return head(outputs.last_hidden_state[:, -1:]).argmax(-1), cache_of(outputs)

    def static_cache(self, model: Any, batch_size: int, length: int) -> StaticCache:
        """A cache that holds a prompt of `length` and has room for `NEW_TOKENS` more."""
        cache = StaticCache(config=model.config.text_config, max_cache_len=length + NEW_TOKENS)
        self.prefill(self.random_embeds(batch_size, length), None, cache)
        return cache

    def random_embeds(self, batch_size: int, length: int) -> torch.Tensor:
        return 0.02 * torch.randn(batch_size, length, self.shape.hidden_size, device=self.device, dtype=self.dtype)


# ------------------------------------------------------------------------------------------------------- the selector


@dataclass(frozen=True)
class Scored:
    """What the selector starts from."""

    drawn: Drawn
    projected: torch.Tensor  # [I, N, D] the patches as the language model would see them
    keys: torch.Tensor  # [I, N, C]
    has_question: torch.Tensor  # [I]


def choose(scored: Scored, budget: int | None, neighbors: int, is_paper: bool = False) -> torch.Tensor:
    """The selector: from scores to gathered tokens, with one copy to the host if there is no budget."""
    drawn = scored.drawn
    given = (drawn.text_scores, scored.has_question)
    if is_paper:
        selection = select_by_outliers(
            drawn.visual_scores,
            *given,
            visual_lof_neighbors=neighbors,
            text_lof_neighbors=neighbors,
            visual_token_budget=budget,
        )
    else:
        around = highest_around(math.isqrt(drawn.visual_scores.shape[1]))
        selection = select_by_novelty(
            drawn.visual_scores, cosine_distance(scored.projected), *given, around=around, visual_token_budget=budget
        )
    if budget is None:
        longest, merged = torch.stack([selection.num_tokens.max(), selection.num_merged.max()]).tolist()
    else:
        longest, merged = budget, budget if is_paper else 1
    assembly = assemble_tokens(
        selection, drawn.visual_scores, scored.keys, *given, num_tokens=longest, num_merged=merged
    )
    return gather_tokens(drawn.patches, assembly)


def draw_scored(bench: Bench, batch_size: int, num_patches: int) -> Scored:
    mean = min(bench.shape.mean_tokens, num_patches // 4)
    drawn = draw(min(batch_size, 8), num_patches, bench.shape.tower_width, mean)
    drawn = Drawn(
        drawn.visual_scores.to(bench.device),
        drawn.text_scores.to(bench.device),
        drawn.patches.to(bench.device, bench.dtype),
    ).first(batch_size)
    has_question = torch.ones(batch_size, dtype=torch.bool, device=bench.device)
    projection = torch.randn(bench.shape.tower_width, bench.shape.hidden_size, device=bench.device, dtype=bench.dtype)
    return Scored(drawn, drawn.patches @ projection, torch.randn_like(drawn.patches), has_question)


def selector(bench: Bench, batch_size: int) -> Iterator[Row]:
    neighbors, repeats = bench.shape.lof_neighbors, 4 * bench.repeats
    scored = draw_scored(bench, batch_size, bench.shape.num_patches)
    scores = scored.drawn.visual_scores
    for preset, is_paper in (("", False), (", paper's preset", True)):
        for method, budget in (("adaptive", None), ("fixed", bench.budget)):
            time = milliseconds(partial(choose, scored, budget, neighbors, is_paper), repeats)
            yield bench.row(batch_size, method + preset, "eager", "selector_ms", time)
        captured = Captured(partial(choose, scored, bench.budget, neighbors, is_paper))
        yield bench.row(batch_size, "fixed" + preset, "captured", "selector_ms", milliseconds(captured, repeats))
    time = milliseconds(lambda: local_outlier_factor(scores, neighbors), repeats)
    yield bench.row(batch_size, "lof", "eager", "lof_ms", time)
    captured = Captured(lambda: local_outlier_factor(scores, neighbors))
    yield bench.row(batch_size, "lof", "captured", "lof_ms", milliseconds(captured, repeats))


def selector_growth(bench: Bench, batch_size: int) -> Iterator[Row]:
    """How the selector's cost grows with the number of patches, captured so that launches do not hide it."""
    for preset, is_paper in ((", paper's preset", True), ("", False)):
        for num_patches in (bench.shape.num_patches * factor for factor in (1, 4, 16)):
            if not is_paper and batch_size * num_patches**2 > 1e9:
                continue  # the distances between all patches of all images do not fit
            scored = draw_scored(bench, batch_size, num_patches)
            run = Captured(partial(choose, scored, bench.budget, bench.shape.lof_neighbors, is_paper))
            quantity = f"selector_{num_patches}_patches_ms"
            yield bench.row(batch_size, "fixed" + preset, "captured", quantity, milliseconds(run))
            del run
            release()


def released_step(bench: Bench) -> Iterator[Row]:
    """Our step and the paper's released one, batch 1, 60 kept patches and 20 centres in both."""
    scored = draw_scored(bench, 1, bench.shape.num_patches)
    drawn, neighbors = scored.drawn, bench.shape.lof_neighbors
    counts = (30, 30, 20) if bench.shape.num_patches >= 200 else (5, 5, 3)
    merge_neighbors = min(32, bench.shape.num_patches // 8)
    given = (drawn.visual_scores.to(bench.dtype), drawn.text_scores.to(bench.dtype), scored.keys, drawn.patches)
    for quantity, number in (("released_step_ms", counts), ("released_step_own_counts_ms", None)):
        released = partial(paper_release.recover, *given, number, merge_neighbors)
        yield bench.row(1, "paper, as released", "eager", quantity, milliseconds(released, bench.repeats))
    for preset, is_paper in (("", False), (", paper's preset", True)):
        ours = partial(choose, scored, sum(counts) + 1, neighbors, is_paper)
        yield bench.row(1, "fixed" + preset, "eager", "same_step_ms", milliseconds(ours, 2 * bench.repeats))
        captured = Captured(ours)
        yield bench.row(1, "fixed" + preset, "captured", "same_step_ms", milliseconds(captured, 2 * bench.repeats))


# ---------------------------------------------------------------------------------------------------------- the towers


def towers(bench: Bench, batch_size: int) -> Iterator[Row]:
    ours, stock = bench.models.ours.model, bench.models.stock
    _, inputs = bench.prepare("adaptive", batch_size)
    pixels, questions = inputs["pixel_values"], inputs["question_input_ids"]
    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "vision_tower_ms": ("stock", lambda: stock.model.vision_tower(pixels, output_hidden_states=True)),
        "vision_features_ms": ("adaptive", lambda: ours.get_vision_features(pixels)),
        "question_tower_ms": ("adaptive", lambda: ours.get_question_embeds(questions)),
    }
    for quantity, (method, function) in parts.items():
        yield bench.row(batch_size, method, "eager", quantity, milliseconds(function, bench.repeats))
        run = Captured(function)
        yield bench.row(batch_size, method, "captured", quantity, milliseconds(run, bench.repeats))
        del run


# ---------------------------------------------------------------------------------------------------------- whole calls


def first_tokens(bench: Bench, batch_size: int, warm_up: int = 2) -> Iterator[Row]:
    """Time to first token of all methods in turn, so that a host that slows down slows all of them."""
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(warm_up + bench.repeats * (3 if batch_size == 1 else 1)):
        for method in METHODS:
            model, inputs = bench.prepare(method, batch_size)
            times[method].append(milliseconds(partial(bench.first_token, model, inputs), repeats=1, warm_up=0))
    for method in METHODS:
        yield bench.row(batch_size, method, "eager", "first_token_ms", median(times[method][warm_up:]))


def eager(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """Prefill alone, decode step, memory."""
    model, inputs = bench.prepare(method, batch_size)
    bench.first_token(model, inputs)
    peak = peak_bytes(lambda: bench.first_token(model, inputs))
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
    time = milliseconds(lambda: bench.prefill(embeds, mask), bench.repeats)
    yield bench.row(batch_size, method, "eager", "prefill_ms", time)
    peak = peak_bytes(lambda: bench.prefill(embeds, mask))
    yield bench.row(batch_size, method, "eager", "prefill_peak_bytes", peak)
    step = bench.random_embeds(batch_size, 1)
    # The first step at a length is slow: PyTorch plans attention for every new shape. So the second time counts.
    for _ in range(2):
        _, cache = bench.prefill(embeds, mask)
        time = milliseconds(partial(bench.prefill, step, None, cache), 2 * bench.repeats, warm_up=1)
    yield bench.row(batch_size, method, "eager", "decode_step_ms", time)


def captured(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """Towers, selector, projector and prefill as one CUDA graph, the decode step as another, on a static cache."""
    model, inputs = bench.prepare(method, batch_size)
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    first = Captured(lambda: bench.first_token(model, inputs))
    time = milliseconds(first, bench.repeats, warm_up=1)
    yield bench.row(batch_size, method, "captured", "first_token_ms", time)
    token, cache = first.result
    length = cache.get_seq_length()
    static = bench.static_cache(model, batch_size, length)
    embed = model.get_input_embeddings()

    def keep_prompt() -> None:
        for layer, source in zip(static.layers, cache.layers):
            layer.keys[:, :, :length].copy_(source.keys)
            layer.values[:, :, :length].copy_(source.values)
            layer.cumulative_length.fill_(length)

    def next_token() -> None:
        token.copy_(bench.prefill(embed(token[:, None]), None, static)[0][:, 0])

    keep_prompt()
    step = Captured(next_token)
    keep_prompt()
    time = milliseconds(step, 4 * bench.repeats)
    yield bench.row(batch_size, method, "captured", "decode_step_ms", time)

    def answer() -> None:
        first()
        keep_prompt()
        for _ in range(NEW_TOKENS - 1):
            step()

    time = milliseconds(answer, repeats=1, warm_up=0)
    yield bench.row(batch_size, method, "captured", "tokens_per_s", batch_size * NEW_TOKENS / time * 1e3)


def answers(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """Tokens per second of a whole `generate` of 128 tokens, as users call it."""
    model, inputs = bench.prepare(method, batch_size)

    def generate() -> Any:
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)

    time = milliseconds(generate, repeats=1, warm_up=1)
    yield bench.row(batch_size, method, "eager", "tokens_per_s", batch_size * NEW_TOKENS / time * 1e3)


def same_question(bench: Bench, batch_size: int) -> Iterator[Row]:
    """One question, many images: its embedding given; one image, many questions: its vision features given."""
    model, inputs = bench.prepare("fixed", batch_size)
    pixels = inputs.pop("pixel_values")
    questions = {name: inputs.pop(name) for name in ("question_input_ids", "question_attention_mask")}
    embeds = model.get_question_embeds(questions["question_input_ids"][:1]).expand(batch_size, -1)
    given = {**inputs, "pixel_values": pixels, "question_embeds": embeds}
    time = milliseconds(lambda: bench.first_token(model, given), bench.repeats)
    yield bench.row(batch_size, "fixed", "eager", "first_token_question_given_ms", time)
    given = {**inputs, **questions, "vision_features": model.get_vision_features(pixels)}
    time = milliseconds(lambda: bench.first_token(model, given), bench.repeats)
    yield bench.row(batch_size, "fixed", "eager", "first_token_vision_given_ms", time)


def even_batch(bench: Bench, batch_size: int) -> Iterator[Row]:
    """Adaptive with one image repeated: what the raggedness of a batch costs."""
    drawn = bench.models.ours.model.drawn
    model, inputs = bench.prepare("adaptive", min(64, len(drawn.visual_scores)))
    counts = model.recover_tokens(**inputs).selection.num_tokens
    typical = int((counts - bench.models.bound.model.num_tokens).abs().argmin())
    model.model.drawn = drawn.only(typical)
    try:
        model, inputs = bench.prepare("adaptive", batch_size)
        time = milliseconds(lambda: bench.first_token(model, inputs), bench.repeats)
        yield bench.row(batch_size, "adaptive, even", "eager", "first_token_ms", time)
        length = bench.first_token(model, inputs)[1].get_seq_length()
        yield bench.row(batch_size, "adaptive, even", "eager", "prompt_length", length)
    finally:
        bench.models.ours.model.drawn = drawn


def compile_whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one CUDA graph of compiled kernels; on a CPU only traced, since a compiler may be missing there."""
    has_gpu = torch.cuda.is_available()
    mode, backend = ("reduce-overhead", "inductor") if has_gpu else (None, "eager")
    return torch.compile(function, mode=mode, backend=backend, fullgraph=True, dynamic=False)


def compiled(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """`forward` compiled whole, towers, selector and prefill, replayed from a CUDA graph."""
    model, inputs = bench.prepare(method, batch_size)
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    model(**inputs, use_cache=True, logits_to_keep=1)  # transformers takes a lock in its first call, which cannot trace
    forward = compile_whole(model.forward)

    def first() -> torch.Tensor:
        if torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()
        outputs = forward(**inputs, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1].argmax(-1)

    time = milliseconds(first, 2 * bench.repeats, warm_up=4)
    yield bench.row(batch_size, method, "compiled", "first_token_ms", time)
    torch._dynamo.reset()


def compiled_decode(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """The decode step as transformers runs it on a static cache with room for 128 tokens more: compiled."""
    model, inputs = bench.prepare(method, batch_size)
    length = bench.first_token(model, inputs)[1].get_seq_length()
    static = bench.static_cache(model, batch_size, length)
    step = bench.random_embeds(batch_size, 1)
    decode = compile_whole(lambda: bench.prefill(step, None, static)[0])
    time = milliseconds(decode, 4 * bench.repeats, warm_up=4)
    yield bench.row(batch_size, method, "compiled", "decode_step_ms", time)
    torch._dynamo.reset()


def switched(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """The switch of docs/performance.md: a static cache, whose decode step transformers compiles, and with ours towers
    and selector compiled as well."""
    model, inputs = bench.prepare(method, batch_size)
    if method == "fixed":
        model.model.get_image_features = compile_whole(model.model.get_image_features)

    def answer() -> Any:
        return model.generate(**inputs, cache_implementation="static", max_new_tokens=NEW_TOKENS, do_sample=False)

    try:
        time = milliseconds(answer, repeats=2, warm_up=1)
        yield bench.row(batch_size, method, "compiled", "tokens_per_s", batch_size * NEW_TOKENS / time * 1e3)
    finally:
        vars(model.model).pop("get_image_features", None)
        torch._dynamo.reset()


def bytes_needed(bench: Bench, batch_size: int, method: str, new_tokens: int) -> int:
    """Bytes, besides weights and inputs, for a batch's first token and a cache of `new_tokens` more.

    Raises:
        torch.OutOfMemoryError: if there are not that many.
    """
    model, inputs = bench.prepare(method, batch_size)
    release()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, cache = bench.first_token(model, inputs)
    more = cache_bytes(cache) // cache.get_seq_length() * new_tokens
    torch.empty(more, dtype=torch.uint8, device=bench.device)
    return torch.cuda.max_memory_allocated() - before


def largest_batch(bench: Bench, start: int, method: str) -> Iterator[Row]:
    """The largest batch whose first token fits, and the largest that has room for 128 tokens more."""
    if not torch.cuda.is_available():
        return
    for new_tokens, quantity in ((NEW_TOKENS, f"largest_batch_{NEW_TOKENS}_more"), (0, "largest_batch_first_token")):
        fits = largest_that_fits(bench, start, method, new_tokens)
        yield bench.row(fits, method, "eager", quantity, fits)


def largest_that_fits(bench: Bench, start: int, method: str, new_tokens: int) -> int:
    """Tried from an estimate, to within 5 %."""
    free = torch.cuda.get_device_properties(0).total_memory - torch.cuda.memory_allocated()
    fits, fails = start, 1025
    guess = int(0.95 * free * start / bytes_needed(bench, start, method, new_tokens))
    for _ in range(5):
        guess = min(max(guess, fits + 1), fails - 1)
        release()
        try:
            bytes_needed(bench, guess, method, new_tokens)
            fits = guess
        except torch.OutOfMemoryError:
            fails = guess
        if fails <= 1.05 * fits:
            break
        guess = (
            (fits + fails) // 2 if fails - fits < 0.2 * fits else int(1.06 * fits if fits == guess else 0.94 * fails)
        )
    if fits == start:
        raise RuntimeError(f"Not even a batch above {start} fits: something else holds the device's memory.")
    return fits


# ----------------------------------------------------------------------------------------- pictures of several tiles


def first_tokens_between(bench: Bench, batch_size: int, rounds: int) -> Iterator[Row]:
    """First tokens of ours, twice, between two of stock, in every round, with their spread; memory before these."""
    times: dict[str, list[float]] = {}
    methods = ["stock", *bench.our_methods]
    for method in list(methods):
        try:
            yield from memory(bench, batch_size, method)
        except torch.OutOfMemoryError:
            methods.remove(method)
            bench.left_out.append(f"{bench.shape.name}: batch {batch_size} of {method} does not fit into memory")
        release()
    has_stock, ours = "stock" in methods, [method for method in methods if method != "stock"]
    for _ in range(rounds):
        for place, method in enumerate([*["stock"] * has_stock, *ours, *ours, *["stock"] * has_stock]):
            model, inputs = bench.prepare(method, batch_size)
            time = milliseconds(partial(bench.first_token, model, inputs), repeats=1, warm_up=0)
            times.setdefault(method, []).append(time)
            if method == "stock":
                times.setdefault("stock, before" if place == 0 else "stock, after", []).append(time)
    for method, values in times.items():
        yield bench.row(batch_size, method, "eager", "first_token_ms", median(values))
        yield bench.row(batch_size, method, "eager", "first_token_low_ms", min(values))
        yield bench.row(batch_size, method, "eager", "first_token_high_ms", max(values))


def memory(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """Peaks of a first token and of the prefill alone, the KV cache, and how many tokens adaptive mode keeps."""
    model, inputs = bench.prepare(method, batch_size)
    caches: list[Any] = []
    peak = peak_bytes(lambda: caches.append(bench.first_token(model, inputs)[1]))
    cache = caches.pop()
    length = cache.get_seq_length()
    yield bench.row(batch_size, method, "eager", "first_token_peak_bytes", peak)
    yield bench.row(batch_size, method, "eager", "prompt_length", length)
    yield bench.row(batch_size, method, "eager", "cache_bytes", cache_bytes(cache))
    del cache
    mask = torch.ones(batch_size, length, dtype=torch.long, device=bench.device)
    if method == "adaptive":
        counts = model.recover_tokens(**inputs).selection.num_tokens
        yield bench.row(batch_size, method, "eager", "mean_visual_tokens", counts.float().mean().item())
        mask = (torch.arange(length, device=bench.device) >= (counts.max() - counts)[:, None]).long()
    embeds = bench.random_embeds(batch_size, length)
    peak = peak_bytes(lambda: bench.prefill(embeds, mask))
    yield bench.row(batch_size, method, "eager", "prefill_peak_bytes", peak)


def selection(bench: Bench, batch_size: int) -> Iterator[Row]:
    """From vision features and questions to what each token is made of, as the model does it; and the text tower."""
    for method in bench.our_methods:
        model, inputs = bench.prepare(method, batch_size)
        sizes = {name: value for name, value in inputs.items() if name == "image_sizes"}
        vision = model.get_vision_features(inputs["pixel_values"], **sizes)
        questions = model.model.embed_questions(batch_size, inputs["question_input_ids"])
        settings = model.config.recovery_settings()
        counts = None if settings.visual_token_budget else largest_counts
        choose_all = partial(model.model.recover, vision, questions, settings, counts)
        time = milliseconds(choose_all, bench.repeats, warm_up=1)
        yield bench.row(batch_size, method, "eager", "selection_ms", time)
    time = milliseconds(lambda: model.get_question_embeds(inputs["question_input_ids"]), bench.repeats)
    yield bench.row(batch_size, "adaptive", "eager", "question_tower_ms", time)


def largest_counts(selected: Selection) -> tuple[int, int]:
    """The adaptive mode's one copy to the host."""
    num_tokens, num_merged = torch.stack([selected.num_tokens.max(), selected.num_merged.max()]).tolist()
    return num_tokens, num_merged


def answers_between(bench: Bench, batch_size: int, new_tokens: int, again: bool) -> Iterator[Row]:
    """Whole answers by `generate`, of ours behind stock; with `again`, stock a second time.

    Not with cuDNN's attention, which plans each new length of the cache for some 0.1 s: a second answer of the same
    lengths would not pay that, but there is no time for one.
    """
    times: dict[str, list[float]] = {}

    def generate(method: str, count: int) -> Any:
        model, inputs = bench.prepare(method, batch_size)
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return model.generate(**inputs, max_new_tokens=count, do_sample=False)

    generate("adaptive", 2)  # so that the first that counts does not load the kernels
    for method in ["stock", *bench.our_methods, *["stock"] * again]:
        try:
            time = milliseconds(partial(generate, method, new_tokens), repeats=1, warm_up=0)
            times.setdefault(method, []).append(time)
        except torch.OutOfMemoryError:
            bench.left_out.append(
                f"{bench.shape.name}: answers of {method}, batch {batch_size}, do not fit into memory"
            )
        release()
    for method, values in times.items():
        yield bench.row(batch_size, method, "eager", f"answer_{new_tokens}_ms", median(values))
        if len(values) > 1:
            yield bench.row(batch_size, method, "eager", f"answer_{new_tokens}_low_ms", min(values))
            yield bench.row(batch_size, method, "eager", f"answer_{new_tokens}_high_ms", max(values))


def largest_batch_at_once(bench: Bench, start: int, method: str) -> Iterator[Row]:
    """A batch whose first token fits, at most a tenth below the largest: from an estimate, as a try takes seconds."""
    if not torch.cuda.is_available():
        return
    free = torch.cuda.get_device_properties(0).total_memory - torch.cuda.memory_allocated()
    guess = free * start / bytes_needed(bench, start, method, 0)
    for share in (0.95, 0.87, 0.8):
        release()
        try:
            bytes_needed(bench, int(share * guess), method, 0)
        except torch.OutOfMemoryError:
            continue
        yield bench.row(int(share * guess), method, "eager", "largest_batch_first_token", int(share * guess))
        return
    bench.left_out.append(f"{bench.shape.name}: no batch of {method} near the estimate of {guess:.0f} fits into memory")


# ------------------------------------------------------------------------------------------------------------ profile


def launches(bench: Bench, batch_size: int, method: str) -> Iterator[Row]:
    """How many kernels a first token takes and how long the GPU is busy with them: the rest of the time it waits."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    model, inputs = bench.prepare(method, batch_size)
    bench.first_token(model, inputs)
    activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        bench.first_token(model, inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e3
    yield bench.row(batch_size, method, "eager", "first_token_kernels", len(kernels))
    yield bench.row(batch_size, method, "eager", "first_token_busy_ms", busy)
