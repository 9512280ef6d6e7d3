"""The model card: what a person wants to know before loading the repository, with measured results only."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hub_upload.known_bases import has_tuned_tower
from hub_upload.provenance import CARD, OVERLAY


# The built folder does not know yet where it will live; publishing fills this in.
REPO_ID_PLACEHOLDER = "OWNER/NAME"
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
PAPER = "[arXiv 2409.01179](https://arxiv.org/abs/2409.01179)"
ILLUSTRATION_START, ILLUSTRATION_END = "<!-- illustration -->", "<!-- end of illustration -->"

CITATION = """@inproceedings{chen2025recoverable,
  title     = {Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information},
  author    = {Chen, Yi and Xu, Jian and Zhang, Xu-Yao and Liu, Wen-Zhuo and Liu, Yang-Yang and Liu, Cheng-Lin},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2025},
  url       = {https://arxiv.org/abs/2409.01179}
}"""


@dataclass(frozen=True)
class BaseCard:
    """What the base's own card states and ours passes on."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_model: tuple[str, ...] = ()
    states_license: bool = False  # False where the publisher named the license instead


def read_base_card(folder: Path) -> BaseCard:
    """The card in `folder`; a field that is no text, or no repo id where one belongs, counts as missing."""
    from huggingface_hub import ModelCard

    if not (folder / CARD).is_file():
        return BaseCard()
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        data = ModelCard(text, ignore_metadata_errors=True).data
    except Exception as error:  # of the YAML reader, for what is no YAML
        raise ValueError(f"base: the metadata of its {CARD} cannot be read ({error}): correct or remove it") from None
    made_from = data.get("base_model")
    made_from = made_from if isinstance(made_from, list) else [made_from]
    stated = {name: _line(data.get(name)) for name in ("license", "license_name", "license_link")}
    repo_ids = tuple(name for name in made_from if isinstance(name, str) and REPO_ID.fullmatch(name))
    return BaseCard(**stated, base_model=repo_ids, states_license=stated["license"] is not None)


def _line(value: Any) -> str | None:
    """A text on one line that can stand in Markdown as code; None for anything else."""
    return " ".join(value.replace("`", "").split()) or None if isinstance(value, str) else None


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


def _page(repo_id: str) -> str:
    return f"https://huggingface.co/{repo_id}"


def _named(source: dict[str, Any], stated: BaseCard | None = None) -> str:
    if "repo_id" in source:
        page, revision = _page(source["repo_id"]), source["revision"]
        return f"[{source['repo_id']}]({page}) (commit [`{revision[:8]}`]({page}/tree/{revision}))"
    made_from = ", ".join(f"[{name}]({_page(name)})" for name in (stated.base_model if stated else ()))
    made_from = f", made from {made_from}" if made_from else ""
    return f"`{_line(source['folder'])}` (a local checkpoint of the publisher{made_from})"


def _title(source: dict[str, Any]) -> str:
    return str(source.get("repo_id") or _line(source["folder"])).split("/")[-1]


# ------------------------------------------------------------------------------------- what the settings do, in words


def _what_it_keeps(config: dict[str, Any]) -> str:
    """Follows "drops visual tokens:"."""
    if config["selection"] == "paper":
        rest = "merges what is left around a few centres"
        return f"it keeps what the vision tower attends to, **recovers what the question asks about**, and {rest}"
    rest = "merges what is left into one token" if config["merge_remaining"] else "drops what is left"
    return (
        "it chooses patches by their importance and by how unlike each other they are, "
        f"{100 * config['text_share']:.0f} % of them for **what the question asks about** and the others for what the "
        f"vision tower attends to, and {rest}"
    )


def _whose_selection(config: dict[str, Any]) -> str:
    if config["selection"] == "paper":
        return f"The selection is that of Chen et al., {PAPER}, with the settings below; no training is involved."
    return (
        f"The idea of recovering tokens for the question, without training, is that of Chen et al., {PAPER}; how "
        "tokens are chosen here is not the paper's. "
        '`model.config.use_preset("paper")` switches to the paper\'s way.'
    )


