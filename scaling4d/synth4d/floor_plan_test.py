"""Gaps between capsules against the distances of many points along them."""

import numpy as np

from scaling4d.synth4d.floor_plan import Capsule


def test_the_gap_is_the_smallest_distance_of_points():
    rng = np.random.default_rng(0)
    share = np.linspace(0, 1, 400)[:, None]
    overlapping = 0
    for case in range(60):
        first, second = (Capsule(*rng.uniform(-2, 2, (2, 2)), rng.uniform(0, 0.5)) for _ in range(2))
        if case % 5 == 0:
            second = Capsule(second.start, second.start, second.radius)  # a disc
        lines = [one.start + share * (one.end - one.start) for one in (first, second)]
        apart = np.linalg.norm(lines[0][:, None] - lines[1][None], axis=-1).min()
        expected = apart - first.radius - second.radius
        assert abs(first.gap(second) - expected) < 0.02
        assert abs(first.gap(second) - second.gap(first)) < 1e-12
        overlapping += first.gap(second) < 0
    assert 10 < overlapping < 50
