"""Published rules of visual token selection, each from its formula, as pure functions of a batch.

A rule takes the `Evidence` of a batch and a budget and returns the `Assembly` that our own model uses: kept patches
in raster order, then merged tokens. So every rule runs through the same model, and differs in nothing but the rule.
Formulas, and what each release does that its paper leaves open, follow the authors' public code; where a release keeps
the class token as one more visual token (VisionZip) it is left out, since LLaVA drops it.

How each release spreads its tokens over the tiles of LLaVA-NeXT is in `tiled_peers.py`.

B images, N patches, C channels, K kept tokens, M merged tokens.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch.nn.functional import normalize

from evaluation.evidence import Evidence
from recoverable_llava.paper_selection import number_of_outliers
from recoverable_llava.selection import highest, last_where_not
from recoverable_llava.token_assembly import Assembly, first_true


SelectionRule = Callable[[Any, int | None], Assembly]
# Of the patches that a greedy rule looks at before each pick.
LOOKED_AT = 64


class Greedy:
    """A rule that picks one patch after the other: the picks of a smaller budget are the first of a larger one's.

    They are kept with the evidence, so that the budgets of a method, the largest first, are one run of its loop.
    """

    def __init__(self, picks: Callable[..., torch.Tensor]) -> None:
        """picks: gives the patches [B, budget] in the order in which they are picked."""
        self.picks = picks
        update_wrapper(self, picks)

    def __call__(self, evidence: Evidence, budget: int | torch.Tensor, **options: Any) -> Assembly:
        """budget: one for all images, or [B] long."""
        most = int(budget.max()) if isinstance(budget, torch.Tensor) else budget
        key = (self.picks, *sorted(options.items()))
        order = evidence.picked.get(key)
        if order is None or order.shape[1] < most:
            order = evidence.picked[key] = self.picks(evidence, most, **options)
        place = torch.arange(order.shape[1], device=order.device)
        is_first = place < (budget[:, None] if isinstance(budget, torch.Tensor) else budget)
        kept = torch.zeros_like(evidence.class_attention, dtype=torch.bool)
        return assembly_of(kept.scatter(1, order, is_first.expand_as(order)))


# Rules that do not look at the picture


def random_patches(evidence: Evidence, budget: int) -> Assembly:
    """A uniformly random subset of each image, the same in every run."""
    scores = torch.rand(evidence.class_attention.shape, generator=torch.Generator().manual_seed(0))
    scores = last_where_not(evidence.valid, scores.to(evidence.patches.device))
    return assembly_of(highest(scores, budget))


def uniform_grid(evidence: Evidence, budget: int) -> Assembly:
    """The patch in the middle of each of `budget` cells that tile the picture."""
    cells = cells_of_grid(evidence.grid, budget).to(evidence.patches.device)
    members = torch.nn.functional.one_hot(cells, budget).T.bool()
    middle = (members.cumsum(1) == (members.sum(1, keepdim=True) + 1) // 2) & members
    return assembly_of(middle.any(0).expand(len(evidence.patches), -1))


def average_pooling(evidence: Evidence, budget: int) -> Assembly:
    """The mean over each of `budget` cells that tile the picture."""
    cells = cells_of_grid(evidence.grid, budget).to(evidence.patches.device)
    members = torch.nn.functional.one_hot(cells, budget).T.float()
    weights = (members / members.sum(1, keepdim=True)).expand(len(evidence.patches), -1, -1)
    return assembly_of(torch.zeros_like(evidence.class_attention, dtype=torch.bool), weights)


# Rules that look at the picture


def class_attention(evidence: Evidence, budget: int) -> Assembly:
    """The patches with the highest class attention of the last layer (FasterVLM, arXiv 2412.01818)."""
    return assembly_of(highest(evidence.class_attention, budget))


def visionzip(evidence: Evidence, budget: int, contextual_share: float = 10 / 64) -> Assembly:
    """VisionZip (arXiv 2412.04467): dominant tokens by class attention, the rest averaged into contextual tokens.

    Contextual tokens are spread evenly over the rest; every other patch joins the one with the nearest key, and their
    mean is *added* to it, as in the release (which writes it as target plus aggregate).
    """
    num_contextual = max(1, round(budget * contextual_share)) if budget > 1 else 0
    dominant = highest(evidence.previous_class_attention, budget - num_contextual)
    if num_contextual == 0:
        return assembly_of(dominant)
    rest = _indices(~dominant)  # [B, R]
    step = max(1, rest.shape[1] // num_contextual)
    is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
    is_target[torch.arange(0, rest.shape[1], step, device=rest.device)[:num_contextual]] = True
    targets, others = rest[:, is_target], rest[:, ~is_target]
    keys = normalize(evidence.previous_keys.float(), dim=-1)
    similarity = _take(keys, others) @ _take(keys, targets).transpose(1, 2)
    joins = torch.nn.functional.one_hot(similarity.argmax(2), targets.shape[1]).float()  # [B, others, M]
    joins = joins / joins.sum(1, keepdim=True).clamp(min=1)
    weights = torch.zeros(*targets.shape, dominant.shape[1], device=keys.device)
    weights.scatter_(2, others[:, None, :].expand(-1, targets.shape[1], -1), joins.transpose(1, 2))
    weights.scatter_(2, targets[:, :, None], 1.0)
    return assembly_of(dominant, weights)


def prumerge(evidence: Evidence, budget: int | None) -> Assembly:
    """PruMerge (arXiv 2403.15388): outliers of class attention, each with what is near it added, plus one for the rest.

    Without a budget: as many centres as values above the upper quartile by 1.5 interquartile ranges.
    """
    attention = evidence.undivided_class_attention
    count = _num_above_quartiles(attention) if budget is None else budget - 1
    return _prumerge(evidence, highest(attention, count))


def prumerge_plus(evidence: Evidence, budget: int | None) -> Assembly:
    """PruMerge+: the same with evenly spaced patches as further centres, about three for each outlier."""
    attention = evidence.undivided_class_attention
    num_patches = attention.shape[1]
    if budget is None:
        count = _num_above_quartiles(attention)
        step = ((num_patches // count.clamp(min=1)) // 3).clamp(min=1)
        evenly = torch.arange(num_patches, device=attention.device) % step[:, None] == 0
        return _prumerge(evidence, highest(attention, count) | evenly)
    outliers = highest(attention, (budget - 1) // 4)
    others = _indices(~outliers)
    wanted = budget - 1 - (budget - 1) // 4
    picks = others[:, torch.arange(wanted, device=others.device) * others.shape[1] // max(1, wanted)]
    return _prumerge(evidence, outliers.scatter(1, picks, True))


@Greedy
def divprune(evidence: Evidence, budget: int) -> torch.Tensor:
    """DivPrune (arXiv 2503.02175): greedy largest smallest distance, 1 - cosine of projected tokens."""
    features = normalize(evidence.projected.float(), dim=-1)
    distance = 1 - features @ features.transpose(1, 2)
    if evidence.valid is not None:
        distance = distance.masked_fill(~evidence.valid[:, None], torch.inf)
    chosen, picked = _none_chosen(evidence), []
    # The first is the patch that lies farthest from its nearest other patch.
    to_nearest = distance.topk(2, dim=2, largest=False).values[:, :, 1]
    for step in range(budget):
        best = to_nearest.masked_fill(chosen, -torch.inf).argmax(1, keepdim=True)
        to_best = _take(distance, best)[:, 0]
        to_nearest = torch.minimum(to_nearest, to_best) if step else to_best
        chosen.scatter_(1, best, True)
        picked.append(best)
    return torch.cat(picked, dim=1)


@Greedy
def scope(evidence: Evidence, budget: int, alpha: float = 1.0) -> torch.Tensor:
    """SCOPE (arXiv 2510.24214): greedy gain in coverage of all patches, times class attention to the power alpha."""
    features = normalize(evidence.patches.float(), dim=-1)
    if evidence.valid is not None:
        features = features * evidence.valid[:, :, None]
    similarity = features @ features.transpose(1, 2)
    factor = evidence.previous_class_attention.float() ** alpha
    return _greedy_coverage(similarity, budget, _none_chosen(evidence), factor)


# Rules that look at the picture and the question


@Greedy
def cdpruner(evidence: Evidence, budget: int, relevance: str = "negated") -> torch.Tensor:
    """CDPruner (arXiv 2506.10967): greedy most probable set of a determinantal point process given the question."""
    features = normalize(evidence.projected.float(), dim=-1)
    scores = min_max(evidence.relevance[relevance].float(), evidence.valid, evidence.image) + 1e-6
    return _determinantal(features @ features.transpose(1, 2), scores, budget, _none_chosen(evidence))


@Greedy
def centred_cdpruner(evidence: Evidence, budget: int, relevance: str = "negated") -> torch.Tensor:
    """Cen-Prune's correction of CDPruner: mean-centred similarity, relevance times how unlike the others a patch is."""
    raw = normalize(evidence.projected.float(), dim=-1)
    centred = evidence.projected.float()
    centred = normalize(centred - centred.mean(1, keepdim=True), dim=-1)
    num_patches = raw.shape[1]
    likeness = ((raw * raw.sum(1, keepdim=True)).sum(2) - 1) / (num_patches - 1)
    scores = (min_max(evidence.relevance[relevance].float()) + 1e-6) * (min_max(-likeness) + 1e-6)
    return _determinantal(centred @ centred.transpose(1, 2), scores, budget, _none_chosen(evidence))