def _how_many(config: dict[str, Any], checked: Any) -> str:
    budget, least, most = (config[name] for name in ("visual_token_budget", "min_visual_tokens", "max_visual_tokens"))
    of_tile = checked.grid_width**2
    is_tiled = checked.num_patches > of_tile
    num_tokens = checked.num_patches + checked.num_class_tokens
    patches = f"up to {num_tokens:,}" if is_tiled else f"{num_tokens:,}"
    if budget is not None:
        share = f"({100 * budget / num_tokens:.0f} %{' of the most' if is_tiled else ''})"
        larger = " An image that has fewer is refused." if budget > of_tile and is_tiled else ""
        return (
            f"Every image takes exactly **{budget:,} of {patches}** visual tokens in the language model {share}, "
            f"whatever the image and the question.{larger}"
        )
    depends = {
        "novelty": "depends on the image alone: as many as show something new. The question has a say in which",
        "paper": "depends on the image and on the question: as many as stand out in class attention, then in relevance",
    }[config["selection"]]
    bounds = [f"at least {least}"] * (least > 1) + [f"at most {most}"] * (most is not None)
    within = f" ({' and '.join(bounds)})" if bounds else ""
    tiles = (
        f", by its shape: {of_tile} of the whole picture, and those of the tiles cut from it; new lines, which end "
        "each row of these, come on top. One selection runs over all of them, and new lines are dropped"
    )
    return (
        f"An image has {patches} visual tokens{tiles if is_tiled else ''}. How many stay{within} {depends}. "
        "`model.recover_tokens(**inputs)` tells the number for your own images without running the language model."
    )


