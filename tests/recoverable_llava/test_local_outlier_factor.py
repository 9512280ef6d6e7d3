"""The Local Outlier Factor against scikit-learn's, and against a slow loop where scikit-learn's depends on luck."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import LargestTensor
from sklearn.neighbors import LocalOutlierFactor

from recoverable_llava.local_outlier_factor import local_outlier_factor


pytestmark = pytest.mark.algorithm

THRESHOLD = 1.5  # scikit-learn's for contamination="auto"


def sklearn_factors(scores, num_neighbors):
    # The tree's distances are exact differences; the default for k >= N / 2, brute force, rounds them.
    estimator = LocalOutlierFactor(n_neighbors=num_neighbors, contamination="auto", algorithm="kd_tree")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate values are leading to incorrect results")
        estimator.fit(np.asarray(scores, dtype=np.float64)[:, None])
    return -estimator.negative_outlier_factor_


def ours(scores, num_neighbors, valid=None):
    return local_outlier_factor(torch.as_tensor(scores)[None], num_neighbors, valid)[0].numpy()


def slow_factors(scores, num_neighbors):
    """The definition, point by point; of two scores that are equally far away, the smaller is the nearer one."""
    indices = range(len(scores))
    neighbors, k_distance = [], []
    for i in indices:
        others = sorted((j for j in indices if j != i), key=lambda j: (abs(scores[i] - scores[j]), scores[j]))
        neighbors.append(others[:num_neighbors])
        k_distance.append(abs(scores[i] - scores[others[num_neighbors - 1]]))
    density = []
    for i in indices:
        reach = [max(abs(scores[i] - scores[j]), k_distance[j]) for j in neighbors[i]]
        density.append(1 / (np.mean(reach) + 1e-10))
    return np.array([np.mean([density[j] for j in neighbors[i]]) / density[i] for i in indices])


def has_ambiguous_neighbors(scores, num_neighbors):
    """Whether, for some point, one of two different scores at the same distance must be left out."""
    for i, score in enumerate(scores):
        others = sorted((abs(score - other), other) for j, other in enumerate(scores) if j != i)
        if len(others) > num_neighbors:
            last, next_one = others[num_neighbors - 1], others[num_neighbors]
            if last[0] == next_one[0]:
                tied = {other for distance, other in others if distance == last[0]}
                if len(tied) > 1:
                    return True
    return False


def softmax(logits):
    exponent = np.exp(logits - logits.max())
    return exponent / exponent.sum()


DISTRIBUTIONS = {
    "normal": lambda generator, n: generator.normal(size=n),
    "uniform": lambda generator, n: generator.uniform(size=n),
    "heavy tails": lambda generator, n: generator.standard_cauchy(size=n),
    "softmax": lambda generator, n: softmax(3 * generator.normal(size=n)),
    "peaked softmax": lambda generator, n: softmax(12 * generator.normal(size=n)),
    "log-normal": lambda generator, n: generator.lognormal(sigma=3, size=n),
    "two clusters": lambda generator, n: generator.normal(size=n) * 0.01 + (generator.random(n) > 0.1),
    "large offset": lambda generator, n: 1e4 + generator.normal(size=n),
    "tiny": lambda generator, n: 1e-7 * generator.normal(size=n),
    "duplicates": lambda generator, n: generator.choice(generator.normal(size=max(n // 3, 2)), size=n),
    "few values": lambda generator, n: generator.choice(generator.normal(size=3), size=n),
    "constant": lambda generator, n: np.full(n, 0.25),
    "one far away": lambda generator, n: np.where(np.arange(n) == n // 2, 1.0, 0.0),
    # What step 2 of the method makes: kept patches drop to the lowest relevance.
    "kept set to lowest": lambda generator, n: _kept_set_to_lowest(generator.normal(size=n), generator),
}


def _kept_set_to_lowest(scores, generator):
    return np.where(generator.random(len(scores)) < 0.15, scores.min(), scores)


@pytest.mark.parametrize("num_scores, num_neighbors", [(576, 20), (576, 10), (100, 1), (30, 12), (21, 20), (2, 1)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_same_factors_and_outliers_as_scikit_learn(name, num_scores, num_neighbors):
    generator = np.random.default_rng(num_scores + num_neighbors)
    for _ in range(3):
        scores = DISTRIBUTIONS[name](generator, num_scores)
        expected, factors = sklearn_factors(scores, num_neighbors), ours(scores, num_neighbors)
        np.testing.assert_array_equal(factors > THRESHOLD, expected > THRESHOLD)
        np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_there_are_outliers_to_find():
    """The comparison above would be empty if no input had outliers, or all were."""
    generator = np.random.default_rng(0)
    for name in ("heavy tails", "softmax", "log-normal", "two clusters", "kept set to lowest", "normal"):
        count = (ours(DISTRIBUTIONS[name](generator, 576), 20) > THRESHOLD).sum()
        assert 0 < count < 288, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_equal_scikit_learn_on_the_same_rounded_scores(dtype):
    """In bfloat16 many scores coincide and distances tie: only the tie-free rows have one right answer."""
    generator = torch.Generator().manual_seed(0)
    num_compared = 0
    for _ in range(40):
        scores = torch.randn(1, 60, generator=generator).to(dtype)
        before = scores.clone()
        if not has_ambiguous_neighbors(scores[0].double().tolist(), 8):
            num_compared += 1
            expected = sklearn_factors(scores[0].double().numpy(), 8) > THRESHOLD
            np.testing.assert_array_equal(local_outlier_factor(scores, 8)[0].numpy() > THRESHOLD, expected)
        # A rounded score is still a score: the number of outliers is that of the same numbers in float64.
        assert torch.equal(local_outlier_factor(scores, 8), local_outlier_factor(scores.double(), 8))
        assert torch.equal(scores, before) and scores.dtype == dtype
    assert num_compared >= 3


@pytest.mark.parametrize("name", ["normal", "softmax", "duplicates", "kept set to lowest"])
def test_permuting_scores_permutes_factors(name):
    generator = np.random.default_rng(1)
    scores = DISTRIBUTIONS[name](generator, 200)
    order = generator.permutation(200)
    # To the last bit but one: among equal scores the permutation decides which of them is the point itself.
    np.testing.assert_allclose(ours(scores, 15)[order], ours(scores[order], 15), rtol=1e-12)


def test_batch_equals_rows():
    generator = np.random.default_rng(2)
    rows = torch.from_numpy(np.stack([make(generator, 90) for make in DISTRIBUTIONS.values()]))
    together = local_outlier_factor(rows, 10)
    alone = torch.cat([local_outlier_factor(row[None], 10) for row in rows])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", ["normal", "softmax", "duplicates", "constant", "kept set to lowest"])
def test_valid_scores_are_alone_in_the_world(name):
    generator = np.random.default_rng(3)
    scores = np.stack([DISTRIBUTIONS[name](generator, 80) for _ in range(6)])
    valid = generator.random(scores.shape) < np.linspace(0.3, 1, 6)[:, None]
    filled = np.where(valid, scores, generator.choice([np.inf, -np.inf, np.nan, 0.0, 1e9], size=scores.shape))
    factors = local_outlier_factor(torch.from_numpy(filled), 7, torch.from_numpy(valid)).numpy()
    for row, row_valid, row_factors in zip(scores, valid, factors):
        np.testing.assert_allclose(row_factors[row_valid], sklearn_factors(row[row_valid], 7), rtol=1e-6)
        assert (row_factors[~row_valid] == 1).all()


def test_a_row_with_too_few_valid_scores_has_no_outliers():
    scores = torch.cat([torch.zeros(4, 19), torch.full((4, 1), 100.0)], dim=1)
    valid = torch.ones(4, 20, dtype=torch.bool)
    valid[0, 7:19] = False  # 8 valid, of which one is far from the 7 others
    valid[1, 5:19] = False  # 6, as many as neighbours
    valid[2] = False
    factors = local_outlier_factor(scores, 6, valid)
    assert factors.isfinite().all()
    assert (factors > THRESHOLD).sum(1).tolist() == [1, 0, 0, 1]
    assert (factors[1:3] == 1).all()


def test_which_of_two_equidistant_scores_is_a_neighbor():
    """Scikit-learn's outliers depend on the order of the input; here they do not, and stay between the extremes."""
    generator = np.random.default_rng(4)
    num_dependent = 0
    for _ in range(30):
        scores = generator.integers(0, 40, size=24).astype(float)
        permutations = [generator.permutation(24) for _ in range(40)]
        found = np.zeros((len(permutations), 24), dtype=bool)
        for row, order in zip(found, permutations):
            row[order] = sklearn_factors(scores[order], 3) > THRESHOLD
        always, sometimes = found.all(0), found.any(0)
        outliers = ours(scores, 3) > THRESHOLD
        assert (always <= outliers).all() and (outliers <= sometimes).all()
        for order in permutations[:3]:
            np.testing.assert_array_equal(ours(scores[order], 3) > THRESHOLD, outliers[order])
        num_dependent += (always != sometimes).any()
    assert num_dependent >= 5  # it is scikit-learn that has no single answer


