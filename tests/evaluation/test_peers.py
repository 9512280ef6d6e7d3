"""Each peer's batched rule against a slow version written from its formula, one image and one step at a time."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from random_evidence import CHANNELS, JOINT, PATCHES, make_evidence, row_of
from sklearn.neighbors import LocalOutlierFactor

from evaluation import peers
from evaluation.evidence import Evidence
from recoverable_llava.token_assembly import gather_tokens


BUDGETS = [1, 7, 20, PATCHES]


def tokens_of(rule, evidence: Evidence, budget: int | None) -> list[torch.Tensor]:
    assembly = rule(evidence, budget)
    tokens = gather_tokens(evidence.patches, assembly)
    return [row[mask] for row, mask in zip(tokens, assembly.token_mask, strict=True)]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def stretched(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.min()) / (scores.max() - scores.min())


# The slow versions: one image, tokens [K, C] as a list of vectors.


def slow_class_attention(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    chosen = sorted(range(PATCHES), key=lambda i: -float(e.class_attention[b, i]))[:budget]
    return [e.patches[b, i] for i in sorted(chosen)]


def slow_visionzip(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    num_contextual = max(1, round(budget * 10 / 64)) if budget > 1 else 0
    attention = e.previous_class_attention[b]
    dominant = sorted(range(PATCHES), key=lambda i: -float(attention[i]))[: budget - num_contextual]
    rest = [i for i in range(PATCHES) if i not in dominant]
    tokens = [e.patches[b, i] for i in sorted(dominant)]
    if not num_contextual:
        return tokens
    targets = rest[:: max(1, len(rest) // num_contextual)][:num_contextual]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            keys = e.previous_keys[b]
            joined[max(targets, key=lambda target: cosine(keys[i], keys[target]))].append(i)
    for target, members in joined.items():
        aggregate = sum(e.patches[b, i] for i in members) / max(1, len(members))
        tokens.append(e.patches[b, target] + aggregate)
    return tokens


def slow_absorb(e: Evidence, b: int, centre: int, rest: list[int], key_of, bonus) -> torch.Tensor:
    keys, attention = e.keys[b], e.undivided_class_attention[b]
    others = [i for i in rest if i != centre]
    others.sort(key=lambda i: -(cosine(keys[key_of(centre)], keys[key_of(i)]) + bonus(i)))
    return e.patches[b, centre] + sum(attention[i] * e.patches[b, i] for i in others[:32])


def slow_prumerge(e: Evidence, b: int, budget: int | None, plus: bool = False) -> list[torch.Tensor]:
    attention = e.undivided_class_attention[b]
    by_attention = sorted(range(PATCHES), key=lambda i: -float(attention[i]))
    if budget is None:
        lower, upper = np.percentile(attention.numpy(), [25, 75])
        count = int((attention.numpy() > upper + 1.5 * (upper - lower)).sum())
        centres = by_attention[:count]
        if plus:
            step = max(1, int(PATCHES / max(1, count)) // 3)
            centres = centres + [i for i in range(0, PATCHES, step) if i not in centres]
    elif plus:
        centres = by_attention[: (budget - 1) // 4]
        others = [i for i in range(PATCHES) if i not in centres]
        wanted = budget - 1 - len(centres)
        centres = centres + [others[i * len(others) // wanted] for i in range(wanted)]
    else:
        centres = by_attention[: budget - 1]
    centres.sort(key=lambda i: -float(attention[i]))
    everything = list(range(PATCHES))
    tokens = [slow_absorb(e, b, c, everything, lambda i: i, lambda i: 0.0) for c in centres]
    rest = [attention[i] * e.patches[b, i] for i in everything if i not in centres]
    return [*tokens, sum(rest, torch.zeros(CHANNELS))]


def slow_divprune(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    def distance(i: int, j: int) -> float:
        return 1 - cosine(e.projected[b, i], e.projected[b, j])

    chosen: list[int] = []
    while len(chosen) < budget:
        left = [i for i in range(PATCHES) if i not in chosen]
        against = chosen or list(range(PATCHES))
        chosen.append(max(left, key=lambda i: min(distance(i, j) for j in against if j != i)))
    return [e.patches[b, i] for i in sorted(chosen)]


def slow_coverage(e: Evidence, b: int, budget: int, benefit: torch.Tensor, factor: torch.Tensor) -> list[torch.Tensor]:
    chosen: list[int] = []

    def covered(members: list[int]) -> float:
        return sum(max([0.0, *(float(row[i]) for i in members)]) for row in benefit.double())

    while len(chosen) < budget:
        left = [i for i in range(PATCHES) if i not in chosen]
        chosen.append(max(left, key=lambda i: (covered([*chosen, i]) - covered(chosen)) * float(factor[i])))
    return [e.patches[b, i] for i in sorted(chosen)]


def slow_scope(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    similarity = torch.tensor([[cosine(x, y) for y in e.patches[b]] for x in e.patches[b]])
    return slow_coverage(e, b, budget, similarity, e.previous_class_attention[b])


def slow_facility_location(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    similarity = torch.tensor([[cosine(x, y) for y in e.patches[b]] for x in e.patches[b]])
    relevance = stretched(e.relevance["negated"][b])
    return slow_coverage(e, b, budget, relevance[:, None] * similarity, torch.ones(PATCHES))


def slow_mmtok(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    rows = []
    tokens = [t for t, is_own in zip(e.question_token_embeddings[b], e.question_token_mask[b], strict=True) if is_own]
    for token in tokens:
        weights = [math.exp(cosine(token, x) / 0.02) for x in e.patch_embeddings[b]]
        rows.append([w / sum(weights) / len(tokens) for w in weights])
    for patch in e.patches[b]:
        weights = [math.exp(cosine(patch, x) / 0.2) for x in e.patches[b]]
        rows.append([0.5 * w / sum(weights) / PATCHES for w in weights])
    return slow_coverage(e, b, budget, torch.tensor(rows), torch.ones(PATCHES))


def slow_determinantal(e: Evidence, b: int, budget: int, features: torch.Tensor, scores: torch.Tensor):
    kernel = torch.tensor([[cosine(x, y) for y in features] for x in features], dtype=torch.float64)
    kernel = scores.double()[:, None] * kernel * scores.double()[None]
    chosen: list[int] = []
    while len(chosen) < budget:
        left = [i for i in range(PATCHES) if i not in chosen]

        def determinant(i: int) -> float:
            index = torch.tensor([*chosen, i])
            return float(torch.linalg.det(kernel[index][:, index]))

        chosen.append(max(left, key=determinant))
    return [e.patches[b, i] for i in sorted(chosen)]


def slow_cdpruner(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    return slow_determinantal(e, b, budget, e.projected[b], stretched(e.relevance["negated"][b]) + 1e-6)


def slow_centred_cdpruner(e: Evidence, b: int, budget: int) -> list[torch.Tensor]:
    features = e.projected[b]
    unlike = []
    for i in range(PATCHES):
        unlike.append(-sum(cosine(features[i], features[j]) for j in range(PATCHES) if j != i) / (PATCHES - 1))
    scores = (stretched(e.relevance["negated"][b]) + 1e-6) * (stretched(torch.tensor(unlike)) + 1e-6)
    return slow_determinantal(e, b, budget, features - features.mean(0), scores)


def slow_released(e: Evidence, b: int, budget: int | None) -> list[torch.Tensor]:
    def outliers(scores: list[float], neighbors: int) -> int:
        factor = LocalOutlierFactor(neighbors, contamination="auto")
        return int((factor.fit_predict(np.array(scores, dtype=np.float64)[:, None]) == -1).sum())

    attention = [float(a) for a in e.undivided_class_attention[b]]
    text = [cosine(x, e.constant_guide[b]) * JOINT**-0.5 for x in e.bare_patch_embeddings[b]]
    by_vision = sorted(range(PATCHES), key=lambda i: -attention[i])[: outliers(attention, 20)]
    unmet = [min(text) if i in by_vision else text[i] for i in range(PATCHES)]
    num_text = int((PATCHES - len(by_vision)) * outliers(unmet, 20) / PATCHES)
    kept = by_vision + sorted((i for i in range(PATCHES) if i not in by_vision), key=lambda i: -text[i])[:num_text]
    rest = [i for i in range(PATCHES) if i not in kept]
    num_centres = int(CHANNELS * outliers([attention[i] for i in rest], 10) / len(rest))
    if budget is not None:
        asked = [len(by_vision), num_text, num_centres + 1]
        shares = [round(part / sum(asked) * budget) for part in asked]
        num_text, num_centres = shares[1], max(0, shares[2] - 1)
        num_visual = budget - num_text - num_centres - 1
        by_vision = sorted(range(PATCHES), key=lambda i: -attention[i])[: max(0, num_visual)]
        kept = by_vision + sorted((i for i in range(PATCHES) if i not in by_vision), key=lambda i: -text[i])[:num_text]
        rest = [i for i in range(PATCHES) if i not in kept]
    centres = sorted(rest, key=lambda i: -attention[i])[:num_centres]
    tokens = [e.patches[b, i] for i in sorted(kept)]
    tokens += [slow_absorb(e, b, c, rest, rest.index, lambda i: 50 * text[i]) for c in centres]
    if centres or budget is not None:
        tokens.append(sum((attention[i] * e.patches[b, i] for i in rest if i not in centres), torch.zeros(CHANNELS)))
    return tokens


SLOW = {
    peers.class_attention: slow_class_attention,
    peers.visionzip: slow_visionzip,
    peers.prumerge: slow_prumerge,
    peers.prumerge_plus: partial(slow_prumerge, plus=True),
    peers.divprune: slow_divprune,
    peers.scope: slow_scope,
    peers.facility_location: slow_facility_location,
    peers.mmtok: slow_mmtok,
    peers.cdpruner: slow_cdpruner,
    peers.centred_cdpruner: slow_centred_cdpruner,
    peers.released_recoverable_compression: slow_released,
}
# A determinant's rank is used up at the number of channels: from there on the pick is numerical noise.
LARGEST = {peers.cdpruner: 12, peers.centred_cdpruner: 12}


@pytest.mark.filterwarnings("ignore:Duplicate values are leading to incorrect results")
@pytest.mark.parametrize("budget", [1, 2, 7, 20])
@pytest.mark.parametrize("rule", SLOW, ids=lambda rule: rule.__name__)
def test_rule_equals_slow_version(rule, budget):
    budget = min(budget, LARGEST.get(rule, budget))
    for seed in range(2):
        evidence = make_evidence(seed)
        for b, tokens in enumerate(tokens_of(rule, evidence, budget)):
            expected = SLOW[rule](evidence, b, budget)
            assert len(tokens) == len(expected) == budget
            torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-5, rtol=1e-5)


ADAPTIVE = [peers.prumerge, peers.prumerge_plus, peers.released_recoverable_compression]


@pytest.mark.filterwarnings("ignore:Duplicate values are leading to incorrect results")
@pytest.mark.parametrize("rule", ADAPTIVE, ids=lambda rule: rule.__name__)
def test_adaptive_rule_equals_slow_version(rule):
    for seed in range(8):
        evidence = make_evidence(seed)
        for b, tokens in enumerate(tokens_of(rule, evidence, None)):
            expected = SLOW[rule](evidence, b, None)
            torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-5, rtol=1e-5)


ALL = [*SLOW, peers.random_patches, peers.uniform_grid, peers.average_pooling]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.__name__)
def test_budget_is_met_and_rows_are_independent(rule, budget):
    evidence = make_evidence(11)
    assembly = rule(evidence, budget)
    assert assembly.token_mask.sum(1).tolist() == [budget] * 3
    tokens = gather_tokens(evidence.patches, assembly)
    assert torch.isfinite(tokens).all()
    if rule is peers.random_patches:
        return
    alone = row_of(evidence, 1)
    torch.testing.assert_close(gather_tokens(alone.patches, rule(alone, budget))[0], tokens[1])


@pytest.mark.parametrize("budget", [1, 6, 12, 13, PATCHES])
def test_cells_tile_the_picture(budget):
    evidence = make_evidence(3)
    pooled = peers.average_pooling(evidence, budget).merge_weights[0]
    assert torch.equal((pooled > 0).sum(0), torch.ones(PATCHES, dtype=torch.long))  # each patch in one cell
    sizes = (pooled > 0).sum(1)
    assert sizes.min() >= 1 and sizes.max() <= 4 * sizes.min()
    kept = peers.uniform_grid(evidence, budget).token_index[0]
    assert (pooled[:, kept] > 0).sum(0).tolist() == [1] * budget  # one patch in each cell
    assert (pooled[:, kept] > 0).any(1).all()


def test_pooling_of_everything_is_the_mean():
    evidence = make_evidence(5)
    torch.testing.assert_close(tokens_of(peers.average_pooling, evidence, 1)[0][0], evidence.patches[0].mean(0))


def test_cells_reject_an_impossible_budget():
    with pytest.raises(ValueError, match="budget must be between 1 and the number of patches"):
        peers.uniform_grid(make_evidence(0), PATCHES + 1)
