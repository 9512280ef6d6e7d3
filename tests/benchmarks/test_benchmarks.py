"""The benchmark runs from end to end on a tiny model, and its report says what was measured."""

import json
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import models, paper_release, plan, report
from recoverable_llava.novelty_selection import cosine_distance, select_by_novelty
from recoverable_llava.paper_selection import select_by_outliers


@pytest.fixture(scope="module")
def bench():
    shape = models.SHAPES["tiny"]
    with torch.no_grad():
        built = models.build(shape, torch.device("cpu"), torch.float32)
    return plan.Bench(shape, built, torch.device("cpu"), torch.float32, budget=16, repeats=1)


@pytest.fixture(scope="module")
def tiled_bench():
    shape = models.SHAPES["tiny-NeXT"]
    with torch.no_grad():
        built = models.build(shape, torch.device("cpu"), torch.float32)
    return plan.Bench(shape, built, torch.device("cpu"), torch.float32, budget=16, repeats=1)


@pytest.mark.slow
def test_one_command_measures_pictures_of_several_tiles(tmp_path, monkeypatch):
    arguments = ["benchmarks", "--shapes", "tiny-NeXT", "--batch-sizes", "1", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    command.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["facts"]["left_out"] == []
    measured = {(row["batch"], row["method"], row["quantity"]) for row in results["rows"]}
    for method in ("stock", "fixed 20", "fixed 9", "adaptive"):
        for quantity in ("first_token_ms", "first_token_low_ms", "cache_bytes", "prefill_peak_bytes"):
            assert {(1, method, quantity), (2, method, quantity)} <= measured
        assert {(1, method, "answer_32_ms"), (2, method, "answer_128_ms")} <= measured
        if method != "stock":
            assert (1, method, "selection_ms") in measured
    assert (2, "stock, before", "first_token_ms") in measured and (2, "stock, after", "first_token_ms") in measured
    text = (tmp_path / "table.md").read_text()
    assert "| ours, fixed 20 |" in text and "Selection, adaptive, batch 1: " in text and "bars" not in text
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_methods_of_tiles_share_weights_and_differ_in_length(tiled_bench):
    bench, ours, stock = tiled_bench, tiled_bench.models.ours, tiled_bench.models.stock
    assert stock.model.image_newline is ours.model.image_newline
    assert not any(parameter.is_meta for model in (ours, stock) for parameter in model.parameters())
    lengths = {}
    for method in ("stock", *bench.our_methods, "bound"):
        model, inputs = bench.prepare(method, 2)
        with torch.no_grad():
            lengths[method] = bench.first_token(model, inputs)[1].get_seq_length()
    # Five tiles of 64 patches, and a new line behind each of 16 rows.
    assert lengths["stock"] == 5 * 64 + 16 + 64
    assert lengths["fixed 20"] == 20 + 64 and lengths["fixed 9"] == 9 + 64 and lengths["bound"] == 20 + 64
    model, inputs = bench.prepare("adaptive", 8)
    with torch.no_grad():
        counts = model.recover_tokens(**inputs).selection.num_tokens
    assert 15 < counts.float().mean() < 35 and lengths["adaptive"] == counts[:2].max() + 64
    model.config.compress = False
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
            torch.testing.assert_close(logits, stock(**models.without_question(inputs)).logits, rtol=0, atol=0)
    finally:
        model.config.compress = True


def test_what_does_not_fit_is_noted_and_the_rest_measured(tiled_bench, monkeypatch):
    def first_token(model, inputs):
        if model is tiled_bench.models.stock:
            raise torch.OutOfMemoryError
        return plan.Bench.first_token(tiled_bench, model, inputs)

    monkeypatch.setattr(tiled_bench, "first_token", first_token)
    monkeypatch.setattr(tiled_bench, "left_out", [])
    with torch.no_grad():
        measured = {row["method"] for row in plan.first_tokens_between(tiled_bench, 1, rounds=1)}
    assert measured == {"fixed 20", "fixed 9", "adaptive"}
    assert tiled_bench.left_out == ["tiny-NeXT: batch 1 of stock does not fit into memory"]


@pytest.mark.slow
def test_one_command_gives_table_and_picture(tmp_path, monkeypatch):
    arguments = ["benchmarks", "--shapes", "tiny", "--batch-sizes", "1", "2", "--budget", "16", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--compile", "--out", str(tmp_path)])
    command.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["facts"]["left_out"] == []
    measured = {(row["method"], row["mode"], row["quantity"]) for row in results["rows"]}
    for method in plan.METHODS:
        for quantity in ("first_token_ms", "prefill_ms", "decode_step_ms", "cache_bytes", "first_token_peak_bytes"):
            assert (method, "eager", quantity) in measured
    for method in ("stock", "fixed"):
        for mode in ("captured", "compiled"):
            assert (method, mode, "first_token_ms") in measured and (method, mode, "tokens_per_s") in measured
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(results["rows"])
    assert (tmp_path / "table.png").stat().st_size > 10_000
    assert "| stock LLaVA |" in (tmp_path / "table.md").read_text()


def test_no_time_leaves_everything_out_but_still_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "--shapes", "tiny", "--batch-sizes", "1", "--minutes", "0", "--out", str(tmp_path)]
    )
    command.main()
    facts = json.loads((tmp_path / "results.json").read_text())["facts"]
    assert "tiny: eager" in facts["left_out"]


