"""The command `recoverable-llava`: ask about one picture, or about every picture of a folder.

Exit codes: 0 all answered; 1 some pictures of a batch could not be read; 2 something to be put right by the caller,
said in one line; 130 interrupted.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


EMBEDDED_CHECKPOINT = "checkpoints/tiny"
PICTURE_SUFFIXES = tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN))


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
        "--budget", type=_at_least_one, metavar="K", help="exactly K visual tokens, however much is in the image"
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
        help="one line per picture; pictures that it has already are left out, so that a stopped run goes on "
        "(default: %(default)s)",
    )
    many.set_defaults(run=_batch)
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _config_settings(arguments: argparse.Namespace, config: Any) -> dict[str, Any]:
    from .asking import recovery_settings

    if arguments.no_compress:
        return {"compress": False}
    return recovery_settings(config, arguments.preset, arguments.threshold, arguments.budget)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from .asking import load

    if arguments.model == EMBEDDED_CHECKPOINT and not Path(EMBEDDED_CHECKPOINT).is_dir():
        raise ValueError(
            f"There is no folder {EMBEDDED_CHECKPOINT!r} here: run this in a clone of recoverable-llava, or name a "
            "folder or Hub repo with --model."
        )
    return load(arguments.model, arguments.device, arguments.dtype)


def _ask(arguments: argparse.Namespace) -> int:
    from .asking import ask, open_picture, user_turn
    from .visualize import draw_recovery

    if not arguments.question.strip():
        raise ValueError("QUESTION is empty: ask something.")
    if arguments.overlay and arguments.no_compress:
        raise ValueError("--overlay draws what compression keeps, and --no-compress keeps everything: leave one out.")
    if arguments.overlay and Path(arguments.overlay).suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--overlay is {arguments.overlay!r}: give it a picture's name, such as kept.png.")
    picture = open_picture(arguments.image)
    model, processor = _load(arguments)
    answer = ask(
        model,
        processor,
        [user_turn(arguments.question, picture)],
        max_new_tokens=arguments.max_new_tokens,
        **_config_settings(arguments, model.config),
    )
    print(answer.text)
    share = 100 * answer.num_tokens / answer.num_uncompressed
    print(
        f"{answer.num_tokens} of {answer.num_uncompressed} visual tokens ({share:.0f} %), {answer.seconds:.2f} s",
        file=sys.stderr,
    )
    if arguments.overlay:
        draw_recovery(picture, answer.recovery).save(arguments.overlay)
        print(f"Drew {arguments.overlay}", file=sys.stderr)
    return 0


def _batch(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .asking import ask, open_picture, user_turn

    folder, output = Path(arguments.folder), Path(arguments.output)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: pass a folder with pictures.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"The folder {str(folder)!r} has no pictures (files ending in .jpg, .png, .webp, …).")
    done = _answered(output, arguments.question)
    rest = [path for path in paths if path.relative_to(folder).as_posix() not in done]
    if not rest:
        print(f"{output} has an answer for all {len(paths)} pictures.", file=sys.stderr)
        return 0
    model, processor = _load(arguments)
    num_failed = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as lines:
        for path in tqdm(rest, initial=len(paths) - len(rest), total=len(paths), unit="picture"):
            try:
                picture = open_picture(path)
            except ValueError as error:
                num_failed += 1
                tqdm.write(f"recoverable-llava: {error}", file=sys.stderr)
                continue
            answer = ask(
                model,
                processor,
                [user_turn(arguments.question, picture)],
                max_new_tokens=arguments.max_new_tokens,
                **_config_settings(arguments, model.config),
            )
            line = {
                "image": path.relative_to(folder).as_posix(),
                "question": arguments.question,
                "answer": answer.text,
                "visual_tokens": answer.num_tokens,
                "seconds": round(answer.seconds, 3),
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            lines.flush()
    answered = f"{len(rest) - num_failed} answered, {len(done)} were answered before, {num_failed} unreadable"
    print(f"{output}: {answered}", file=sys.stderr)
    return 1 if num_failed else 0


def _answered(output: Path, question: str) -> set[str]:
    """Pictures that the file has an answer to this question for; a last line cut off by a stop is removed."""
    if not output.is_file():
        return set()
    text = output.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    try:
        lines = [json.loads(line) for line in complete.splitlines()]
        done = {line["image"] for line in lines if line["question"] == question}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"--output {str(output)!r} was not written by this command: name another file.") from None
    if complete != text:
        output.write_text(complete, encoding="utf-8")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = _parser().parse_args(arguments)
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