@Greedy
def facility_location(evidence: Evidence, budget: int, relevance: str = "negated") -> torch.Tensor:
    """EADP's selection: greedy coverage of all patches, each counted by its relevance to the question."""
    features = normalize(evidence.patches.float(), dim=-1)
    similarity = features @ features.transpose(1, 2)
    scores = min_max(evidence.relevance[relevance].float())
    return _greedy_coverage(scores[:, :, None] * similarity, budget, _none_chosen(evidence))


@Greedy
def mmtok(evidence: Evidence, budget: int, alpha: float = 0.5) -> torch.Tensor:
    """MMTok (arXiv 2508.18264): greedy coverage of the question's tokens and of all patches together.

    Temperatures and weight as released for LLaVA-1.5: 0.02 for text to vision, 0.2 for vision to vision, 0.5.
    """
    tokens = normalize(evidence.question_token_embeddings.float(), dim=-1)
    embeddings = normalize(evidence.patch_embeddings.float(), dim=-1)
    features = normalize(evidence.patches.float(), dim=-1)
    text, vision = tokens @ embeddings.transpose(1, 2) / 0.02, features @ features.transpose(1, 2) / 0.2
    exists = evidence.question_token_mask
    text = _softmax(text, evidence.valid) * (exists / exists.sum(1, keepdim=True).clamp(min=1))[:, :, None]
    exists = torch.ones_like(evidence.class_attention) if evidence.valid is None else evidence.valid
    vision = _softmax(vision, evidence.valid) * (exists / exists.sum(1, keepdim=True))[:, :, None]
    return _greedy_coverage(torch.cat([text, alpha * vision], dim=1), budget, _none_chosen(evidence))


