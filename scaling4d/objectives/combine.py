"""Metrics of batches into those of all of them.

Responsible for: how an objective's metrics add up. Not responsible for: the metrics themselves, or the same rule inside
a training step (``trainer.py``).
"""

import collections
from collections.abc import Mapping, Sequence

import numpy as np


def combine(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Means weighted by ``weight``; the largest where a name begins with ``max_``."""
    weights = np.array([part["weight"] for part in parts], np.float64)
    columns: dict[str, list[float]] = collections.defaultdict(list)
    for part in parts:
        for name, value in part.items():
            columns[name].append(float(value))
    del columns["weight"]
    return {
        name: max(values) if name.startswith("max_") else float(np.average(values, weights=weights))
        for name, values in columns.items()
    }
