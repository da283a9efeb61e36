"""Cuts a stream of frames into scenes and scenes into clips.

Responsible for: where a clip begins and ends. Not responsible for: decoding before (``media.py``) or encoding after
(``mp4.py``).
"""

from collections.abc import Iterable, Iterator

import numpy as np

from scaling4d.ingest.timing import Timed

THUMBNAIL = (18, 32)


def thumbnail(luma: np.ndarray) -> np.ndarray:
    """Means of an 18 x 32 grid over ``luma`` uint8 [height, width]; float32 [18, 32], 0 to 255."""
    means = luma.astype(np.float32)
    for axis, cells in enumerate(THUMBNAIL):
        length = means.shape[axis]
        cells = min(cells, length)
        edges = np.arange(cells) * length // cells
        widths = np.diff(np.append(edges, length)).astype(np.float32)
        means = np.add.reduceat(means, edges, axis=axis) / (widths[:, None] if axis == 0 else widths)
    return means


def scenes(frames: Iterable[Timed], threshold: float | None) -> Iterator[tuple[bool, Timed]]:
    """Yields (whether a new scene begins here, frame) for I420 frames [height * 3 / 2, width].

    A scene begins where the thumbnail changes by more than ``threshold`` levels on average, where time jumps and where
    the picture changes size.
    """
    before: np.ndarray | None = None
    shape: tuple[int, ...] | None = None
    for timed in frames:
        pixels = timed.frame
        small = None if threshold is None else thumbnail(pixels[: pixels.shape[0] * 2 // 3])
        begins = timed.jump or pixels.shape != shape
        if not begins and threshold is not None:
            begins = float(np.abs(small - before).mean()) > threshold
        yield begins, timed
        before, shape = small, pixels.shape


def clips(frames: Iterable[tuple[bool, Timed]], most: int) -> Iterator[list[Timed]]:
    """Runs of up to ``most`` frames of one scene, in order; every frame is in exactly one."""
    clip: list[Timed] = []
    for begins, timed in frames:
        if clip and (begins or len(clip) == most):
            yield clip
            clip = []
        clip.append(timed)
    if clip:
        yield clip
