"""The recovery step as the paper's released code runs it, written again for its cost: one image at a time.

Only for comparing speed. It keeps what makes the release slow: scores go to the host as a Python list for each of three
scikit-learn fits, outlier counts come back as Python numbers, and a Python loop over the centres concatenates keys,
features and scores of everything but the centre before each one's nearest neighbours are taken. What it computes
differs from our steps as docs/deviations.md says. Both start from scores, keys and features and end with the tokens.

N patches, C channels.
"""

import numpy as np
import torch
from torch.nn.functional import normalize


def outlier_ratio(scores: torch.Tensor, num_neighbors: int) -> float:
    from sklearn.neighbors import LocalOutlierFactor

    values = scores.to(torch.float32).cpu().numpy().flatten()
    rows = [[values[i]] for i in range(len(values))]
    prediction = LocalOutlierFactor(n_neighbors=num_neighbors, contamination="auto").fit_predict(rows)
    return np.sum(prediction == -1) / len(prediction)


def complement(index: torch.Tensor, length: int) -> torch.Tensor:
    """The numbers below `length` that are not in `index` [1, n], in order."""
    marked = torch.arange(length, device=index.device)[None].scatter(-1, index, 0)
    return marked.sort(dim=-1).values[:, index.shape[-1] :]


def recover(
    attention: torch.Tensor,
    similarity: torch.Tensor,
    keys: torch.Tensor,
    features: torch.Tensor,
    counts: tuple[int, int, int] | None = None,
    merge_neighbors: int = 32,
) -> torch.Tensor:
    """The tokens [1, K, C] of one image.

    Args:
        attention: [1, N] class attention.
        similarity: [1, N] relevance of the patches.
        keys, features: [1, N, C].
        counts: patches to keep by vision, by text, and centres, in place of what the outliers ask for; the fits are
            made all the same.
        merge_neighbors: how many patches a centre absorbs.
    """
    num_patches, channels = features.shape[1:]

    def take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.gather(values, 1, index[:, :, None].expand(-1, -1, values.shape[-1]))

    ratio = outlier_ratio(attention, 20)
    num_visual = int(num_patches * ratio) if counts is None else counts[0]
    by_vision = attention.topk(num_visual, dim=1).indices
    similarity = similarity.clone()
    similarity[:, by_vision[0]] = similarity.min(dim=-1).values
    ratio = outlier_ratio(similarity, 20)
    num_text = int((num_patches - num_visual) * ratio) if counts is None else counts[1]
    by_text = similarity.topk(num_text, dim=1).indices
    kept = torch.cat([by_vision, by_text], dim=-1).sort(dim=-1).values
    main = take(features, kept)

    others = complement(kept, num_patches)
    rest_similarity = 50 * similarity.gather(1, others)
    rest_attention = attention.gather(1, others)
    ratio = outlier_ratio(rest_attention, 10)
    num_centres = int(channels * ratio) if counts is None else counts[2]
    centre = rest_attention.topk(min(num_centres, others.shape[1] - merge_neighbors), dim=1).indices
    rest = take(features, others)
    non_centre = complement(centre, rest.shape[1])
    centres, centre_attention = take(rest, centre), rest_attention.gather(1, centre)
    centre_score, centre_keys = rest_similarity.gather(1, centre), normalize(take(keys, centre), p=2, dim=-1)
    left, left_attention = take(rest, non_centre), rest_attention.gather(1, non_centre)
    left_score, left_keys = rest_similarity.gather(1, non_centre), normalize(take(keys, non_centre), p=2, dim=-1)

    merged = torch.zeros_like(centres)
    for image in range(centres.shape[0]):
        for i in range(centres.shape[1]):

            def but_this(of_centres: torch.Tensor, of_left: torch.Tensor) -> torch.Tensor:
                before, after = of_centres[image, :i][None], of_centres[image, i + 1 :][None]  # noqa: B023
                return torch.cat([before, after, of_left[image][None]], dim=1)  # noqa: B023

            tokens = but_this(centres, left)
            weights = but_this(centre_attention, left_attention)
            similar = torch.bmm(centre_keys[image, i][None, None], but_this(centre_keys, left_keys).transpose(1, 2))
            scores = but_this(centre_score, left_score)
            nearest = (similar + scores[None]).topk(merge_neighbors, dim=2).indices.squeeze()
            absorbed = torch.sum(tokens[:, nearest] * weights[:, nearest].unsqueeze(-1), dim=1)
            merged[image, i] = absorbed + centres[image, i]
    remaining = torch.sum(left * left_attention.unsqueeze(-1), dim=1, keepdim=True)
    return torch.cat([main, merged, remaining], dim=1)
