"""What a base from a stranger can bring along: entries that name code on the Hub, and files of every kind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


EVIL_ID = "writer/evil"
EVIL = f"{EVIL_ID}--mod.Evil"
EVIL_CODE = "import os\nopen(os.environ['EVIL_MARK'], 'w').close()\nclass Evil:\n    pass\n"
SECRET = "the publisher's own secret"

# Every entry of a configuration that makes transformers run code of a repository, where each may stand.
HOSTILE_ENTRIES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [EVIL, EVIL]}},
    "processor_config.json": {
        "auto_map": {"AutoProcessor": EVIL},
        "image_processor": {"auto_map": {"AutoImageProcessor": EVIL}},
    },
    "config.json": {
        "auto_map": {"AutoConfig": EVIL, "AutoModelForImageTextToText": EVIL, "AutoTokenizer": EVIL},
        "custom_pipelines": {"image-text-to-text": {"impl": EVIL, "pt": ["AutoModelForImageTextToText"]}},
        "attn_implementation": "writer/evil-kernel",
        "text_config": {"auto_map": {"AutoConfig": EVIL}, "_attn_implementation": "writer/evil-kernel"},
        "vision_config": {"auto_map": {"AutoConfig": EVIL}},
    },
    "generation_config.json": {"custom_generate": EVIL_ID},
}
HOSTILE_CLIP_ENTRIES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [EVIL, EVIL]}},
    "config.json": {"auto_map": {"AutoConfig": EVIL}, "text_config": {"auto_map": {"AutoConfig": EVIL}}},
}


def merged(settings: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `added` in it, at every depth."""
    result = dict(settings)
    for name, value in added.items():
        inner = result.get(name)
        result[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def add_entries(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Adds entries to the configurations in `folder`; a file that is missing is made."""
    for name, added in entries.items():
        path = folder / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(merged(settings, added)), encoding="utf-8")


def add_code(folder: Path) -> None:
    """Files that from_pretrained would run, or would follow to another repository."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL_CODE + "def generate(model, **_): ...\n")
    (folder / "mod.py").write_text(EVIL_CODE)
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": EVIL_ID, "peft_type": "LORA", "task_type": "CAUSAL_LM"})
    )


def add_file(folder: Path, name: str, kind: str, secret: Path) -> None:
    """One extra file of a kind; what exists under that name stays."""
    path = folder / name
    if os.path.lexists(path):
        return
    if kind == "file":
        path.write_text("an extra file\n")
    elif kind == "folder":
        path.mkdir()
        (path / "generate.py").write_text(EVIL_CODE)
        (path / "inside.txt").symlink_to(secret)
    elif kind == "link out":
        path.symlink_to(secret)
    elif kind == "link to a folder":
        path.symlink_to(secret.parent)
    elif kind == "link inside":
        path.symlink_to("config.json")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "link to itself":
        path.symlink_to(name)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        raise ValueError(f"kind={kind!r} is none of {KINDS}")


KINDS = (
    "file",
    "folder",
    "link out",
    "link to a folder",
    "link inside",
    "broken link",
    "link to itself",
    "fifo",
)