def released_recoverable_compression(evidence: Evidence, budget: int | None) -> Assembly:
    """The paper's method as its public code runs it, with everything in which it departs from the paper's text.

    The guide is the constant system prompt, read at the last padded position; patches are projected without
    post_layernorm; all heads are taken as one; the number of centres is a share of the channel count instead of the
    remaining patches; keys of the remainder are read at positions of the full array; a centre may absorb other centres,
    by key similarity plus 50 times the *other's* text score; merged tokens are sums. With a budget, the three kinds of
    tokens share it in proportion to their counts without one.
    """
    attention = evidence.undivided_class_attention.float()
    num_patches, channels = evidence.patches.shape[1:]
    guide = normalize(evidence.constant_guide.float(), dim=-1)
    embeddings = normalize(evidence.bare_patch_embeddings.float(), dim=-1)
    similarity = (embeddings @ guide[:, :, None])[:, :, 0] * embeddings.shape[2] ** -0.5

    num_visual = _num_outliers(attention, 20)
    by_vision = highest(attention, num_visual)
    lowest = similarity.amin(1, keepdim=True)
    unmet = torch.where(by_vision, lowest, similarity)
    num_text = (num_patches - num_visual) * _num_outliers(unmet, 20) // num_patches
    rest = ~(by_vision | highest(unmet.masked_fill(by_vision, -torch.inf), num_text))
    num_centres = channels * _num_outliers(attention, 10, rest) // rest.sum(1).clamp(min=1)
    if budget is not None:
        asked = torch.stack([num_visual, num_text, num_centres + 1], dim=1).double()
        shares = (asked / asked.sum(1, keepdim=True) * budget).round().long()
        num_text, num_centres = shares[:, 1], (shares[:, 2] - 1).clamp(min=0)
        num_visual = budget - num_text - num_centres - 1
    by_vision = highest(attention, num_visual)
    kept = by_vision | highest(similarity.masked_fill(by_vision, -torch.inf), num_text)
    rest = ~kept
    num_centres = num_centres.minimum(rest.sum(1))
    centres = highest(attention.masked_fill(~rest, -torch.inf), num_centres)

    misplaced = _take(evidence.keys, (rest.cumsum(1) - 1).clamp(min=0))
    merged, is_centre = _absorb(centres, rest, misplaced, attention, 50 * similarity)
    remaining = (rest & ~centres) * attention
    # Without a single centre the release drops the token of the rest as well, unless a budget has to be met.
    has_remaining = (num_centres > 0) | (budget is not None)
    weights = torch.cat([merged, remaining[:, None]], dim=1)
    return assembly_of(kept, weights, torch.cat([is_centre, has_remaining[:, None]], dim=1))


