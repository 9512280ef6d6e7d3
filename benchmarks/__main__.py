"""`python -m benchmarks --out DIR`: every figure of docs/performance.md, in one run on one GPU.

LLaVA-NeXT in a run of its own: `python -m benchmarks --shapes NeXT-7B --minutes 2.2 --out DIR`.

Writes rows.jsonl as it goes, results.json, results.csv and table.md after every step, and table.png at the end.
"""

import argparse
import json
import platform
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

from . import plan
from .measure import release
from .models import SHAPES, build
from .report import write_report, write_tables


def steps(bench: plan.Bench, batch_sizes: tuple[int, ...], thorough: bool, with_compile: bool) -> list[tuple]:
    """(name, seconds that it takes on an H100, its cases), most important first."""
    descending, two = batch_sizes[::-1], ("stock", "fixed")

    def each(measure: Callable, batches: tuple[int, ...], methods: tuple[str, ...] = ()) -> list[partial]:
        return [
            partial(measure, bench, batch, *method) for batch in batches for method in ([(m,) for m in methods] or [()])
        ]

    if bench.shape.is_tiled:
        return tiled_steps(bench, descending)
    first_token = ("first token", 12, each(plan.first_tokens, descending))
    eager = ("eager", 20, each(plan.eager, descending, plan.METHODS))
    largest_batch = ("largest batch", 40, each(plan.largest_batch, (16,), ("stock", "adaptive", "fixed")))
    if not thorough:
        # Two caches and the graph's own memory of a larger stock model and batch do not fit into 80 GB.
        return [first_token, eager, ("captured", 15, each(plan.captured, descending[1:], two)), largest_batch]
    listed = [
        ("selector", 3, each(plan.selector, batch_sizes)),
        first_token,
        eager,
        ("captured", 25, each(plan.captured, descending, two)),
        ("released step", 3, [partial(plan.released_step, bench)]),
        ("even batch", 4, each(plan.even_batch, batch_sizes)),
        ("towers", 4, each(plan.towers, batch_sizes)),
        largest_batch,
        ("same question", 4, each(plan.same_question, batch_sizes)),
        ("launches", 8, each(plan.launches, batch_sizes, plan.METHODS)),
        ("selector growth", 4, each(plan.selector_growth, batch_sizes)),
        ("answers", 40, each(plan.answers, descending[:1], ("stock", "adaptive"))),
    ]
    if with_compile:
        listed += [
            ("compiled, small batch", 100, each(plan.compiled, batch_sizes[:1], two)),
            ("compiled decode step", 60, each(plan.compiled_decode, batch_sizes[-1:], two)),
            ("compiled, large batch", 60, each(plan.compiled, batch_sizes[-1:], ("fixed",))),
            ("stock compiled, large batch", 60, each(plan.compiled, batch_sizes[-1:], ("stock",))),
            ("switch", 120, each(plan.switched, batch_sizes[:1], two)),
        ]
    return listed


def tiled_steps(bench: plan.Bench, descending: tuple[int, ...]) -> list[tuple]:
    """Of a model whose prompts are thousands of tokens long: a step for each batch, as each takes long."""
    seconds, rounds = {1: 4, 8: 10, 32: 23}, {1: 4, 8: 3}
    answer_seconds = {(1, 32): 5, (8, 32): 8, (32, 32): 17, (1, 128): 14, (8, 128): 15, (32, 128): 25}

    def first(batch: int) -> tuple:
        case = partial(plan.first_tokens_between, bench, batch, rounds.get(batch, 1))
        return f"first token, batch {batch}", seconds.get(batch, batch + 4), [case]

    def answers(batch: int, new_tokens: int) -> tuple:
        case = partial(plan.answers_between, bench, batch, new_tokens, again=new_tokens == 32)
        return f"{new_tokens} tokens, batch {batch}", answer_seconds.get((batch, new_tokens), batch + 20), [case]

    largest = [partial(plan.largest_batch_at_once, bench, 8, m) for m in ("stock", *bench.our_methods[:-1])]
    return [
        *(first(batch) for batch in descending),
        ("selection", 4, [partial(plan.selection, bench, batch) for batch in descending]),
        *(answers(batch, 32) for batch in sorted(descending, key=lambda batch: batch != 8)),
        *(answers(batch, 128) for batch in descending if batch == 8),
        ("largest batch", 20, largest),
        *(answers(batch, 128) for batch in descending if batch != 8),
    ]


def chosen(listed: list[tuple], names: list[str]) -> list[tuple]:
    by_name = {step[0]: step for step in listed}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"--steps has {unknown}: choose among {list(by_name)} (compiled ones need --compile).")
    return [by_name[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/benchmarks"))
    parser.add_argument("--shapes", nargs="+", default=["7B", "13B"], choices=list(SHAPES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--budget", type=int, default=64, help="visual tokens of the fixed mode")
    parser.add_argument("--minutes", type=float, default=60.0, help="leave out what no longer fits")
    parser.add_argument(
        "--steps", nargs="+", metavar="STEP", help="only these, in this order, e.g. 'first token' eager"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, some minutes for the first shape")
    arguments = parser.parse_args()

    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = torch.bfloat16 if has_gpu else torch.float32
    facts = {
        "device": torch.cuda.get_device_name() if has_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
        "budget": arguments.budget,
        "repeats": arguments.repeats,
        "left_out": [],
    }
    rows: list[plan.Row] = []
    with torch.no_grad(), (arguments.out / "rows.jsonl").open("w") as log:
        for index, name in enumerate(arguments.shapes):
            elapsed = time.monotonic() - started
            if index and elapsed > 60 * arguments.minutes - 15:
                facts["left_out"].append(name)
                continue
            models = build(SHAPES[name], device, dtype)
            repeats = arguments.repeats if not index else 3
            bench = plan.Bench(SHAPES[name], models, device, dtype, arguments.budget, repeats, facts["left_out"])
            print(f"{name} built after {time.monotonic() - started:.0f} s", flush=True)
            listed = steps(bench, tuple(arguments.batch_sizes), index == 0, arguments.compile)
            if arguments.steps is not None:
                listed = chosen(listed, arguments.steps)
            for title, estimate, cases in listed:
                begin = time.monotonic()
                if begin - started + (estimate if has_gpu else 0) > 60 * arguments.minutes:
                    facts["left_out"].append(f"{name}: {title}")
                    continue
                for case in cases:
                    try:
                        for row in case():
                            rows.append(row)
                            log.write(json.dumps(row) + "\n")
                            log.flush()
                    except Exception:  # a case that fails must not take the others with it
                        problem = traceback.format_exc(limit=-3)
                        facts["left_out"].append(f"{name}: {title} {case.args[1:]} failed: {problem}")
                        print(traceback.format_exc(), flush=True)
                    release()
                write_tables(arguments.out, rows, facts)
                print(f"{name} {title}: {time.monotonic() - begin:.1f} s", flush=True)
            del models, bench, listed
            release()
    write_report(arguments.out, rows, facts)


if __name__ == "__main__":
    main()
