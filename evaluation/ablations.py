"""Our method taken apart: a step left out, or done another way, as rules that run like any peer's.

    python -m evaluation --model checkpoints/tiny --split validation --methods ablations --budgets 58 32 adaptive

`recovery` is the paper's selection and `distinct` the default one, both the package's own; each entry of `ABLATIONS`
changes what one of them is given, or one of its steps. docs/ablations.md says what came out.

B images, N patches.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import normalize

from evaluation.evidence import Evidence
from recoverable_llava.novelty_selection import contrast, cosine_distance, highest_around, importance, select_by_novelty
from recoverable_llava.paper_selection import number_of_outliers, select_by_outliers
from recoverable_llava.selection import Selection
from recoverable_llava.token_assembly import Assembly, assemble_tokens, first_true


ATTENTIONS: dict[str, Callable[[Evidence], torch.Tensor]] = {
    "last layer": lambda evidence: evidence.class_attention,
    "layer before": lambda evidence: evidence.previous_class_attention,
    "heads as one": lambda evidence: evidence.undivided_class_attention,
}
FEATURES: dict[str, Callable[[Evidence], torch.Tensor]] = {
    "patches": lambda evidence: evidence.patches,
    "projected": lambda evidence: evidence.projected,
    "keys": lambda evidence: evidence.keys,
    "centred patches": lambda evidence: evidence.patches.float() - evidence.patches.float().mean(1, keepdim=True),
}


# The paper's selection


def recovery(
    evidence: Evidence,
    budget: int | None,
    *,
    attention: str = "last layer",
    relevance: str = "value",
    merging: dict[str, Any] | None = None,
    has_plain_means: bool = False,
    merged_in_place: bool = False,
    number_of_outliers: Callable[..., torch.Tensor] = number_of_outliers,
    **settings: Any,
) -> Assembly:
    """The package's `select_by_outliers`, which takes the settings, and `assemble_tokens`.

    Args:
        merging: settings of `assemble_tokens`.
        has_plain_means: merged tokens are not weighted by class attention.
        merged_in_place: merged tokens stand where their centres are, not at the end.
    """
    visual, text = ATTENTIONS[attention](evidence), evidence.relevance[relevance]

    def count(scores: torch.Tensor, valid: torch.Tensor | None, num_neighbors: int, threshold: float) -> torch.Tensor:
        if num_neighbors == 0:  # a step that is left out
            return torch.zeros_like(scores[:, 0], dtype=torch.long)
        return number_of_outliers(scores, valid, num_neighbors, threshold)

    selection = select_by_outliers(visual, text, visual_token_budget=budget, number_of_outliers=count, **settings)
    weights = torch.ones_like(visual) if has_plain_means else visual
    assembly = _assembled(selection, weights, evidence.keys, text, **(merging or {}))
    return _in_place(assembly, selection.centres) if merged_in_place else assembly


def some_outliers(*scores_and_settings: Any) -> torch.Tensor:
    """At least one, so that there is something to share where nothing is sure to ask for a token."""
    return number_of_outliers(*scores_and_settings).clamp(min=1)


def outliers_above(
    scores: torch.Tensor, valid: torch.Tensor | None, num_neighbors: int, threshold: Any
) -> torch.Tensor:
    """Those above the median alone."""
    is_above = scores > scores.median(1, keepdim=True).values
    return number_of_outliers(scores, valid, num_neighbors, torch.where(is_above, threshold, torch.inf))


WITHOUT_VISION = {"visual_lof_neighbors": 0, "min_visual_tokens": 0, "number_of_outliers": some_outliers}
WITHOUT_TEXT = {"text_lof_neighbors": 0}
WITHOUT_MERGING = {"merge_lof_neighbors": 0, "merge_remaining": False}


def with_constant_guide(evidence: Evidence, budget: int | None) -> Assembly:
    """The paper's steps guided by the constant system prompt at the last padded position, as its release does."""
    guide = normalize(evidence.constant_guide.float(), dim=-1)
    embeds = evidence.relevance_embeds["projected"]
    scores = (embeds @ guide[:, :, None]).squeeze(2)
    return recovery(
        replace(evidence, relevance={**evidence.relevance, "projected": scores}), budget, relevance="projected"
    )


def _in_place(assembly: Assembly, centres: torch.Tensor) -> Assembly:
    """The same tokens in raster order, a merged one where its centre stands, the remaining token last."""
    num_patches = centres.shape[1]
    order = first_true(centres, assembly.merge_weights.shape[1])
    is_centre = torch.arange(order.shape[1], device=centres.device) < centres.sum(1, keepdim=True)
    place_of_merged = torch.where(is_centre, order, num_patches)
    places = torch.cat([torch.arange(num_patches, device=centres.device).expand_as(centres), place_of_merged], dim=1)
    place = places.gather(1, assembly.token_index).masked_fill(~assembly.token_mask, num_patches + 1)
    return replace(assembly, token_index=assembly.token_index.gather(1, place.argsort(dim=1, stable=True)))


# The default selection


