"""Features as colors: their first three principal components.

Responsible for: finding the components of a video's tokens and turning tokens into RGB. Not responsible for: models or
pictures of frames (``features.py``).

The components are those of a bounded sample of the tokens, centered: the eigenvectors of its covariance with the
largest eigenvalues. An eigenvector has no sign of its own: here the loading of largest magnitude (the first of equals)
is positive. Of each component the 1st to 99th percentile of the sample become 0 to 255, so that a few extreme tokens do
not darken all others; red is the first component, green the second, blue the third. A component without variance is
mid-gray.
"""

from typing import NamedTuple

import numpy as np

SAMPLE = 10_000
"""Tokens that the components are found from; each of three directions among thousands of tokens is well determined."""

_PERCENTILES = (1.0, 99.0)
_GRAY = 127.5


class PrincipalColors(NamedTuple):
    """mean float32 [width]; components float32 [width, 3]; low, high float32 [3]: what becomes 0 and 255."""

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Colors uint8 [..., 3] of tokens [..., width]."""
        scores = (tokens.astype(np.float32) - self.mean) @ self.components
        span = self.high - self.low
        flat = ~(span > 0)
        levels = (scores - self.low) / np.where(flat, 1, span) * 255
        return np.rint(np.clip(np.where(flat, _GRAY, levels), 0, 255)).astype(np.uint8)


def fit(tokens: np.ndarray) -> PrincipalColors:
    """The colors for ``tokens`` [tokens, width], of any floating-point dtype."""
    width = tokens.shape[1]
    centered = tokens.astype(np.float64)
    mean = centered.mean(axis=0)
    centered -= mean
    values, vectors = np.linalg.eigh(centered.T @ centered)
    components = np.zeros((width, 3))
    found = min(width, 3)
    components[:, :found] = vectors[:, ::-1][:, :found]
    # Directions of rounding errors alone would make noise of nothing.
    components[:, :found] *= values[::-1][:found] > values[-1] * 1e-12
    largest = np.abs(components).argmax(axis=0)
    components *= np.where(components[largest, np.arange(3)] < 0, -1, 1)
    low, high = np.percentile(centered @ components, _PERCENTILES, axis=0)
    return PrincipalColors(*(part.astype(np.float32) for part in (mean, components, low, high)))


def sample_rows(total: int, most: int = SAMPLE) -> np.ndarray:
    """Rising, distinct row numbers below ``total``, at most ``most``: one at a random place in each of as many equal
    stretches, the same every time. (Rows at a fixed stride could all be of one patch.)"""
    if total <= most:
        return np.arange(total)
    edges = np.arange(most + 1) * total // most
    return edges[:-1] + (np.random.default_rng(0).random(most) * np.diff(edges)).astype(np.int64)
