"""`python -m app`: start the demo app on this machine, with the embedded checkpoint or any other."""

import argparse
import sys
from collections.abc import Sequence

from app.interface import CSS, LARGEST_UPLOAD, THEME, build_interface
from recoverable_llava.tools.asking import load
from recoverable_llava.tools.command_line import EMBEDDED_CHECKPOINT


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    parser.add_argument("--model", default=EMBEDDED_CHECKPOINT, help="folder or Hub repo (default: %(default)s)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")
    parser.add_argument("--port", type=int, help="port on this machine (default: 7860, or the next free one)")
    parsed = parser.parse_args(arguments)
    try:
        model, processor = load(parsed.model, parsed.device)
    except ValueError as error:
        print(f"python -m app: {error}", file=sys.stderr)
        return 2
    interface = build_interface(model, processor, parsed.model)
    interface.queue(max_size=32).launch(server_port=parsed.port, max_file_size=LARGEST_UPLOAD, css=CSS, theme=THEME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
