"""Our method taken apart: every step on its own, removed, or done another way, as rules that run like any peer's.

    python -m evaluation --model checkpoints/tiny --split validation --methods ablations --budgets 58 32 adaptive

`recovery` is the paper's pipeline on the package's own parts with every choice open; each entry of `ABLATIONS` changes
one of them. docs/ablations.md says what came out.

B images, N patches.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from recoverable_llava.token_recovery import (
    ATTENTION_POWER,
    LIKENESS_WIDTH,
    RELEVANCE_POWER,
    Assembly,
    Selection,
    assemble_tokens,
    select_tokens,
)
from torch.nn.functional import max_pool2d, normalize

from evaluation.evidence import Evidence
from evaluation.peers import assembly_of, highest, min_max
from recoverable_llava import RecoverableLlavaConfig
from recoverable_llava.local_outlier_factor import local_outlier_factor


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


def recovery(
    evidence: Evidence,
    budget: int | None,
    *,
    attention: str = "last layer",
    relevance: str = "value",
    steps: tuple[str, ...] = ("vision", "text", "merge"),
    neighbors: int = 20,
    threshold: float = 1.5,
    upper_tail: bool = False,
    merge_neighbors: int = 32,
    text_merge_weight: float = 50.0,
    merge_weights: str = "attention",
    merged_in_place: bool = False,
) -> Assembly:
    """The paper's steps: patches by class attention, by relevance, merged tokens; as many as their outliers ask.

    Args:
        steps: those that take part; with a budget the others share it.
        upper_tail: count only outliers above the median.
        merge_weights: "attention" or "uniform".
        merged_in_place: merged tokens stand where their centres are, not at the end.
    """
    visual, text = ATTENTIONS[attention](evidence).float(), evidence.relevance[relevance].float()
    num_patches = visual.shape[1]

    def outliers(scores: torch.Tensor, valid: torch.Tensor | None = None, count: int = neighbors) -> torch.Tensor:
        is_outlier = local_outlier_factor(scores, count, valid) > threshold
        return (is_outlier & (scores > scores.median(1, keepdim=True).values) if upper_tail else is_outlier).sum(1)

    num_visual = outliers(visual).clamp(min=1) * ("vision" in steps)
    kept = highest(visual, num_visual)
    unmet = torch.where(kept, text.amin(1, keepdim=True), text)
    num_text = outliers(unmet) * (num_patches - num_visual) // num_patches * ("text" in steps)
    left_over = ~(kept | highest(text.masked_fill(kept, -torch.inf), num_text))
    num_merged = (outliers(visual, left_over, neighbors // 2) + 1) * ("merge" in steps)
    if budget is not None:
        asked = torch.stack([num_visual, num_text, num_merged], dim=1)
        first = 0 if "vision" in steps else 1
        asked[:, first] += asked.sum(1) == 0
        num_visual, num_text, num_merged = _share(asked, budget, first).unbind(1)

    kept_by_vision = highest(visual, num_visual)
    recovered = highest(text.masked_fill(kept_by_vision, -torch.inf), num_text)
    left_over = ~(kept_by_vision | recovered)
    has_remaining = (num_merged > 0) & (num_merged < left_over.sum(1))
    centres = highest(visual.masked_fill(~left_over, -torch.inf), num_merged - has_remaining.long()) & left_over
    selection = Selection(
        kept_by_vision=kept_by_vision,
        recovered_by_text=recovered,
        merge_centres=centres,
        merges_remaining=has_remaining,
        num_visual=num_visual,
        num_text=num_text,
        num_merged=num_merged,
        num_tokens=num_visual + num_text + num_merged,
    )
    assembly = assemble_tokens(
        selection,
        visual if merge_weights == "attention" else torch.ones_like(visual),
        evidence.keys,
        text,
        num_tokens=int(selection.num_tokens.max()),
        num_merged=int(num_merged.max()),
        merge_neighbors=merge_neighbors,
        text_merge_weight=text_merge_weight,
    )
    return _in_place(assembly, centres) if merged_in_place else assembly


def distinct(
    evidence: Evidence,
    budget: int | None,
    *,
    attention: str = "last layer",
    relevance: str = "value",
    features: str = "projected",
    text_share: float = RecoverableLlavaConfig.text_share,
    reach: float = RecoverableLlavaConfig.text_reach,
    attention_power: float = ATTENTION_POWER,
    relevance_power: float = RELEVANCE_POWER,
    in_two_steps: bool = True,
    is_diverse: bool = True,
    width: float | None = LIKENESS_WIDTH,
    power: float = 0.5,
    threshold: float = RecoverableLlavaConfig.novelty_threshold,
) -> Assembly:
    """Patches by importance times distance to the nearest more important patch (density peaks).

    Importance is class attention first, then relevance for the tokens that are left; or both in one score.

    Args:
        text_share: share of the tokens that the relevance chooses, or its weight in the one score; 0 leaves it out.
        reach: how much of its relevance a patch lends the eight patches around it.
        attention_power, relevance_power: of the scores between 0 and 1, before all else.
        in_two_steps: False ranks by one score, the weighted geometric mean of class attention and relevance.
        is_diverse: False ranks by importance alone.
        width: how fast a patch's likes stop counting into its importance with their distance, in units of the image's
            mean distance between patches; None counts the patch alone.
        power: of what the likes score in all, in the importance.
        threshold: without a budget, patches farther than this from any more important one are kept; in the same units.
    """
    points = normalize(FEATURES[features](evidence).float(), dim=-1)
    distance = 1 - points @ points.transpose(1, 2)
    distance = distance / distance.mean((1, 2), keepdim=True)
    likeness = None if width is None else torch.exp(-distance / width)

    def importance_of(scores: torch.Tensor) -> torch.Tensor:
        return scores if likeness is None else scores * (likeness @ scores[:, :, None])[:, :, 0] ** power

    visual = importance_of(min_max(ATTENTIONS[attention](evidence).float()) ** attention_power)
    text = min_max(evidence.relevance[relevance].float()) ** relevance_power
    around = max_pool2d(text.unflatten(1, evidence.grid)[:, None], 3, stride=1, padding=1).flatten(1)
    text = importance_of(torch.maximum(text, reach * around))
    importance = visual if in_two_steps else visual ** (1 - text_share) * text**text_share
    apart = to_more_important(importance, distance)
    count = (apart > threshold).sum(1).clamp(min=1) if budget is None else torch.full_like(apart[:, 0], budget).long()
    key = importance * apart if is_diverse else importance
    if not in_two_steps:
        return assembly_of(highest(key, count))
    num_text = (count * text_share).round().long()
    kept = highest(key, count - num_text)
    apart = to_more_important(text.masked_fill(kept, torch.inf), distance)
    key = (text * apart if is_diverse else text).masked_fill(kept, -torch.inf)
    return assembly_of(kept | highest(key, num_text))


def recovery_by_novelty(
    evidence: Evidence,
    budget: int | None,
    *,
    features: str = "projected",
) -> Assembly:
    """The package's own selection by novelty, with its defaults."""
    visual, text = evidence.class_attention, evidence.relevance["value"]
    selection = select_tokens(
        visual,
        text,
        features=FEATURES[features](evidence),
        grid_width=evidence.grid[1],
        merge_centres=False,
        visual_token_budget=budget,
    )
    longest, most_merged = int(selection.num_tokens.max()), int(selection.num_merged.max())
    return assemble_tokens(
        selection, visual, evidence.keys, text, num_tokens=longest, num_merged=most_merged, merge_centres=False
    )


