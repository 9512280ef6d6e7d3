"""The paper's four steps in a slow version, one image and one patch at a time, and cases to compare it on."""

import math
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import strategies as st

from recoverable_llava.local_outlier_factor import local_outlier_factor
from recoverable_llava.paper_selection import select_by_outliers
from recoverable_llava.token_assembly import assemble_tokens, gather_tokens


LOF = {"visual_lof_neighbors": 6, "text_lof_neighbors": 5, "merge_lof_neighbors": 4}


# --------------------------------------------------------------------------------------------------- the slow version


def slow_outliers(scores, num_neighbors, threshold):
    """Number of outliers of a list of scores; the Local Outlier Factor has tests of its own."""
    if len(scores) <= num_neighbors:
        return 0
    factors = local_outlier_factor(torch.tensor([scores]), num_neighbors)[0].tolist()
    return sum(factor > threshold for factor in factors)


def slow_highest(scores, count, among):
    """The `count` patches of `among` with the highest scores, the first of equal ones."""
    return sorted(among, key=lambda patch: (-scores[patch], patch))[:count]


def slow_finite(scores, patches):
    lowest = min((scores[patch] for patch in patches if math.isfinite(scores[patch])), default=0.0)
    return [score if math.isfinite(score) else lowest for score in scores]


def slow_shares(asked, total):
    """Largest remainders, in whole numbers."""
    whole = max(sum(asked), 1)
    shares = [number * total // whole for number in asked]
    by_remainder = sorted(range(len(asked)), key=lambda kind: (-(asked[kind] * total % whole), kind))
    for kind in by_remainder[: total - sum(shares)]:
        shares[kind] += 1
    return shares


def slow_selection(
    visual,
    text=None,
    has_question=True,
    valid=None,
    *,
    visual_lof_neighbors=20,
    text_lof_neighbors=20,
    merge_lof_neighbors=10,
    lof_threshold=1.5,
    merge_remaining=True,
    min_visual_tokens=1,
    max_visual_tokens=None,
    visual_token_budget=None,
):
    """Steps 1 to 3 for one image, with lists of scores and of patches."""
    patches = [patch for patch in range(len(visual)) if valid is None or valid[patch]]
    visual = slow_finite(visual, patches)

    # Step 1
    num_visual = slow_outliers([visual[patch] for patch in patches], visual_lof_neighbors, lof_threshold)
    num_visual = min(max(num_visual, min_visual_tokens), len(patches))
    kept = slow_highest(visual, num_visual, patches)

    # Step 2
    num_text = 0
    if text is not None:
        text = slow_finite(text, patches)
        if has_question and patches:
            lowest = min(text[patch] for patch in patches)
            unmet = [lowest if patch in kept else text[patch] for patch in patches]
            outliers = slow_outliers(unmet, text_lof_neighbors, lof_threshold)
            num_text = outliers * (len(patches) - num_visual) // len(patches)
    others = [patch for patch in patches if patch not in kept]
    recovered = slow_highest(text, num_text, others) if num_text else []

    # Step 3
    rest = [patch for patch in others if patch not in recovered]
    num_centres = slow_outliers([visual[patch] for patch in rest], merge_lof_neighbors, lof_threshold)
    num_merged = num_centres + (merge_remaining and num_centres < len(rest))

    # Budget
    total = num_visual + num_text + num_merged
    if visual_token_budget is not None:
        total = min(visual_token_budget, len(patches))
    elif max_visual_tokens is not None:
        total = min(total, max_visual_tokens)
    if visual_token_budget is not None or max_visual_tokens is not None:
        num_visual, num_text, num_merged = slow_shares([num_visual, num_text, num_merged], total)
        kept = slow_highest(visual, num_visual, patches)
        others = [patch for patch in patches if patch not in kept]
        recovered = slow_highest(text, num_text, others) if num_text else []
        rest = [patch for patch in others if patch not in recovered]
    has_remaining_token = merge_remaining and 0 < num_merged < len(rest) if total else False
    if visual_token_budget is None and max_visual_tokens is None:
        has_remaining_token = merge_remaining and num_centres < len(rest)
    centres = slow_highest(visual, num_merged - has_remaining_token, rest)
    return SimpleNamespace(
        kept=sorted(kept),
        recovered=sorted(recovered),
        centres=sorted(centres),
        rest=[patch for patch in rest if patch not in centres],
        merges_remaining=has_remaining_token,
        counts=[num_visual, num_text, num_merged],
        visual=visual,
    )


def slow_tokens(selection, keys, text=None, *, merge_neighbors, text_merge_weight):
    """Steps 3 and 4 for one image: the weights over all patches of each token, in the order of the tokens."""
    num_patches = len(selection.visual)

    def mean_of(patches):
        weights = np.zeros(num_patches)
        for patch in patches:
            weights[patch] = max(selection.visual[patch], 1e-37)
        return weights / weights.sum()

    def affinity(centre, patch):
        cosine = keys[centre] @ keys[patch] / np.linalg.norm(keys[centre]) / np.linalg.norm(keys[patch])
        return cosine if text is None else cosine - text_merge_weight * abs(text[centre] - text[patch])

    tokens = [np.eye(num_patches)[patch] for patch in sorted(selection.kept + selection.recovered)]
    unabsorbed = list(selection.rest)
    for centre in selection.centres:
        nearest = sorted(selection.rest, key=lambda patch: -affinity(centre, patch))[:merge_neighbors]
        tokens.append(mean_of([centre, *nearest]))
        unabsorbed = [patch for patch in unabsorbed if patch not in nearest]
    if selection.merges_remaining:
        tokens.append(mean_of(unabsorbed or selection.rest))
    return np.array(tokens).reshape(len(tokens), num_patches)


# ----------------------------------------------------------------------------------------------------- the fast version


def recover(visual, keys, text=None, has_question=None, valid=None, merging=None, **selection_settings):
    """Selection, assembly and the weights of every token over the patches [B, K, N]."""
    selection = select_by_outliers(visual, text, has_question, valid, **{**LOF, **selection_settings})
    assembly = assemble_tokens(
        selection,
        visual,
        keys,
        text,
        has_question,
        valid,
        num_tokens=int(selection.num_tokens.max()),
        num_merged=int(selection.num_merged.max()),
        **{"merge_neighbors": 4, "text_merge_weight": 2.0, **(merging or {})},
    )
    num_patches = visual.shape[1]
    weights = gather_tokens(torch.eye(num_patches).expand(len(visual), -1, -1), assembly)
    return selection, assembly, weights


def indices(mask):
    return mask.nonzero().flatten().tolist()


def assert_selection_equals_slow_version(visual, text, has_question=None, valid=None, **selection_settings):
    selection_settings = {**LOF, **selection_settings}
    selection = select_by_outliers(visual, text, has_question, valid, **selection_settings)
    slow_rows = []
    for row in range(len(visual)):
        slow = slow_selection(
            visual[row].tolist(),
            None if text is None else text[row].tolist(),
            has_question is None or bool(has_question[row]),
            None if valid is None else valid[row].tolist(),
            **selection_settings,
        )
        assert indices(selection.chosen_by_vision[row]) == slow.kept
        assert indices(selection.chosen_by_text[row]) == slow.recovered
        assert indices(selection.centres[row]) == slow.centres
        assert bool(selection.merges_remaining[row]) == slow.merges_remaining
        counts = [selection.num_visual[row], selection.num_text[row], selection.num_merged[row]]
        assert [int(count) for count in counts] == slow.counts
        assert int(selection.num_tokens[row]) == sum(slow.counts)
        slow_rows.append(slow)
    return selection, slow_rows


# --------------------------------------------------------------------------------------------------------------- cases


def scene(seed, batch_size=4, num_patches=60, channels=8):
    generator = torch.Generator().manual_seed(seed)
    visual = (2.5 * torch.randn(batch_size, num_patches, generator=generator)).softmax(1)
    # Relevance of most patches is alike, that of a few stands out.
    text = 0.05 * torch.randn(batch_size, num_patches, generator=generator)
    text = text + (torch.rand(batch_size, num_patches, generator=generator) > 0.85) * torch.rand(
        batch_size, num_patches, generator=generator
    )
    keys = torch.randn(batch_size, num_patches, channels, generator=generator)
    return visual, text, keys


# Ties, constants and values that are no numbers are the rule here, not the exception.
score_kinds = ("normal", "softmax", "grid", "constant", "one", "zeros and ones", "nan", "infinite", "all nan")


@st.composite
def cases(draw):
    batch_size, num_patches = draw(st.integers(1, 8)), draw(st.integers(8, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def scores(kind):
        normal = torch.randn(batch_size, num_patches, generator=generator)
        uniform = torch.rand(batch_size, num_patches, generator=generator)
        return {
            "normal": normal,
            "softmax": (4 * normal).softmax(1),
            "grid": (2 * normal).round() / 4,
            "constant": torch.full_like(normal, 0.5),
            "one": (uniform == uniform.amax(1, keepdim=True)).float(),
            "zeros and ones": (uniform > 0.8).float(),
            "nan": torch.where(uniform > 0.8, torch.nan, normal),
            "infinite": torch.where(uniform > 0.9, torch.inf, torch.where(uniform < 0.1, -torch.inf, normal)),
            "all nan": torch.full_like(normal, torch.nan),
        }[kind]

    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    valid = None
    if draw(st.booleans()):
        valid = torch.rand(batch_size, num_patches, generator=generator) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    has_question = None
    if draw(st.booleans()):
        has_question = torch.rand(batch_size, generator=generator) < 0.5
    minimum = draw(st.integers(1, num_patches))
    limits = {
        "adaptive": {"min_visual_tokens": minimum},
        "limited": {"min_visual_tokens": minimum, "max_visual_tokens": draw(st.integers(minimum, num_patches + 5))},
        "fixed": {"visual_token_budget": draw(st.integers(1, num_patches))},
    }[draw(st.sampled_from(["adaptive", "limited", "fixed"]))]
    neighbors = st.integers(1, num_patches - 1)
    return SimpleNamespace(
        visual=scores(draw(st.sampled_from(score_kinds))).to(dtype),
        text=scores(draw(st.sampled_from(score_kinds))).to(dtype) if draw(st.booleans()) else None,
        keys=torch.randn(batch_size, num_patches, 4, generator=generator).to(dtype),
        has_question=has_question,
        valid=valid,
        settings={
            **limits,
            "visual_lof_neighbors": draw(neighbors),
            "text_lof_neighbors": draw(neighbors),
            "merge_lof_neighbors": draw(neighbors),
            "lof_threshold": draw(st.sampled_from([1.0, 1.5, 2.5])),
            "merge_remaining": draw(st.booleans()),
        },
        merging={
            "merge_neighbors": draw(st.sampled_from([0, 1, 4, 100])),
            "text_merge_weight": draw(st.sampled_from([0.0, 1.0, 50.0])),
        },
    )


def run_case(case, rows=slice(None)):
    def of(tensor):
        return None if tensor is None else tensor[rows]

    return recover(
        of(case.visual),
        of(case.keys),
        of(case.text),
        of(case.has_question),
        of(case.valid),
        merging=case.merging,
        **case.settings,
    )


def sorted_rows(matrix):
    code = matrix.double() @ torch.arange(1, matrix.shape[1] + 1, dtype=torch.float64).sqrt()
    return matrix[code.argsort()]
