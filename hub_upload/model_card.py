"""The model card: what a person wants to know before loading the repository, with measured results only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


# The built folder does not know yet where it will live; publishing fills this in.
REPO_ID_PLACEHOLDER = "OWNER/NAME"
OVERLAY = "recovery_overlay.png"
ILLUSTRATION_START, ILLUSTRATION_END = "<!-- illustration -->", "<!-- end of illustration -->"

CITATION = """@inproceedings{chen2025recoverable,
  title     = {Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information},
  author    = {Chen, Yi and Xu, Jian and Zhang, Xu-Yao and Liu, Wen-Zhuo and Liu, Yang-Yang and Liu, Cheng-Lin},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.01179}
}"""


def base_license(folder: Path) -> str | None:
    """The license that the base's own card states."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return None
    stated = ModelCard.load(card, ignore_metadata_errors=True).data.license
    return stated if isinstance(stated, str) else None


def read_results(path: Path | None) -> list[dict[str, Any]]:
    """Measured results: a JSON list of objects with `name`, `value` and the `command` that measured it."""
    if path is None:
        return []
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"results={str(path)!r} cannot be read as JSON: {error}") from None
    fields = {"name", "value", "command"}
    if not isinstance(results, list) or not all(isinstance(row, dict) and fields <= row.keys() for row in results):
        raise ValueError(
            f"results={str(path)!r} must hold a JSON list of objects with the keys name, value and command: the card "
            "states only what was measured, with the command that measured it"
        )
    return results


def _named(source: dict[str, Any]) -> str:
    if "repo_id" in source:
        page = f"https://huggingface.co/{source['repo_id']}"
        return f"[{source['repo_id']}]({page}) (commit [`{source['revision'][:8]}`]({page}/tree/{source['revision']}))"
    return f"`{source['folder']}` (a local checkpoint)"


def _title(source: dict[str, Any]) -> str:
    return str(source.get("repo_id") or source["folder"]).split("/")[-1]


def _savings(config: dict[str, Any], patches: int) -> str:
    budget, most = config["visual_token_budget"], config["max_visual_tokens"]
    if budget is not None:
        return (
            f"Every image takes exactly **{budget} of {patches}** visual tokens in the language model "
            f"({100 * budget / patches:.0f} %), whatever the image and the question."
        )
    bound = f", at most {most}" if most is not None else ""
    return (
        f"An image has {patches} visual tokens. How many stay{bound} depends on the image and on the question; the "
        "paper reports about 10 % on average for LLaVA-1.5. `model.recover_tokens(**inputs)` tells the number for "
        "your own images without running the language model. Prompt processing and the key-value cache shrink with "
        "it; the vision tower's work stays the same, plus one small text tower."
    )


def _selection(config: dict[str, Any]) -> str:
    if config["selection"] == "paper":
        return ""
    return "Unlike the paper's, this selection spends no token on a near copy of another. "


def _fewer_tokens(config: dict[str, Any]) -> str:
    """A line of code that lets fewer tokens stay, with these settings."""
    if config["visual_token_budget"] is not None:
        return "model.config.visual_token_budget = processor.visual_token_budget = 8  # from the next prompt on"
    name, value = ("novelty_threshold", 0.5) if config["selection"] == "novelty" else ("lof_threshold", 2.0)
    return f"model.config.{name} = {value}  # fewer tokens; takes effect on the next call"


def _results_table(results: list[dict[str, Any]]) -> str:
    if not results:
        return (
            "No benchmark has been run on this repository yet. Figures of the paper are for its authors' own code and "
            "are not repeated here."
        )
    rows = "\n".join(f"| {row['name']} | {row['value']} | `{row['command']}` |" for row in results)
    return f"| what | measured | with |\n|---|---|---|\n{rows}"


