"""Command line: python -m hub_upload {build, verify, illustrate, publish, push}."""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hub_upload.build import RECOVERY_SETTINGS, BuildFailure, build
from hub_upload.hub import HubFailure, redact
from hub_upload.provenance import PROVENANCE, is_same_build, read_provenance
from hub_upload.publish import Publication, publish


NAMES_SHOWN = 10


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m hub_upload", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    building = argparse.ArgumentParser(add_help=False)
    building.add_argument("base", metavar="BASE", help="LLaVA-1.5 or LLaVA-NeXT checkpoint: a folder or a repo id")
    building.add_argument(
        "--clip", help="its CLIP checkpoint: a folder or a repo id; known for llava-hf/llava-1.5-* and -v1.6-*"
    )
    building.add_argument("--base-revision", help="branch, tag or commit of a base on the Hub")
    building.add_argument("--clip-revision", help="branch, tag or commit of a CLIP on the Hub")
    building.add_argument("--chat-template", help="Jinja file, for a base that has none")
    building.add_argument("--license", help="for the card, if the base's card states none")
    building.add_argument("--results", help="JSON list of {name, value, command}: measured results for the card")
    building.add_argument(
        "--accept-different-vision-tower",
        action="store_true",
        help="build though the base's vision tower was fine-tuned; known of llava-hf/llava-v1.6-*",
    )
    recovery = building.add_argument_group("recovery settings, as in RecoverySettings")
    for name, kind in RECOVERY_SETTINGS.items():
        parse, shown = (parse_bool, "true|false") if kind is bool else (kind, kind.__name__)
        recovery.add_argument(f"--{name.replace('_', '-')}", type=parse, dest=name, metavar=shown)

    access = argparse.ArgumentParser(add_help=False)
    access.add_argument(
        "--token", help="better: set HF_TOKEN or run `hf auth login`, which leave no trace in the history"
    )

    publishing = argparse.ArgumentParser(add_help=False)
    publishing.add_argument("--private", action="store_true", help="make a new repository private")
    publishing.add_argument("--revision", help="branch to publish to, created if missing; default main")
    publishing.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    publishing.add_argument("--commit-message")
    publishing.add_argument("--dry-run", action="store_true", help="say what would be sent, change nothing on the Hub")

    command = commands.add_parser("build", parents=[building, access], help="make a folder that the Hub can serve")
    command.add_argument("--output", required=True, help="folder to make; must not exist")

    command = commands.add_parser("verify", parents=[access], help="check a folder or a published repository")
    command.add_argument("target", metavar="DIR_OR_REPO")
    command.add_argument("--revision", help="of a repository; default main")
    command.add_argument("--question")
    command.add_argument("--image", help="picture to ask about; default a gradient")
    command.add_argument("--device", help="such as cuda:0; default a GPU if there is one")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code even if it is not that of the installed package"
    )

    command = commands.add_parser("illustrate", help="put a picture of what is kept into the card")
    command.add_argument("folder", metavar="DIR")
    command.add_argument("--image", required=True)
    command.add_argument("--question", required=True)

    command = commands.add_parser("publish", parents=[publishing, access], help="publish a built folder in one commit")
    command.add_argument("folder", metavar="DIR")
    command.add_argument("repo_id", metavar="REPO_ID")

    command = commands.add_parser("push", parents=[building, publishing, access], help="build and publish")
    command.add_argument("repo_id", metavar="REPO_ID")
    command.add_argument(
        "--output", help="folder to build in; default the repository's name, here. It stays afterwards"
    )
    return main


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options that the user set; the others keep the defaults of the function that they go to."""
    values = vars(arguments)
    return {name: values[name] for name in names if values[name] is not None}


def _build(arguments: argparse.Namespace, output: Path) -> Path:
    sources = ("base_revision", "clip", "clip_revision", "accept_different_vision_tower", "token")
    names = (*sources, "chat_template", "license", "results")
    return build(arguments.base, output, **_given(arguments, (*names, *RECOVERY_SETTINGS)))


def _build_or_reuse(arguments: argparse.Namespace, output: Path) -> Path:
    """Builds; a folder left by an earlier push of the same things is taken again, so that a push can be repeated."""
    if not (output / PROVENANCE).is_file():
        return _build(arguments, output)
    with tempfile.TemporaryDirectory(prefix=f".{output.name[:48]}.again-", dir=output.parent) as temporary:
        again = _build(arguments, Path(temporary, output.name))
        if not is_same_build(read_provenance(again), read_provenance(output)):
            raise ValueError(
                f"output={str(output)!r} exists and was built from something else: choose another --output or delete it"
            )
    return output


def _publish(arguments: argparse.Namespace, folder: Path) -> Publication:
    names = ["private", "revision", "create_pr", "commit_message", "token", "dry_run"]
    return publish(folder, arguments.repo_id, **_given(arguments, names))


def summary(publication: Publication) -> str:
    counts = Counter(entry.action for entry in publication.files)
    sizes = {action: sum(entry.size for entry in publication.files if entry.action == action) for action in counts}
    words = {"add": "uploaded", "copy": "copied on the server", "keep": "unchanged", "delete": "removed"}
    verb = "Would be " if publication.dry_run else ""
    lines = [f"{verb}{words[name]}: {counts[name]} files, {sizes[name] / 1e6:.1f} MB" for name in words if counts[name]]
    if publication.not_sent:
        left = publication.not_sent
        more = f" and {len(left) - NAMES_SHOWN} more" if len(left) > NAMES_SHOWN else ""
        lines.append(f"Not sent, as the build did not write it: {', '.join(left[:NAMES_SHOWN])}{more}")
    if publication.dry_run:
        lines += [f"  {entry.action:<6} {entry.path}" for entry in publication.files if entry.action != "keep"]
        return "\n".join([f"Dry run: nothing was sent to {publication.url}", *lines])
    if publication.pull_request:
        return "\n".join([f"Pull request: {publication.pull_request}", *lines])
    return "\n".join(
        [
            f"Published: {publication.url}",
            *lines,
            f"Pinned: from_pretrained({publication.repo_id!r}, revision={publication.commit!r}, "
            "trust_remote_code=True)",
        ]
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.command == "build":
        print(f"Built {_build(arguments, Path(arguments.output))}")
    elif arguments.command == "publish":
        print(summary(_publish(arguments, Path(arguments.folder))))
    elif arguments.command == "push":
        folder = _build_or_reuse(arguments, Path(arguments.output or arguments.repo_id.split("/")[-1]))
        print(f"Built {folder}")
        print(summary(_publish(arguments, folder)))
    elif arguments.command == "illustrate":
        from hub_upload.illustrate import illustrate

        print(f"Drew {illustrate(arguments.folder, arguments.image, arguments.question)}")
    else:
        from hub_upload.inspection import table
        from hub_upload.verify import verify

        names = ("revision", "question", "image", "device", "trust_remote_code", "token")
        checks = verify(arguments.target, **_given(arguments, names))
        print(table(checks))
        return 0 if all(check.passed for check in checks) else 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    token = getattr(arguments, "token", None)
    try:
        return run(arguments)
    except (ValueError, HubFailure, BuildFailure) as error:
        print(f"error: {redact(str(error), token)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
    except Exception:
        print(f"error: unexpected\n{redact(traceback.format_exc(), token)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
