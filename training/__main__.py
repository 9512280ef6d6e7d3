"""`python -m training COMMAND`: atlas, tokenizers, train, export, evaluate, plot. `--help` after a command lists options."""

import argparse
from dataclasses import fields
from pathlib import Path

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
            kind = {"minutes": float, "steps": int, "stop_at_step": int}.get(item.name) or type(item.default)
            trainer.add_argument(name, type=kind, default=item.default)
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


if __name__ == "__main__":
    main()
