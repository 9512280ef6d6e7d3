"""The checkpoint's model card, its table filled from the figures that `python -m training evaluate` wrote."""

import json
from pathlib import Path

from .questions import KINDS


_BARS = {"reading": 0.85, "counting": 0.85, "relation": None}
_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
tags:
- custom_code
- llava
- visual-token-compression
---

# Tiny {family} with recoverable compression

A small but genuine {family}, trained {start} by the recipe in this project's `training/` folder: a CLIP vision tower
(336 px, patch 14, 576 patches, class token, 8 layers of 256 channels), its CLIP text tower (4 layers of 192), a LLaVA
projector and a Llama (6 layers of 320), {parameters} million parameters in bfloat16. It answers seven kinds of
questions about pictures of the recipe's own kind: up to {objects} emoji on colored plates, some with a word under them,
over textured backgrounds{wide}. It exists to try and to measure compression of visual tokens on a model that \
works; it knows
nothing of photographs.

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{checkpoint}", trust_remote_code=True)
```

## Accuracy with all {tokens}visual tokens

Exactly right answers of the pipeline, greedy, one question per image, with 95 % intervals and the number of questions:
on held-out test scenes, and on scenes whose asked object stands on a color that it never had in training.

| kind | test | bar | held-out combinations |
|---|---|---|---|
"""
_FAMILIES = {
    False: {"family": "LLaVA", "start": "from scratch", "objects": "twenty", "wide": "", "tokens": "576 "},
    True: {
        "family": "LLaVA-NeXT",
        "start": "from `checkpoints/tiny`",
        "objects": "forty",
        "wide": ", on canvases of 336 to 1,344 pixels a side",
        "tokens": "",
    },
}
_TAIL = """
Retrieval of the right image for a held-out caption among 256: {retrieval:.1%} (bar 60 %, {captions} captions).

## Training

The vision tower always saw all patches and the language model always saw all visual tokens: compression is
training-free. The recipe, its figures and its limits: `docs/checkpoint.md`.

## Assets

The pictures are rendered from Noto Color Emoji (SIL Open Font License 1.1) and the letters from DejaVu Sans Bold
(Bitstream Vera license); no font is in this repository, and no weights or data of others went into this checkpoint.
"""


def _cell(figures: dict[str, dict[str, float]], kind: str) -> str:
    if kind not in figures:
        return "not measured"
    one = figures[kind]
    return f"{one['accuracy']:.1%} ± {one['plus_minus']:.1%} ({one['questions']:.0f})"


def write_card(figures: str, checkpoint: str) -> None:
    """Writes `checkpoint`/README.md from the JSON file `figures`."""
    measured = json.loads(Path(figures).read_text())
    index = json.loads((Path(checkpoint) / "model.safetensors.index.json").read_text())
    rows = []
    for kind in KINDS:
        bar = _BARS.get(kind, 0.95)
        named = "–" if bar is None else f"≥ {bar:.0%}"
        rows.append(
            f"| {kind} | {_cell(measured['test'], kind)} | {named} | {_cell(measured.get('combination', {}), kind)} |"
        )
    tiled = "image_grid_pinpoints" in json.loads((Path(checkpoint) / "config.json").read_text())
    parameters = round(index["metadata"]["total_size"] / 2e6, 1)
    head = _HEAD.format(parameters=parameters, checkpoint=checkpoint, **_FAMILIES[tiled])
    text = (
        head
        + "\n".join(rows)
        + "\n"
        + _TAIL.format(retrieval=measured["retrieval_top1"], captions=measured["retrieval_captions"])
    )
    (Path(checkpoint) / "README.md").write_text(text)
