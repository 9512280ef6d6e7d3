"""The comparison in one command:

    python -m evaluation --model checkpoints/tiny --split test --budgets 192 128 64 58 32 16 adaptive

Any repo that `hub_upload` made works in place of `checkpoints/tiny`; bring its questions as `--data questions.jsonl`
(see `evaluation.examples`). LLaVA-NeXT, budgets from the largest down, so that greedy rules run their loop once:

    python -m evaluation --model checkpoints/tiny-next --split test --images 2000 --budgets 640 320 160 adaptive

Writes results.json, results.csv, results.md and retained.png, and prints the table.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from evaluation.compared_model import load_compared
from evaluation.examples import load_examples
from evaluation.methods import METHODS, TILED_METHODS, find_methods, methods_of
from evaluation.report import make_table, markdown, write_table
from evaluation.runner import plan_runs, run_all


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or repo id of a recoverable-llava checkpoint")
    parser.add_argument("--data", help="'scenes', 'tiled scenes', or a file of questions; default: by the family")
    parser.add_argument("--split", default="validation", choices=("validation", "test", "combination"))
    parser.add_argument("--images", type=int, default=200, help="how many pictures to ask about")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    names = ", ".join([*METHODS, *(name for name in TILED_METHODS if name not in METHODS)])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"default: all of the family; {names}")
    parser.add_argument("--budgets", nargs="+", default=["58", "adaptive"], help="numbers of tokens, and 'adaptive'")
    parser.add_argument("--reference", default="ours", help="the method that the others are compared with")
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="FIELD=VALUE", help="our method's, e.g. text_share=0.5"
    )
    parser.add_argument("--output", type=Path, default=Path("evaluation/results"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare inputs")
    parser.add_argument("--seconds", type=float, help="ask as many questions as begin in this time")
    options = parser.parse_args(arguments)

    logging.set_verbosity_error()
    budgets = [None if budget == "adaptive" else int(budget) for budget in options.budgets]
    model, processor = load_compared(options.model, options.dtype)
    model = model.to(options.device)
    methods = methods_of(model.config.model_type)
    runs = plan_runs(find_methods(options.methods or list(methods), methods), budgets)
    options.data = options.data or ("scenes" if methods is METHODS else "tiled scenes")
    images, examples = load_examples(options.data, options.split, options.images, options.seed)
    for setting in options.settings:
        name, _, value = setting.partition("=")
        if not value or not hasattr(model.config, name):
            raise ValueError(f"--settings has {setting!r}: pass FIELD=VALUE with a field of the model's configuration.")
        setattr(model.config, name, json.loads(value))

    start = time.perf_counter()
    outcomes = run_all(
        model,
        processor,
        images,
        examples,
        runs,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        workers=options.workers,
        seconds=options.seconds,
    )
    examples = examples[: len(outcomes[0].answers)]
    rows = make_table(examples, outcomes, options.reference)
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    facts = {name: str(value) for name, value in vars(options).items()} | {
        "pictures": len({example.image for example in examples}),
        "questions": len(examples),
        "seconds": round(time.perf_counter() - start, 1),
        "hardware": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "defaults": {
            name: value for name, value in model.config.to_diff_dict().items() if not isinstance(value, (dict, list))
        },
    }
    write_table(rows, facts, options.output)
    print(markdown(rows))
    print(f"\n{len(examples)} questions about {facts['pictures']} pictures on {device}: {options.output}")


if __name__ == "__main__":
    main()
