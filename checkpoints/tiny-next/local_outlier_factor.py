"""Local Outlier Factor (LOF) of one-dimensional scores, batched, on the scores' own device.

Source: Breunig et al., "LOF: Identifying Density-Based Local Outliers" (SIGMOD 2000), in the exact form of
scikit-learn's `LocalOutlierFactor(n_neighbors=k, contamination="auto")`, which the paper's release calls on the CPU.

The design rests on two facts of one dimension. The k nearest neighbours of a point are among the k scores before and
the k scores after it in sorted order. And of these 2k exactly one of each pair (o-th before, (k + 1 - o)-th after) is
a neighbour, the nearer one: the o-th before is among the k nearest just when at most k - o of those after are nearer.
So no N x N distance matrix, no tree, no search and no gather is needed: one sort, then element-wise work on [B, N, k].

Where a smaller and a larger score are exactly as far away and only one of them fits among the k neighbours,
scikit-learn takes whichever its tree visits first, which depends on the order of the input; here it is the smaller.

B images, N patches, k neighbours.
"""

import torch


# scikit-learn's guard against a division by zero where more than k scores are equal.
_DENSITY_EPSILON = 1e-10


def local_outlier_factor(scores: torch.Tensor, num_neighbors: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Local Outlier Factor of every score within its own row.

    Args:
        scores: [B, N], any floating dtype; computed in float64 (float32 on devices without it). Never modified.
        num_neighbors: k, the number of neighbours that estimate a score's local density.
        valid: optional [B, N] bool; scores outside it neither count as neighbours nor get a factor. A row with k or
            fewer valid scores has too few points for a density estimate: all its factors are 1.

    Returns:
        [B, N] float factors: about 1 for an inlier, larger for an outlier, exactly 1 outside `valid`.

    Raises:
        ValueError: if `scores` is not [B, N], or 1 <= num_neighbors < N does not hold.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape [images, patches], got {tuple(scores.shape)}.")
    num_scores, k = scores.shape[1], num_neighbors
    if not 1 <= k < num_scores:
        raise ValueError(
            f"num_neighbors must be at least 1 and smaller than the number of scores ({num_scores}), got {k}: "
            "choose fewer neighbours."
        )
    # In bfloat16, and for close scores even in float32, rounding alone changes the number of outliers.
    scores = scores.to(torch.float32 if scores.device.type == "mps" else torch.float64)
    if valid is not None:
        scores = scores.masked_fill(~valid, torch.inf)
    ordered, order = scores.sort(dim=1, stable=True)

    # Infinitely far neighbours stand outside the row; views of the k scores before and after each one pair them up.
    outside = ordered.new_full((len(ordered), k), torch.inf)
    point, (lower, higher) = ordered[:, :, None], _before_and_after(ordered, outside)
    to_lower, to_higher = (point - lower).abs(), higher - point  # [B, N, k]
    is_lower = to_lower <= to_higher

    def of_neighbors(values: torch.Tensor) -> torch.Tensor:
        return torch.where(is_lower, *_before_and_after(values, outside))

    distance = torch.minimum(to_lower, to_higher)
    k_distance = distance.amax(2)
    reachability = torch.maximum(distance, of_neighbors(k_distance))
    density = (reachability.mean(2) + _DENSITY_EPSILON).reciprocal()
    factor = of_neighbors(density).mean(2) / density

    factor = torch.empty_like(factor).scatter_(1, order, factor)
    if valid is not None:
        has_enough = valid.sum(1, keepdim=True) > k
        factor = torch.where(valid & has_enough, factor, 1.0)
    return factor


def _before_and_after(values: torch.Tensor, outside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two [B, N, k] views: the k values before and after each of [B, N], with `outside` [B, k] beyond either end."""
    k = outside.shape[1]
    padded = torch.cat([outside, values, outside], dim=1)
    return padded[:, : -k - 1].unfold(1, k, 1), padded[:, k + 1 :].unfold(1, k, 1)
