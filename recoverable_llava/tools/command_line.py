"""The command `recoverable-llava`: ask about one picture, or about every picture of a folder.

Exit codes: 0 all answered; 1 some pictures of a batch could not be answered; 2 something to be put right by the caller,
said in one line; 130 interrupted.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .pictures import picture_suffixes


EMBEDDED_CHECKPOINT = "checkpoints/tiny"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recoverable-llava",
        description="Ask a LLaVA about pictures with a fraction of the visual tokens.",
        epilog="Example: recoverable-llava ask photo.jpg 'What is it?' --model OWNER/NAME --overlay kept.png",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model",
        default=EMBEDDED_CHECKPOINT,
        metavar="REPO",
        help="folder or Hub repo of a LLaVA with recoverable compression (default: %(default)s, as found in a clone)",
    )
    shared.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    shared.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision (default: the checkpoint's on a GPU, float32 on a CPU)",
    )
    shared.add_argument(
        "--max-new-tokens", type=_at_least_one, default=128, help="longest answer (default: %(default)s)"
    )
    compression = shared.add_mutually_exclusive_group()
    compression.add_argument("--no-compress", action="store_true", help="use every visual token, as stock LLaVA does")
    compression.add_argument(
        "--budget", type=_at_least_one, metavar="K", help="exactly K visual tokens per image, however much is in it"
    )
    shared.add_argument(
        "--preset", choices=("default", "paper"), help="how tokens are chosen (default: the model's way)"
    )
    shared.add_argument("--threshold", type=float, metavar="T", help="higher keeps fewer tokens (default: the model's)")

    one = commands.add_parser("ask", parents=[shared], help="answer a question about one picture")
    one.add_argument("image", metavar="IMAGE", help="picture file")
    one.add_argument("question", metavar="QUESTION")
    one.add_argument("--overlay", metavar="PNG", help="also draw which patches stayed, and for which reason")
    one.set_defaults(run=_ask)

    many = commands.add_parser("batch", parents=[shared], help="answer a question about every picture of a folder")
    many.add_argument("folder", metavar="FOLDER", help="its pictures, and those of its subfolders")
    many.add_argument("question", metavar="QUESTION")
    many.add_argument(
        "--output",
        metavar="JSONL",
        default="answers.jsonl",
        help="one line per picture; pictures that it has already, made by the same model with the same options, are "
        "left out, so that a stopped run goes on (default: %(default)s)",
    )
    many.set_defaults(run=_batch)
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _settings(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The checkpoint's config, and the fields of it that the arguments change, tried before any weight is loaded."""
    from .asking import read_config, recovery_settings
    from .settings import configured

    if arguments.model == EMBEDDED_CHECKPOINT and not Path(EMBEDDED_CHECKPOINT).is_dir():
        raise ValueError(
            f"There is no folder {EMBEDDED_CHECKPOINT!r} here: run this in a clone of recoverable-llava, or name a "
            "folder or Hub repo with --model."
        )
    config = read_config(arguments.model)
    if arguments.no_compress:
        if arguments.preset or arguments.threshold is not None:
            raise ValueError(
                "--no-compress keeps every token, and --preset and --threshold choose some: leave one out."
            )
        return config, {"compress": False}
    settings = recovery_settings(config, arguments.preset, arguments.threshold, arguments.budget)
    with configured(config, **settings):
        return config, settings


def _check_question(question: str) -> None:
    if not question.strip():
        raise ValueError("QUESTION is empty: ask something.")


def _warn_of_photos(model: str, picture: str | Path) -> None:
    from tqdm import tqdm

    tqdm.write(
        f"recoverable-llava: {model} knows drawn scenes only, such as those in demo/, and {str(picture)!r} is none: "
        "its answer means nothing. For photos, build a compressed LLaVA (docs/publishing.md) and name it with "
        "--model.",
        file=sys.stderr,
    )