def test_steps_are_chosen_by_name_in_order():
    listed = [("eager", 1, []), ("captured", 2, [])]
    assert command.chosen(listed, ["captured", "eager"]) == listed[::-1]
    with pytest.raises(ValueError, match=r"--steps has \['compiled'\]: choose among \['eager', 'captured'\]"):
        command.chosen(listed, ["captured", "compiled"])


def test_methods_share_weights_and_differ_in_length(bench):
    ours, stock, bound = bench.models.ours, bench.models.stock, bench.models.bound
    assert stock.model.language_model is ours.model.language_model is bound.model.language_model
    assert not any(parameter.is_meta for model in (ours, stock, bound) for parameter in model.parameters())
    lengths = {}
    for method in plan.METHODS:
        model, inputs = bench.prepare(method, 2)
        with torch.no_grad():
            _, cache = bench.first_token(model, inputs)
        lengths[method] = cache.get_seq_length()
    assert lengths["stock"] == 64 + 64 and lengths["fixed"] == 64 + 16
    assert lengths["adaptive"] < lengths["stock"] and lengths["bound"] == 64 + bound.model.num_tokens


def test_without_compression_ours_is_stock(bench):
    model, inputs = bench.prepare("adaptive", 2)
    stock, stock_inputs = bench.prepare("stock", 2)
    model.config.compress = False
    try:
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, stock(**stock_inputs).logits, rtol=0, atol=0)
    finally:
        model.config.compress = True


def test_drawn_images_keep_about_as_many_tokens_as_the_paper():
    drawn = models.draw(32, 576, 256)
    default = select_by_novelty(drawn.visual_scores, cosine_distance(drawn.patches), drawn.text_scores)
    paper = select_by_outliers(drawn.visual_scores, drawn.text_scores)
    for counts in (default.num_tokens.float(), paper.num_tokens.float()):
        assert 50 < counts.mean() < 64 and counts.std() > 5


def test_captured_decoding_gives_the_answer_of_generate(bench):
    """The loop that the benchmark times on a static cache is greedy decoding."""
    model, inputs = bench.prepare("fixed", 2)
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        token, cache = bench.first_token(model, inputs)
        length, embed = cache.get_seq_length(), model.get_input_embeddings()
        static = plan.StaticCache(config=model.config.text_config, max_cache_len=length + 8)
        bench.prefill(bench.random_embeds(2, length), None, static)
        for layer, source in zip(static.layers, cache.layers):
            layer.keys[:, :, :length].copy_(source.keys)
            layer.values[:, :, :length].copy_(source.values)
            layer.cumulative_length.fill_(length)
        answer = [token]
        for _ in range(4):
            answer.append(bench.prefill(embed(answer[-1][:, None]), None, static)[0][:, 0])
    assert torch.equal(torch.stack(answer, dim=1), expected)