finite_scores = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
grid_scores = st.integers(-8, 8).map(lambda number: number / 4)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_any_scores_equal_the_definition(data):
    num_scores = data.draw(st.integers(2, 24))
    num_neighbors = data.draw(st.integers(1, num_scores - 1))
    elements = data.draw(st.sampled_from([finite_scores, grid_scores]))
    scores = data.draw(hnp.arrays(np.float64, num_scores, elements=elements))
    before = scores.copy()
    factors = ours(scores, num_neighbors)
    np.testing.assert_allclose(factors, slow_factors(scores.tolist(), num_neighbors), rtol=1e-5)
    if not has_ambiguous_neighbors(scores.tolist(), num_neighbors):
        np.testing.assert_allclose(factors, sklearn_factors(scores, num_neighbors), rtol=1e-5)
    np.testing.assert_array_equal(scores, before)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_valid_mask_equals_the_subset(data):
    shape = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 20))
    num_neighbors = data.draw(st.integers(1, shape[1] - 1))
    scores = data.draw(hnp.arrays(np.float64, shape, elements=finite_scores))
    valid = data.draw(hnp.arrays(bool, shape))
    factors = local_outlier_factor(torch.from_numpy(scores), num_neighbors, torch.from_numpy(valid)).numpy()
    assert np.isfinite(factors).all()
    for row, row_valid, row_factors in zip(scores, valid, factors):
        if row_valid.sum() > num_neighbors:
            np.testing.assert_array_equal(row_factors[row_valid], ours(row[row_valid], num_neighbors))
        else:
            assert (row_factors == 1).all()


def test_no_matrix_over_pairs():
    """The largest tensor on the way grows with N times k, not with N times N."""
    scores = torch.randn(1, 8192, generator=torch.Generator().manual_seed(0))
    with LargestTensor() as largest:
        local_outlier_factor(scores, 20)
    assert largest.num_elements <= 4 * 8192 * 21


@pytest.mark.parametrize("num_neighbors, num_scores", [(0, 5), (-1, 5), (5, 5), (6, 5), (1, 1), (20, 0)])
def test_too_few_scores_is_an_error_that_says_so(num_neighbors, num_scores):
    with pytest.raises(ValueError, match=rf"num_neighbors .* \({num_scores}\), got {num_neighbors}"):
        local_outlier_factor(torch.zeros(1, num_scores), num_neighbors)


@pytest.mark.parametrize("shape", [(5,), (1, 2, 5)])
def test_wrong_shape_is_an_error_that_says_so(shape):
    with pytest.raises(ValueError, match=r"scores must have shape \[images, patches\], got"):
        local_outlier_factor(torch.zeros(shape), 2)


def test_empty_batch():
    assert local_outlier_factor(torch.zeros(0, 30), 5).shape == (0, 30)