def model_card(
    config: dict[str, Any],
    provenance: dict[str, Any],
    num_tokens: int,
    license_name: str | None,
    results: list[dict[str, Any]],
) -> str:
    from huggingface_hub import ModelCardData

    base, clip = provenance["base"], provenance["clip"]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[source["repo_id"] for source in (base, clip) if "repo_id" in source] or None,
        base_model_relation="merge" if "repo_id" in base and "repo_id" in clip else None,
        license=license_name,
        tags=["custom_code", "llava", "visual-token-compression", "recoverable-compression"],
    )
    settings = "\n".join(f"| `{name}` | `{json.dumps(config[name])}` |" for name in sorted(provenance["recovery"]))
    tower = (
        "\n- The vision tower of the base differs from the one that the question's text tower was trained with. "
        "Relevance to the question was not checked for it."
        if provenance["vision_tower_differs"]
        else ""
    )
    license_line = (
        f"The weights keep the license of the base model: `{license_name}`."
        if license_name
        else "The base model states no license; ask its authors before you use or pass on the weights."
    )
    return f"""---
{metadata.to_yaml()}
---

# {_title(base)} with recoverable visual token compression

The weights of {_named(base)}, unchanged, plus a step between vision tower and language model that drops most visual
tokens: it keeps what the vision tower attends to, **recovers what the question asks about**, and merges the rest. No
training is involved (Chen et al., [arXiv 2409.01179](https://arxiv.org/abs/2409.01179)). {_selection(config)}Relevance
to the question comes from the text tower of {_named(clip)}.

## Use it

In a script that runs LLaVA, change these lines; the rest stays:

```diff
-model = LlavaForConditionalGeneration.from_pretrained("{base.get("repo_id", base.get("folder"))}")
-processor = LlavaProcessor.from_pretrained("{base.get("repo_id", base.get("folder"))}")
+model = AutoModelForImageTextToText.from_pretrained("{REPO_ID_PLACEHOLDER}", trust_remote_code=True)
+processor = AutoProcessor.from_pretrained("{REPO_ID_PLACEHOLDER}", trust_remote_code=True)
```

From nothing, with `photo.jpg` beside the script:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

repo = "{REPO_ID_PLACEHOLDER}"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)

content = [{{"type": "image", "url": "photo.jpg"}}, {{"type": "text", "text": "What colour is the car?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=50)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

or

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="{REPO_ID_PLACEHOLDER}", trust_remote_code=True)
chat = [{{"role": "user", "content": content}}]
print(ask(text=chat, max_new_tokens=50, return_full_text=False)[0]["generated_text"])
```

The question is the text of the last user message; `processor(..., questions=[...])` overrides it.

## What you save

{_savings(config, num_tokens)}

## Change it or switch it off

```python
print(model.recover_tokens(**inputs).selection.num_tokens)  # how many visual tokens stay, per image
{_fewer_tokens(config)}
model.config.compress = False  # stock LLaVA, bit for bit
```

| setting | value here |
|---|---|
{settings}

## Measured

{ILLUSTRATION_START}
{ILLUSTRATION_END}

{_results_table(results)}

## Limits

- Answers about small or crowded detail can get worse: most visual tokens are gone. Compare with `compress = False`.
- Only the question guides the recovery: its first 77 text tokens, in the language that the CLIP text tower knows.
- Continuous batching (`generate_batch`) of transformers has no image path.
- What the base model gets wrong, this one gets wrong too: biases and hallucinations carry over.{tower}

## What runs on your machine

`trust_remote_code=True` runs the Python files that [trust_remote_code.md](trust_remote_code.md) lists with their
SHA-256, and nothing else. Weights are safetensors. Pin a commit with `revision="<commit>"`: code and weights are in one
repository. [provenance.json](provenance.json) names where every weight comes from, with hashes.

## License

{license_line} The Python files are Apache-2.0.

## Citation

```bibtex
{CITATION}
```
"""


def with_illustration(card: str, question: str, kept: dict[str, int], patches: int, command: str) -> str:
    """`card` with the overlay picture and the counts that belong to it."""
    before, found_start, rest = card.partition(ILLUSTRATION_START)
    _, found_end, after = rest.partition(ILLUSTRATION_END)
    if not (found_start and found_end):
        raise ValueError(
            f"The card has no lines {ILLUSTRATION_START!r} and {ILLUSTRATION_END!r}: build the folder again"
        )
    counts = ", ".join(f"{count} {name}" for name, count in kept.items())
    total = sum(kept.values())
    text = (
        f"![what the model keeps of a picture]({OVERLAY})\n\n"
        f"For this picture and the question “{question}”, {total} of {patches} visual tokens remain: {counts}. "
        f"Measured with `{command}`."
    )
    return f"{before}{ILLUSTRATION_START}\n{text}\n{ILLUSTRATION_END}{after}"


def published_card(card: str, repo_id: str) -> str:
    return card.replace(REPO_ID_PLACEHOLDER, repo_id)
