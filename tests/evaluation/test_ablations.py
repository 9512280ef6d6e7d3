"""The pipeline taken apart: with the paper's settings it is the package's own, and every variant is sound."""

from functools import partial

import pytest
import torch
from random_evidence import PATCHES, make_evidence, row_of

from evaluation.ablations import ABLATIONS, distinct, recovery
from recoverable_llava.novelty_selection import novelty
from recoverable_llava.paper_selection import select_by_outliers
from recoverable_llava.token_assembly import assemble_tokens, gather_tokens


def test_with_the_papers_settings_it_is_the_package():
    evidence = make_evidence(0)
    scores = evidence.class_attention, evidence.relevance["value"]
    selection = select_by_outliers(*scores)
    expected = assemble_tokens(
        selection,
        evidence.class_attention,
        evidence.keys,
        evidence.relevance["value"],
        num_tokens=int(selection.num_tokens.max()),
        num_merged=int(selection.num_merged.max()),
    )
    assembly = recovery(evidence, None)
    assert torch.equal(assembly.token_mask, expected.token_mask)
    torch.testing.assert_close(gather_tokens(evidence.patches, assembly), gather_tokens(evidence.patches, expected))


@pytest.mark.parametrize("budget", [1, 7, 20, None])
@pytest.mark.parametrize("name", ABLATIONS)
def test_variant_meets_its_budget_and_rows_are_independent(name, budget):
    evidence = make_evidence(7)
    rule = ABLATIONS[name]
    if name == "outliers: 40 neighbours":
        rule = partial(rule, visual_lof_neighbors=30, text_lof_neighbors=30)
    assembly = rule(evidence, budget)
    counts = assembly.token_mask.sum(1).tolist()
    if budget is not None:
        assert counts == [budget] * 3
    tokens = gather_tokens(evidence.patches, assembly)
    assert torch.isfinite(tokens).all() and min(counts) >= 1
    alone = row_of(evidence, 1)
    torch.testing.assert_close(gather_tokens(alone.patches, rule(alone, budget))[0], tokens[1, : counts[1]])


def test_distance_to_more_important_equals_a_loop():
    evidence = make_evidence(2)
    points = torch.nn.functional.normalize(evidence.patches, dim=-1)
    distance = 1 - points @ points.transpose(1, 2)
    importance = evidence.class_attention
    apart = novelty(importance, distance, None)
    for b in range(3):
        for i in range(PATCHES):
            better = [j for j in range(PATCHES) if importance[b, j] > importance[b, i]]
            expected = min(distance[b, i, j] for j in better) if better else torch.tensor(2.0)
            torch.testing.assert_close(apart[b, i], expected)


def test_near_copies_are_passed_over():
    evidence = row_of(make_evidence(4), 0)
    patches = torch.randn(1, 6, 16).repeat_interleave(8, dim=1) + 1e-3 * torch.randn(1, PATCHES, 16)
    evidence = type(evidence)(**(vars(evidence) | {"projected": patches}))
    kept = distinct(evidence, 6).token_index[0]
    assert sorted((kept // 8).tolist()) == list(range(6))
    assert distinct(evidence, None).token_mask.sum() == 6