def _ask(arguments: argparse.Namespace) -> int:
    from .asking import ask, is_unfamiliar, load, user_turn
    from .pictures import open_picture
    from .visualize import draw_recovery

    _check_question(arguments.question)
    overlay = Path(arguments.overlay) if arguments.overlay else None
    if overlay is not None:
        if arguments.no_compress:
            raise ValueError(
                "--overlay draws what compression keeps, and --no-compress keeps everything: leave one out."
            )
        _check_overlay(overlay)
    picture = open_picture(arguments.image)
    config, settings = _settings(arguments)
    if is_unfamiliar(config, picture):
        _warn_of_photos(arguments.model, arguments.image)
    model, processor = load(arguments.model, arguments.device, arguments.dtype)
    answer = ask(
        model,
        processor,
        [user_turn(arguments.question, picture)],
        max_new_tokens=arguments.max_new_tokens,
        **settings,
    )
    print(answer.text)
    share = 100 * answer.num_tokens / answer.num_uncompressed
    print(
        f"{answer.num_tokens} of {answer.num_uncompressed} visual tokens ({share:.0f} %), {answer.seconds:.2f} s",
        file=sys.stderr,
    )
    if overlay is not None:
        try:
            draw_recovery(picture, answer.recovery).save(overlay)
        except OSError as error:  # such as a full disk; it does not name the file
            raise ValueError(f"--overlay {str(overlay)!r} cannot be written: {error.strerror or error}.") from error
        print(f"Drew {overlay}", file=sys.stderr)
    return 0


def _check_overlay(path: Path) -> None:
    """Before anything is computed."""
    if path.suffix.lower() not in picture_suffixes():
        raise ValueError(f"--overlay is {str(path)!r}: give it a picture's name, such as kept.png.")
    if path.exists() and not path.is_file():
        raise ValueError(f"--overlay {str(path)!r} is no file: name another.")
    if not path.parent.is_dir():
        raise ValueError(f"--overlay {str(path)!r}: there is no folder {str(path.parent)!r}.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--overlay {str(path)!r} cannot be written: it, or its folder, is not yours to write to.")


def _batch(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .answers_file import AnswersFile
    from .asking import ask, is_unfamiliar, load, user_turn
    from .pictures import open_picture

    _check_question(arguments.question)
    folder, output = Path(arguments.folder), Path(arguments.output)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: pass a folder with pictures.")
    suffixes = picture_suffixes()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    pictures = {path.relative_to(folder).as_posix(): path for path in files}
    if not pictures:
        raise ValueError(f"The folder {str(folder)!r} has no pictures (files ending in .jpg, .png, .webp, …).")
    config, settings = _settings(arguments)
    num_failed, warned = 0, False
    with AnswersFile(output, arguments.question, _made_by(arguments)) as answers:
        rest = {name: path for name, path in pictures.items() if not answers.has(name, path)}
        if not rest:
            print(f"{output} has an answer for all {len(pictures)} pictures.", file=sys.stderr)
            return 0
        num_before = len(answers)
        model, processor = load(arguments.model, arguments.device, arguments.dtype)
        progress = tqdm(rest.items(), initial=len(pictures) - len(rest), total=len(pictures), unit="picture")
        for name, path in progress:
            try:
                picture = open_picture(path)
                if not warned and is_unfamiliar(config, picture):
                    _warn_of_photos(arguments.model, path)
                    warned = True
                messages = [user_turn(arguments.question, picture)]
                answer = ask(model, processor, messages, max_new_tokens=arguments.max_new_tokens, **settings)
            except ValueError as error:  # also of a picture that is too narrow for the budget
                num_failed += 1
                tqdm.write(f"recoverable-llava: {name}: {error}", file=sys.stderr)
                continue
            answers.add(
                name,
                path,
                answer=answer.text,
                visual_tokens=answer.num_tokens,
                visual_tokens_uncompressed=answer.num_uncompressed,
                seconds=round(answer.seconds, 3),
            )
    answered = f"{len(rest) - num_failed} answered, {num_before} were answered before, {num_failed} could not be"
    print(f"{output}: {answered}", file=sys.stderr)
    return 1 if num_failed else 0


def _made_by(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that decides an answer besides picture and question."""
    from .answers_file import checkpoint_version

    names = ("preset", "threshold", "budget", "no_compress", "dtype", "max_new_tokens")
    given = {name: value for name in names if (value := getattr(arguments, name)) not in (None, False)}
    return {"model": arguments.model, "version": checkpoint_version(arguments.model), **given}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = _parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a picture is said in a line of ours
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print("recoverable-llava: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"recoverable-llava: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
