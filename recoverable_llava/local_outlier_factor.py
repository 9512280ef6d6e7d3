"""Local Outlier Factor (LOF) of one-dimensional scores, batched, on the scores' own device.

Source: Breunig et al., "LOF: Identifying Density-Based Local Outliers" (SIGMOD 2000), in the exact form of
scikit-learn's `LocalOutlierFactor(n_neighbors=k, contamination="auto")`, which the paper's release calls on the CPU.

The design rests on one fact: in one dimension the k nearest neighbours of a point, together with the point itself,
are k + 1 *consecutive* values of the sorted scores. So no N x N distance matrix, no tree and no search is needed: one
sort, then element-wise work on [B, N, k + 1].

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

    # How far the o-th score to the left and to the right lies, o = 0..k; infinitely far outside the row.
    positions = torch.arange(num_scores, device=scores.device)[:, None]
    offsets = torch.arange(k + 1, device=scores.device)
    padded = torch.nn.functional.pad(ordered, (k, 0), value=-torch.inf)
    padded = torch.nn.functional.pad(padded, (0, k), value=torch.inf)
    to_left = ordered[:, :, None] - padded[:, positions + k - offsets]  # [B, N, k + 1]
    to_right = padded[:, positions + k + offsets] - ordered[:, :, None]

    # The k nearest are some number of scores to the left and the rest to the right: the split with the nearest farther
    # end. Among equal scores only a split will do that leaves out no score nearer than the k-distance.
    k_distance = torch.maximum(to_left, to_right.flip(2)).amin(2)
    num_nearer_right = ((to_right < k_distance[:, :, None]).sum(2) - 1).clamp(min=0)
    num_within_left = (to_left <= k_distance[:, :, None]).sum(2) - 1
    num_left = torch.minimum(k - num_nearer_right, num_within_left)

    neighborhood = positions - num_left[:, :, None] + offsets  # [B, N, k + 1], the point itself included
    is_self = neighborhood == positions
    neighborhood = neighborhood.clamp(0, num_scores - 1).flatten(1)

    def of_neighborhood(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, neighborhood).unflatten(1, is_self.shape[1:])

    def mean_of_neighbors(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(is_self, 0).sum(2) / k

    distance = (of_neighborhood(ordered) - ordered[:, :, None]).abs()
    density = 1 / (mean_of_neighbors(torch.maximum(distance, of_neighborhood(k_distance))) + _DENSITY_EPSILON)
    factor = mean_of_neighbors(of_neighborhood(density)) / density

    factor = torch.empty_like(factor).scatter_(1, order, factor)
    if valid is not None:
        has_enough = valid.sum(1, keepdim=True) > k
        factor = torch.where(valid & has_enough, factor, 1.0)
    return factor