def to_more_important(importance: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """[B, N] distance of each patch to the nearest one of higher importance; the largest of all for the first."""
    rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    is_more_important = rank[:, None, :] < rank[:, :, None]
    nearest = distance.masked_fill(~is_more_important, torch.inf).amin(2)
    return torch.where(nearest.isfinite(), nearest, distance.amax((1, 2))[:, None])


def with_constant_guide(evidence: Evidence, budget: int | None) -> Assembly:
    """The paper's steps guided by the constant system prompt at the last padded position, as its release does."""
    guide = normalize(evidence.constant_guide.float(), dim=-1)
    embeds = evidence.relevance_embeds["projected"]
    scores = (embeds @ guide[:, :, None]).squeeze(2)
    return recovery(
        replace(evidence, relevance={**evidence.relevance, "projected": scores}), budget, relevance="projected"
    )


def _share(asked: torch.Tensor, budget: int, first: int) -> torch.Tensor:
    """[B, kinds] whole numbers in proportion to `asked` that sum to the budget; kind `first` takes what is left."""
    shares = asked * budget // asked.sum(1, keepdim=True)
    shares[:, first] += budget - shares.sum(1)
    return shares


def _in_place(assembly: Assembly, centres: torch.Tensor) -> Assembly:
    """The same tokens in raster order, a merged one where its centre stands, the remaining token last."""
    num_patches = centres.shape[1]
    order = (~centres).to(torch.uint8).argsort(dim=1, stable=True)[:, : assembly.merge_weights.shape[1]]
    is_centre = torch.arange(order.shape[1], device=centres.device) < centres.sum(1, keepdim=True)
    place_of_merged = torch.where(is_centre, order, num_patches)
    places = torch.cat([torch.arange(num_patches, device=centres.device).expand_as(centres), place_of_merged], dim=1)
    place = places.gather(1, assembly.token_index).masked_fill(~assembly.token_mask, num_patches + 1)
    return replace(assembly, token_index=assembly.token_index.gather(1, place.argsort(dim=1, stable=True)))


ABLATIONS: dict[str, Callable[..., Assembly]] = {
    "steps: all three": recovery,
    "steps: vision alone": partial(recovery, steps=("vision",)),
    "steps: text alone": partial(recovery, steps=("text",)),
    "steps: without merging": partial(recovery, steps=("vision", "text")),
    "steps: without text": partial(recovery, steps=("vision", "merge")),
    "steps: without vision": partial(recovery, steps=("text", "merge")),
    "guide: constant prompt": with_constant_guide,
    "relevance: projected": partial(recovery, relevance="projected"),
    "relevance: negated": partial(recovery, relevance="negated"),
    "attention: layer before": partial(recovery, attention="layer before"),
    "attention: heads as one": partial(recovery, attention="heads as one"),
    "outliers: upper tail": partial(recovery, upper_tail=True),
    "outliers: 10 neighbours": partial(recovery, neighbors=10),
    "outliers: 40 neighbours": partial(recovery, neighbors=40),
    "outliers: above 2.0": partial(recovery, threshold=2.0),
    "merging: 8 neighbours": partial(recovery, merge_neighbors=8),
    "merging: without text": partial(recovery, text_merge_weight=0.0),
    "merging: plain means": partial(recovery, merge_weights="uniform"),
    "merging: in place": partial(recovery, merged_in_place=True),
    "package: projected features": recovery_by_novelty,
    "package: patch features": partial(recovery_by_novelty, features="patches"),
    "distinct": distinct,
    "distinct: not diverse": partial(distinct, is_diverse=False),
    "distinct: likes not counted": partial(distinct, width=None),
    "distinct: likes within 0.01": partial(distinct, width=0.01),
    "distinct: likes within 0.1": partial(distinct, width=0.1),
    "distinct: likes to the power 1": partial(distinct, power=1.0),
    "distinct: without question": partial(distinct, text_share=0.0),
    "distinct: relevance reaches nothing": partial(distinct, reach=0.0),
    "distinct: relevance reaches by 0.5": partial(distinct, reach=0.5),
    "distinct: relevance to the power 1": partial(distinct, relevance_power=1.0),
    "distinct: relevance to the power 2": partial(distinct, relevance_power=2.0),
    "distinct: attention to the power 1": partial(distinct, attention_power=1.0),
    "distinct: without question, attention to the power 1": partial(distinct, text_share=0.0, attention_power=1.0),
    "distinct: question 0.5": partial(distinct, text_share=0.5),
    "distinct: question 0.8": partial(distinct, text_share=0.8),
    "distinct: question alone": partial(distinct, text_share=1.0),
    "distinct: one score": partial(distinct, in_two_steps=False),
    "distinct: projected relevance": partial(distinct, relevance="projected"),
    "distinct: negated relevance": partial(distinct, relevance="negated"),
    "distinct: patch features": partial(distinct, features="patches"),
    "distinct: keys": partial(distinct, features="keys"),
    "distinct: centred features": partial(distinct, features="centred patches"),
    "distinct: attention of layer before": partial(distinct, attention="layer before"),
    "distinct: heads as one": partial(distinct, attention="heads as one"),
}
