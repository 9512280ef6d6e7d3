"""Accuracy, what is retained of it, and how sure one can be.

"Retained" is what the papers of this field report: the accuracy with fewer tokens divided by the accuracy with all of
them, for each kind of question, then the mean over kinds. Questions about one image are not independent, so intervals
come from a paired bootstrap that draws whole images: every method is resampled by the same draws.
"""

from dataclasses import dataclass

import numpy as np


RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


class PairedBootstrap:
    """Draws of images, shared by all methods so that their differences are paired.

    Args:
        images: the image of each question, any hashable or comparable labels, [questions].
        kinds: the kind of each question, [questions].
    """

    def __init__(self, images: np.ndarray, kinds: np.ndarray, seed: int = 0) -> None:
        if len(images) != len(kinds) or len(images) == 0:
            raise ValueError(f"images and kinds must be as long as each other and not empty, got {len(images)} and "
                             f"{len(kinds)}.")  # fmt: skip
        self.kinds, self._kind = np.unique(kinds, return_inverse=True)
        self._images, self._image = np.unique(images, return_inverse=True)
        generator = np.random.default_rng(seed)
        count = len(self._images)
        draws = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        # The first row is the sample itself: estimates and resamples are one computation.
        self._draws = np.concatenate([np.ones((1, count), dtype=draws.dtype), draws]).astype(np.float64)
        self._questions = self._per_draw(np.ones(len(images)))

    def accuracy(self, correct: np.ndarray) -> np.ndarray:
        """Accuracy by kind [1 + resamples, kinds], the sample itself first; NaN where a kind is not drawn."""
        with np.errstate(invalid="ignore"):
            return self._per_draw(correct) / self._questions

    def retained(self, correct: np.ndarray, correct_with_all_tokens: np.ndarray) -> np.ndarray:
        """Ratio of the accuracies [1 + resamples, kinds]; NaN where the model is never right with all tokens."""
        everything = self.accuracy(correct_with_all_tokens)
        return self.accuracy(correct) / np.where(everything > 0, everything, np.nan)

    def _per_draw(self, values: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(self._images), len(self.kinds)))
        np.add.at(sums, (self._image, self._kind), values)
        return self._draws @ sums


def mean_over_kinds(values: np.ndarray) -> np.ndarray:
    """[draws] mean of [draws, kinds] over the kinds that have a value; NaN where none has."""
    has_value = np.isfinite(values)
    count = has_value.sum(1)
    return np.where(count > 0, np.where(has_value, values, 0).sum(1) / np.maximum(count, 1), np.nan)


def interval(values: np.ndarray) -> Interval:
    """The first value, and the central 95 % of the resamples that follow it."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values[1:], [tail, 100 - tail]) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's 95 % interval for a share of independent trials."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be between 0 and trials, and trials at least 1, got {successes} of {trials}.")
    z = 1.959963984540054
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return Interval(share, middle - half, middle + half)