# What the rules share


def assembly_of(
    kept: torch.Tensor, merge_weights: torch.Tensor | None = None, merged_mask: torch.Tensor | None = None
) -> Assembly:
    """Kept patches [B, N] in raster order, then merged tokens [B, M, N], as our model's gather takes them.

    merged_mask: [B, M] bool, False for rows of merge_weights that an image does not use. None means all True.
    """
    if merge_weights is None:
        merge_weights = torch.zeros(len(kept), 0, kept.shape[1], device=kept.device)
    if merged_mask is None:
        merged_mask = kept.new_ones(merge_weights.shape[:2])
    exists = torch.cat([kept, merged_mask], dim=1)
    count = exists.sum(1, keepdim=True)
    longest = int(count.max())
    return Assembly(
        merge_weights=merge_weights.float(),
        token_index=first_true(exists, longest),
        token_mask=torch.arange(longest, device=kept.device) < count,
    )


def min_max(scores: torch.Tensor, valid: torch.Tensor | None = None, image: torch.Tensor | None = None) -> torch.Tensor:
    """Scores [B, N] stretched to 0..1 within each row, or within all rows of an image.

    Args:
        valid: [B, N] bool; what is not valid becomes 0.
        image: [B] the number of each row's image.
    """
    low = (scores if valid is None else scores.masked_fill(~valid, torch.inf)).amin(1)
    high = (scores if valid is None else scores.masked_fill(~valid, -torch.inf)).amax(1)
    if image is not None:
        low = torch.full_like(low, torch.inf).scatter_reduce(0, image, low, "amin")[image]
        high = torch.full_like(high, -torch.inf).scatter_reduce(0, image, high, "amax")[image]
    stretched = (scores - low[:, None]) / (high - low).clamp(min=torch.finfo(scores.dtype).tiny)[:, None]
    return stretched if valid is None else stretched.masked_fill(~valid, 0)