def distinct(
    evidence: Evidence,
    budget: int | None,
    *,
    attention: str = "last layer",
    relevance: str = "value",
    features: str = "projected",
    merge_remaining: bool = False,
    **settings: Any,
) -> Assembly:
    """The package's `select_by_novelty`, which takes the settings, without the token for the rest."""
    visual, text = ATTENTIONS[attention](evidence), evidence.relevance[relevance]
    selection = select_by_novelty(
        visual,
        cosine_distance(FEATURES[features](evidence)),
        text,
        around=highest_around(evidence.grid[1]),
        merge_remaining=merge_remaining,
        visual_token_budget=budget,
        **settings,
    )
    return _assembled(selection, visual, evidence.keys, text)


def likes_to_the_power(power: float, scores: torch.Tensor, distance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The package's importance with another power than the root of what near copies score; 0 leaves them out."""
    return scores * (importance(scores, distance, mean) / scores) ** (2 * power)


def one_importance(text_share: float, scores: torch.Tensor, distance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The weighted geometric mean of both kinds' importance, in the place of both."""
    visual, text = importance(scores, distance, mean).unbind(1)
    return (visual ** (1 - text_share) * text**text_share)[:, None].expand_as(scores)


def no_novelty(importances: torch.Tensor, distance: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Every patch as novel as any: importance alone ranks, and without a budget every patch counts."""
    return torch.full_like(importances, 2.0)


def _assembled(
    selection: Selection, visual: torch.Tensor, keys: torch.Tensor, text: torch.Tensor, **merging: Any
) -> Assembly:
    num_tokens, num_merged = int(selection.num_tokens.max()), int(selection.num_merged.max())
    return assemble_tokens(selection, visual, keys, text, num_tokens=num_tokens, num_merged=num_merged, **merging)


ABLATIONS: dict[str, Callable[..., Assembly]] = {
    "steps: all three": recovery,
    "steps: vision alone": partial(recovery, **WITHOUT_TEXT, **WITHOUT_MERGING),
    "steps: text alone": partial(recovery, **WITHOUT_VISION, **WITHOUT_MERGING),
    "steps: without merging": partial(recovery, **WITHOUT_MERGING),
    "steps: without text": partial(recovery, **WITHOUT_TEXT),
    "steps: without vision": partial(recovery, **WITHOUT_VISION),
    "guide: constant prompt": with_constant_guide,
    "relevance: projected": partial(recovery, relevance="projected"),
    "relevance: negated": partial(recovery, relevance="negated"),
    "attention: layer before": partial(recovery, attention="layer before"),
    "attention: heads as one": partial(recovery, attention="heads as one"),
    "outliers: upper tail": partial(recovery, number_of_outliers=outliers_above),
    "outliers: 10 neighbours": partial(recovery, visual_lof_neighbors=10, text_lof_neighbors=10, merge_lof_neighbors=5),
    "outliers: 40 neighbours": partial(
        recovery, visual_lof_neighbors=40, text_lof_neighbors=40, merge_lof_neighbors=20
    ),
    "outliers: above 2.0": partial(recovery, lof_threshold=2.0),
    "merging: 8 neighbours": partial(recovery, merging={"merge_neighbors": 8}),
    "merging: without text": partial(recovery, merging={"text_merge_weight": 0.0}),
    "merging: plain means": partial(recovery, has_plain_means=True),
    "merging: in place": partial(recovery, merged_in_place=True),
    "package: projected features": partial(distinct, merge_remaining=True),
    "package: patch features": partial(distinct, merge_remaining=True, features="patches"),
    "distinct": distinct,
    "distinct: not diverse": partial(distinct, novelty=no_novelty),
    "distinct: likes not counted": partial(distinct, importance=partial(likes_to_the_power, 0.0)),
    "distinct: likes within 0.01": partial(distinct, importance=partial(importance, likeness_width=0.01)),
    "distinct: likes within 0.1": partial(distinct, importance=partial(importance, likeness_width=0.1)),
    "distinct: likes to the power 1": partial(distinct, importance=partial(likes_to_the_power, 1.0)),
    "distinct: without question": partial(distinct, text_share=0.0),
    "distinct: relevance reaches nothing": partial(distinct, text_reach=0.0),
    "distinct: relevance reaches by 0.5": partial(distinct, text_reach=0.5),
    "distinct: relevance to the power 1": partial(distinct, contrast=partial(contrast, relevance_power=1.0)),
    "distinct: relevance to the power 2": partial(distinct, contrast=partial(contrast, relevance_power=2.0)),
    "distinct: attention to the power 1": partial(distinct, contrast=partial(contrast, attention_power=1.0)),
    "distinct: without question, attention to the power 1": partial(
        distinct, text_share=0.0, contrast=partial(contrast, attention_power=1.0)
    ),
    "distinct: question 0.5": partial(distinct, text_share=0.5),
    "distinct: question 0.8": partial(distinct, text_share=0.8),
    "distinct: question alone": partial(distinct, text_share=1.0),
    "distinct: one score": partial(distinct, importance=partial(one_importance, 0.9), text_share=0.0),
    "distinct: projected relevance": partial(distinct, relevance="projected"),
    "distinct: negated relevance": partial(distinct, relevance="negated"),
    "distinct: patch features": partial(distinct, features="patches"),
    "distinct: keys": partial(distinct, features="keys"),
    "distinct: centred features": partial(distinct, features="centred patches"),
    "distinct: attention of layer before": partial(distinct, attention="layer before"),
    "distinct: heads as one": partial(distinct, attention="heads as one"),
}