def test_released_step_against_its_definition():
    """Counts and contents of the paper's released step, for one centre by hand."""
    generator = torch.Generator().manual_seed(0)
    attention, similarity = torch.rand(1, 40, generator=generator), torch.rand(1, 40, generator=generator)
    keys, features = torch.randn(1, 40, 8, generator=generator), torch.randn(1, 40, 8, generator=generator)
    tokens = paper_release.recover(attention, similarity, keys, features, (4, 3, 1), merge_neighbors=5)
    assert tokens.shape == (1, 4 + 3 + 1 + 1, 8)
    by_vision = attention[0].topk(4).indices
    lowered = similarity[0].clone()
    lowered[by_vision] = lowered.min()
    kept = torch.cat([by_vision, lowered.topk(3).indices]).sort().values
    torch.testing.assert_close(tokens[0, :7], features[0, kept])
    rest = [patch for patch in range(40) if patch not in kept.tolist()]
    centre = max(range(33), key=lambda i: attention[0, rest[i]])
    others = [i for i in range(33) if i != centre]
    # The release reads the keys of the remainder at positions of the full array.
    unit = torch.nn.functional.normalize(keys[0], dim=-1)
    near = sorted(others, key=lambda i: -(unit[centre] @ unit[i] + 50 * lowered[rest[i]]).item())[:5]
    merged = features[0, rest[centre]] + sum(attention[0, rest[i]] * features[0, rest[i]] for i in near)
    torch.testing.assert_close(tokens[0, 7], merged)
    torch.testing.assert_close(tokens[0, 8], sum(attention[0, rest[i]] * features[0, rest[i]] for i in others))


def test_bars_from_known_figures():
    def row(batch, method, mode, quantity, value):
        return {"shape": "7B", "batch": batch, "method": method, "mode": mode, "quantity": quantity, "value": value}

    rows = [
        row(32, "stock", "eager", "first_token_ms", 640.0),
        row(32, "adaptive", "eager", "first_token_ms", 160.0),
        row(32, "fixed", "captured", "first_token_ms", 200.0),
        row(32, "fixed", "compiled", "first_token_ms", 128.0),
        row(1, "adaptive", "eager", "selector_ms", 4.0),
        row(140, "stock", "eager", "largest_batch_first_token", 140),
        row(600, "adaptive", "eager", "largest_batch_first_token", 600),
    ]
    found = {what: (value, met) for what, value, _, met in report.bars(report.Results(rows), "7B") if value is not None}
    assert found == {
        "first token, adaptive against stock, both eager, B = 32": (4.0, True),
        "first token, fixed captured or compiled against stock eager, B = 32": (5.0, True),
        "selector, adaptive, eager, B = 1, ms": (4.0, False),
        "largest batch, first token, adaptive against stock": (600 / 140, True),
    }


class LaunchedOperations(TorchDispatchMode):
    """Counts operations that do work; views do none."""

    VIEWS = (
        "view",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
        "select",
        "transpose",
        "permute",
        "alias",
        "detach",
        "t",
    )
    VIEWS += (
        "unbind",
        "split",
        "unfold",
        "as_strided",
        "empty",
        "empty_like",
        "new_empty",
        "lift_fresh",
        "scalar_tensor",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in self.VIEWS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("is_paper", "budget", "most"), [(False, None, 106), (False, 16, 99), (True, None, 208), (True, 16, 240)]
)
def test_selector_stays_within_its_launches(bench, is_paper, budget, most):
    """At batch 1 the selector costs what its launches cost; docs/performance.md has the history of this number."""
    scored = plan.draw_scored(bench, 2, bench.shape.num_patches)
    with LaunchedOperations() as launched:
        plan.choose(scored, budget, bench.shape.lof_neighbors, is_paper)
    assert launched.count <= most
