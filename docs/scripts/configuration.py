"""Hook of mkdocs: writes the table of docs/configuration.md from the docstring of the configuration."""

import inspect
import re
from typing import Any

from recoverable_llava import RecoverableLlavaConfig


MARK = "<!-- fields of RecoverableLlavaConfig -->"
_FIELD = re.compile(r"^    (\w+) \((.+?)\):\n((?:        .+\n?)+)", re.MULTILINE)


def fields_table() -> str:
    """Name, type and default, and meaning of every documented field, as Markdown."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for name, kind, text in _FIELD.findall(inspect.getdoc(RecoverableLlavaConfig)):
        kind = kind.replace("*optional*", "optional").replace(", defaults to ", "<br>default ")
        rows.append(f"| `{name}` | {kind} | {' '.join(text.split())} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, fields_table()) if MARK in markdown else markdown
