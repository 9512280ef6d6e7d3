"""Hook of mkdocs: writes the table of docs/configuration.md from the docstrings of the settings."""

import inspect
import re
from typing import Any

from recoverable_llava.recovery_settings import RecoverySettings, RecoverySettingsMixin


MARK = "<!-- fields of every configuration -->"
_FIELD = re.compile(r"^    (\w+) \((.+?)\):\n((?:        .+\n?)+)", re.MULTILINE)


def fields_table() -> str:
    """Name, type and default, and meaning of every documented field, as Markdown."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    documented = "\n".join(inspect.getdoc(settings) + "\n" for settings in (RecoverySettings, RecoverySettingsMixin))
    for name, kind, text in _FIELD.findall(documented):
        kind = kind.replace("*optional*", "optional").replace(", defaults to ", "<br>default ")
        rows.append(f"| `{name}` | {kind} | {' '.join(text.split())} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, fields_table()) if MARK in markdown else markdown
