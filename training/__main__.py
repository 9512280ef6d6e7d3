"""`python -m training COMMAND`: atlas, tokenizers, train, export, evaluate, plot, card.

`--help` after a command lists its options.
"""

import argparse
import json
from dataclasses import fields

from .evaluate import PARTS
from .train import TrainingOptions, train


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("atlas", help="render the glyph atlas from the fonts")
    commands.add_parser("tokenizers", help="train both tokenizers on the recipe's text")
    trainer = commands.add_parser("train", help="train, or go on where the last call stopped")
    for item in fields(TrainingOptions):
        name = "--" + item.name.replace("_", "-")
        if isinstance(item.default, bool):
            trainer.add_argument(name, action=argparse.BooleanOptionalAction, default=item.default)
        else:
            optional = {"minutes": float, "steps": int, "stop_at_step": int, "base": str}
            kind = optional.get(item.name) or type(item.default)
            trainer.add_argument(name, type=kind, default=item.default)
    exporter = commands.add_parser("export", help="write stock LLaVA and CLIP folders, and the Hub repo made of both")
    exporter.add_argument("--run", default="runs/tiny", help="folder of the training run, or of a checkpoint")
    exporter.add_argument("--output", default="runs/tiny/export", help="where the two stock folders go")
    exporter.add_argument("--checkpoint", help="where the combined Hub repo goes")
    exporter.add_argument("--smoke", action="store_true")
    evaluator = commands.add_parser("evaluate", help="accuracy per kind of question and retrieval, on held-out scenes")
    evaluator.add_argument("--llava", default="runs/tiny/export/llava")
    evaluator.add_argument("--clip", default="runs/tiny/export/clip")
    evaluator.add_argument("--output", default="runs/tiny/figures.json")
    evaluator.add_argument("--count", type=int, default=2000, help="questions of each kind")
    evaluator.add_argument("--devices", default="cpu", help="for example cuda:0,cuda:1")
    evaluator.add_argument("--batch-size", type=int, default=16)
    evaluator.add_argument("--workers", type=int, default=0, help="processes that share the work")
    evaluator.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="the others stay as they are")
    plotter = commands.add_parser("plot", help="draw loss and accuracy curves of a run")
    plotter.add_argument("--run", default="runs/tiny")
    plotter.add_argument("--output", default="docs/pictures/training_curves.png")
    carder = commands.add_parser("card", help="write the checkpoint's model card from its figures")
    carder.add_argument("--figures", default="checkpoints/tiny/figures.json")
    carder.add_argument("--checkpoint", default="checkpoints/tiny")
    return parser.parse_args()


def main() -> None:
    arguments = vars(_arguments())
    command = arguments.pop("command")
    if command == "atlas":
        from .atlas import build_atlas

        build_atlas()
    elif command == "tokenizers":
        from .language import build_tokenizers

        build_tokenizers()
    elif command == "train":
        train(TrainingOptions(**arguments))
    elif command == "export":
        from .export import export

        export(**arguments)
    elif command == "evaluate":
        from .evaluate import evaluate

        print(json.dumps(evaluate(**arguments), indent=1))
    elif command == "plot":
        from .plot import plot

        plot(**arguments)
    elif command == "card":
        from .card import write_card

        write_card(**arguments)


if __name__ == "__main__":
    main()
