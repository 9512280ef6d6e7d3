"""What is known of published checkpoints: their CLIP model, whether its tower was tuned, and settings that suit it."""

from __future__ import annotations

from typing import Any


OPENAI_CLIP = "openai/clip-vit-large-patch14-336"
# Trained with their vision tower unfrozen, so that it is not CLIP's any more.
TUNED_TOWERS = (
    "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-hf/llava-v1.6-34b-hf",
)
CLIP_OF_BASE = dict.fromkeys(("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", *TUNED_TOWERS), OPENAI_CLIP)
# CLIP ViT-L/14-336 scores patches the wrong way round (arXiv 2304.05653); TRIM and CDPruner publish with the sign
# turned.
SETTINGS_OF_CLIP: dict[str, dict[str, Any]] = {OPENAI_CLIP: {"text_relevance": "negated"}}


def defaults_for(base: str, clip: str | None) -> tuple[str, dict[str, Any]]:
    """The CLIP checkpoint that belongs to `base`, and recovery settings with published evidence for it."""
    if clip is None and base not in CLIP_OF_BASE:
        raise ValueError(
            f"clip=None: which CLIP checkpoint the vision tower of {base!r} comes from is known only for "
            f"{', '.join(CLIP_OF_BASE)}. Name it, for example clip={OPENAI_CLIP!r} for LLaVA-1.5 and LLaVA-1.6"
        )
    known = CLIP_OF_BASE.get(base, "")
    return clip or known, SETTINGS_OF_CLIP.get(clip or known, SETTINGS_OF_CLIP.get(known, {}))


def has_tuned_tower(base: str | None, clip: str | None) -> bool:
    """Whether it is known that `base` was trained with the vision tower of `clip` unfrozen.

    Args:
        base, clip: repo ids, None for a folder: one may be called anything, and every CLIP of that shape differs.
    """
    return base in TUNED_TOWERS and clip == CLIP_OF_BASE[base]