def _fewer_tokens(config: dict[str, Any], least: int) -> str:
    """A line of code that lets fewer tokens stay, with these settings."""
    budget = config["visual_token_budget"]
    if budget is not None:
        fewer = 8 if least <= 8 < budget else max(least, budget // 2)
        return f"model.config.visual_token_budget = processor.visual_token_budget = {fewer}  # from the next prompt on"
    name, value = {"novelty": ("novelty_threshold", 0.5), "paper": ("lof_threshold", 2.0)}[config["selection"]]
    higher = value if config[name] < value else 2 * config[name]
    return f"model.config.{name} = {float(higher)}  # fewer tokens; takes effect on the next call"


def _other_tower(config: dict[str, Any], base: dict[str, Any], clip: dict[str, Any]) -> str:
    """A limit, where the vision tower of the base is not CLIP's."""
    is_tuned = has_tuned_tower(base.get("repo_id"), clip.get("repo_id"))
    tuned = ": LLaVA-1.6 was trained with its tower unfrozen" if is_tuned else ""
    chosen = f" (it chooses {100 * config['text_share']:.0f} % of the tokens here)"
    return (
        "- The vision tower of the base differs from the one that the question's text tower was trained with"
        f"{tuned}. The base's own tower stays, so that nothing changes in what the base sees; the question's text "
        f"tower and the visual projection are those of {_named(clip)}. Relevance to the question"
        f"{chosen if config['selection'] == 'novelty' else ''} is thus measured between two towers that were not "
        "trained together to the end. It can be less exact than with CLIP's own tower, and was not checked for this "
        "base."
    )


def _switch_off(config: dict[str, Any]) -> str:
    if config["visual_token_budget"] is not None:
        return (
            "model.config.compress, processor.visual_token_budget = False, None  # stock LLaVA, bit for bit, from the "
            "next prompt on"
        )
    return "model.config.compress = False  # stock LLaVA, bit for bit"


# ------------------------------------------------------------------------------------------------------------ the card


def _license(stated: BaseCard) -> str:
    if stated.license is None:
        return "The base model states no license; ask its authors before you use or pass on the weights."
    name = f"`{stated.license_name or stated.license}`"
    name = f"[{name}]({stated.license_link})" if stated.license_link else name
    if not stated.states_license:
        return f"License of the base model's weights, according to who published this repository: {name}."
    return f"The base model's weights keep the license that its card states: {name}."


def _license_link(link: str | None, base: dict[str, Any], files: dict[str, str]) -> str | None:
    """The base's link, where it leads somewhere from here: to the web, to a file that came along, or to the base."""
    if link is None or link.startswith(("https://", "http://")) or link in files:
        return link
    if "repo_id" not in base:
        return None
    return f"https://huggingface.co/{base['repo_id']}/blob/{base['revision']}/{link.removeprefix('./')}"


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
    checked: Any,
    provenance: dict[str, Any],
    stated: BaseCard,
    results: list[dict[str, Any]],
) -> str:
    """The card of a built folder.

    Args:
        config: what config.json holds.
        checked: the same as a configuration of the base's family.
        stated: what the base's card states.
        results: measured results, with the command of each.
    """
    from huggingface_hub import ModelCardData

    base, clip = provenance["base"], provenance["clip"]
    family = config["model_type"].removeprefix("recoverable_")
    stock_model, stock_processor = (
        config["auto_map"][name].split(".")[1].removeprefix("Recoverable")
        for name in ("AutoModelForImageTextToText", "AutoProcessor")
    )
    stated = replace(stated, license_link=_license_link(stated.license_link, base, provenance["files"]))
    # Without a known base, CLIP alone would look like what all of this was made from.
    made_from = [base["repo_id"]] if "repo_id" in base else [*stated.base_model]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=[*made_from, *([clip["repo_id"]] if "repo_id" in clip else [])] if made_from else None,
        base_model_relation="merge" if "repo_id" in base and "repo_id" in clip else None,
        license=stated.license,
        license_name=stated.license_name,
        license_link=stated.license_link,
        tags=["custom_code", family, "visual-token-compression", "recoverable-compression"],
    )
    settings = "\n".join(f"| `{name}` | `{json.dumps(config[name])}` |" for name in sorted(provenance["recovery"]))
    see_limits, other_tower = "", ""
    if provenance["vision_tower_differs"]:
        see_limits = ", which was trained with another vision tower than the base's: see [Limits](#limits)"
        other_tower = f"\n{_other_tower(config, base, clip)}"
    switched_off = (
        ""
        if config["compress"]
        else "\n**As published, compression is switched off**: `model.config.compress = True` switches it on.\n"
    )
    stock = base.get("repo_id", "path/to/the/base")
    question_length = checked.question_config.max_position_embeddings - 2  # without those for start and end
    return f"""---
{metadata.to_yaml()}
---

# {_title(base)} with recoverable visual token compression

The weights of {_named(base, stated)}, unchanged, plus a step between vision tower and language model that drops visual
tokens: {_what_it_keeps(config)}. {_whose_selection(config)} Relevance to the question comes from the text tower of
{_named(clip)}{see_limits}.
{switched_off}
## Use it

In a script that runs LLaVA, change these lines; the rest stays:

```diff
-from transformers import {stock_model}, {stock_processor}
+from transformers import AutoModelForImageTextToText, AutoProcessor
-model = {stock_model}.from_pretrained("{stock}")
-processor = {stock_processor}.from_pretrained("{stock}")
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

{_how_many(config, checked)} Prompt processing and the key-value cache shrink with the number; the
vision tower's work stays the same, plus one small text tower.

## Change it or switch it off

```python
print(model.recover_tokens(**inputs).selection.num_tokens)  # how many visual tokens stay, per image
{_fewer_tokens(config, 1 + checked.num_class_tokens)}
{_switch_off(config)}
```

| setting | value here |
|---|---|
{settings}

## Measured

{ILLUSTRATION_START}
{ILLUSTRATION_END}

{_results_table(results)}

## Limits

- Answers about small or crowded detail can get worse, as visual tokens are gone. Compare with compression off.
- Of the text, only the question guides the recovery: its first {question_length} CLIP tokens, in the language that the
  CLIP text tower knows.
- Continuous batching (`generate_batch`) of transformers has no image path.
- What the base model gets wrong, this one gets wrong too: biases and hallucinations carry over.{other_tower}

## What runs on your machine

`trust_remote_code=True` runs the Python files that [trust_remote_code.md](trust_remote_code.md) lists with their
SHA-256, and nothing else. Weights are safetensors. Pin a commit with `revision="<commit>"`: code and weights are in one
repository. [provenance.json](provenance.json) names where the weights come from, and the SHA-256 of every file but this
card.

## License

{_license(stated)} The question's text tower keeps the license of {_named(clip)}. The Python files are
Apache-2.0.

## Citation

```bibtex
{CITATION}
```
"""


def with_illustration(card: str, question: str, kept: dict[str, int], num_uncompressed: int, command: str) -> str:
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
        f"For this picture and the question “{question}”, {total:,} of {num_uncompressed:,} visual tokens remain: "
        f"{counts}. "
        f"Measured with `{command}`."
    )
    return f"{before}{ILLUSTRATION_START}\n{text}\n{ILLUSTRATION_END}{after}"


def published_card(card: str, repo_id: str) -> str:
    return card.replace(REPO_ID_PLACEHOLDER, repo_id)