def _none_chosen(evidence: Evidence) -> torch.Tensor:
    """[B, N] bool: what a greedy rule must not pick, before its first pick."""
    if evidence.valid is None:
        return torch.zeros_like(evidence.class_attention, dtype=torch.bool)
    return ~evidence.valid


def _softmax(logits: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Softmax of [B, R, N] over the valid patches."""
    return (logits if valid is None else logits.masked_fill(~valid[:, None], -torch.inf)).softmax(2)


def cells_of_grid(grid: tuple[int, int], count: int) -> torch.Tensor:
    """[N] the number of the cell of each patch: `count` nearly square cells in bands of rows tile the grid."""
    rows, columns = grid
    if not 1 <= count <= rows * columns:
        raise ValueError(f"budget must be between 1 and the number of patches ({rows * columns}), got {count}.")
    bands = min(rows, max(round((count * rows / columns) ** 0.5), -(-count // columns)))
    first = [band * count // bands for band in range(bands + 1)]
    band = torch.arange(rows) * bands // rows
    start = torch.tensor(first)[band]
    width = torch.tensor(first)[band + 1] - start
    return (start[:, None] + torch.arange(columns)[None] * width[:, None] // columns).flatten()


def _indices(mask: torch.Tensor) -> torch.Tensor:
    """[B, R] positions of the True entries of a mask [B, N] whose rows all have R of them."""
    return mask.nonzero()[:, 1].view(len(mask), -1)


def _take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [B, R, C] of a tensor [B, N, C] at positions [B, R]."""
    return tensor.gather(1, index[:, :, None].expand(-1, -1, tensor.shape[2]))


def _num_outliers(scores: torch.Tensor, neighbors: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """[B] number of outliers of the scores by Local Outlier Factor, both tails, at scikit-learn's threshold."""
    return number_of_outliers(scores, valid, neighbors, 1.5)


def _num_above_quartiles(scores: torch.Tensor) -> torch.Tensor:
    """[B] number of scores above the upper quartile by more than 1.5 interquartile ranges."""
    lower, upper = torch.quantile(scores.float(), torch.tensor([0.25, 0.75], device=scores.device), dim=1)
    return (scores > (upper + 1.5 * (upper - lower))[:, None]).sum(1)


def _prumerge(evidence: Evidence, centres: torch.Tensor) -> Assembly:
    attention = evidence.undivided_class_attention.float()
    everything = torch.ones_like(centres)
    merged, is_centre = _absorb(centres, everything, evidence.keys, attention, torch.zeros_like(attention))
    remaining = (~centres) * attention
    weights = torch.cat([merged, remaining[:, None]], dim=1)
    is_used = torch.cat([is_centre, is_centre.new_ones(len(centres), 1)], dim=1)
    return assembly_of(torch.zeros_like(centres), weights, is_used)


def _absorb(
    centres: torch.Tensor,
    among: torch.Tensor,
    keys: torch.Tensor,
    attention: torch.Tensor,
    bonus: torch.Tensor,
    neighbors: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each centre plus the sum, weighted by attention, of its nearest patches (other centres included).

    Returns:
        weights [B, M, N], one row per centre in order of falling attention, and which rows are used [B, M].
    """
    num_patches = centres.shape[1]
    count = centres.sum(1, keepdim=True)
    most = int(count.max())
    order = attention.masked_fill(~centres, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    is_centre = torch.arange(most, device=centres.device) < count
    keys = normalize(keys.float(), dim=-1)
    itself = torch.nn.functional.one_hot(order, num_patches).bool()
    affinity = _take(keys, order) @ keys.transpose(1, 2) + bonus[:, None]
    affinity = affinity.masked_fill(itself | ~among[:, None], -torch.inf)
    nearest = affinity.topk(min(neighbors, num_patches), dim=2)
    absorbed = torch.zeros_like(affinity).scatter_(2, nearest.indices, nearest.values.isfinite().float())
    return (absorbed * attention[:, None] + itself) * is_centre[:, :, None], is_centre


def _greedy_coverage(
    benefit: torch.Tensor, budget: int, chosen: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, budget] patches picked one by one for the gain in sum over rows of the best benefit [B, R, N] so far.

    Gains only fall while patches are picked. So a gain from an earlier step is a bound, and before a pick only those
    patches are looked at again whose bounds are the highest, until the best of all is one that was.

    Args:
        chosen: [B, N] bool, what must not be picked.
        factor: [B, N] of each patch's gain.
    """
    benefit = benefit.transpose(1, 2).contiguous()  # [B, N, R]
    factor = torch.ones_like(benefit[:, :, 0]) if factor is None else factor
    covered = torch.zeros_like(benefit[:, 0])
    bounds = (benefit.clamp(min=0).sum(2) * factor).masked_fill(chosen, -torch.inf)
    count = min(LOOKED_AT, benefit.shape[1])
    picked = torch.empty(len(benefit), budget, dtype=torch.long, device=benefit.device)
    for step in range(budget):
        is_looked_at = torch.full_like(chosen, step == 0)
        while True:
            best = bounds.argmax(1, keepdim=True)
            if bool(is_looked_at.gather(1, best).all()):
                break
            some = bounds.masked_fill(is_looked_at, -torch.inf).topk(count, dim=1).indices
            gains = (_take(benefit, some) - covered[:, None]).clamp_(min=0).sum(2) * factor.gather(1, some)
            bounds.scatter_(1, some, torch.where(bounds.gather(1, some) == -torch.inf, -torch.inf, gains))
            is_looked_at.scatter_(1, some, True)
        covered = torch.maximum(covered, _take(benefit, best)[:, 0])
        bounds.scatter_(1, best, -torch.inf)
        picked[:, step : step + 1] = best
    return picked


def _determinantal(similarity: torch.Tensor, scores: torch.Tensor, budget: int, chosen: torch.Tensor) -> torch.Tensor:
    """[B, budget] the greedy most probable set of the process diag(scores) similarity diag(scores), in order.

    Chen et al., "Fast Greedy MAP Inference for Determinantal Point Process" (NeurIPS 2018): a Cholesky factor of the
    chosen rows grows by one column per pick. Once the kernel's rank is used up, what is left of the gains is numerical
    noise: picks go on by it, so that the budget is met, but it no longer enters the factor.

    Args:
        chosen: [B, N] bool, what must not be picked.
    """
    kernel = scores[:, :, None] * similarity * scores[:, None, :]
    gains = kernel.diagonal(dim1=1, dim2=2).clone()
    chosen = chosen.clone()
    factors = kernel.new_zeros(len(kernel), budget, kernel.shape[1])
    noise = 1e-6 * gains.amax(1, keepdim=True)
    picked = torch.empty(len(kernel), budget, dtype=torch.long, device=kernel.device)
    for step in range(budget):
        best = gains.masked_fill(chosen, -torch.inf).argmax(1, keepdim=True)
        known = factors[:, :step]
        along = known.gather(2, best[:, None].expand(-1, step, -1))
        row = _take(kernel, best)[:, 0] - (along.transpose(1, 2) @ known)[:, 0]
        gain = gains.gather(1, best)
        factors[:, step] = torch.where(gain > noise, row / gain.clamp(min=noise).sqrt(), 0.0)
        gains = gains - factors[:, step].square()
        chosen.scatter_(1, best, True)
        picked[:, step : step + 1] = best
    return picked
