"""The n-th example of a run, whatever happens to its record.

Responsible for: going from a global index to pixels (order, read, decode) and for what stands in for a bad record, so
that every index always gives exactly one example and no batch ever shifts. Pure Python: usable without TensorFlow.
Not responsible for: threads, batches and prefetching (``source.py`` and ``stream.py``).
"""

from dataclasses import dataclass

import numpy as np

from scaling4d.data.decode import BadClip, ClipSettings, decode_clip
from scaling4d.data.order import Draws, Order, epoch_and_record, substitute_record
from scaling4d.data.records import BadRecord, RecordSource

GOOD, BAD_READ, BAD_DECODE = 0, 1, 2
SUBSTITUTE_TRIES = 3


@dataclass(frozen=True)
class Clip:
    """One example.

    video: uint8 [frames, size, size, 3].
    weight: 1, or 0 where no record could be used and the video is zeros.
    bad: why the record that belonged here was not used: 0 it was, 1 reading or CRC, 2 decoding.
    """

    video: np.ndarray
    weight: float
    bad: int


def load_clip(records: RecordSource, index: int, *, seed: int, order: Order, settings: ClipSettings) -> Clip:
    """Example ``index`` of the stream over ``records``.

    A bad record is replaced by another one that depends only on (seed, index); after three bad substitutes the video
    is zeros with weight 0. The augmentation's random numbers are those of the index, whichever record is used.
    """
    _, record = epoch_and_record(seed, index, len(records), order)
    bad = GOOD
    for attempt in range(SUBSTITUTE_TRIES + 1):
        if attempt:
            record = substitute_record(seed, index, len(records), attempt)
        try:
            fields = records.read(record)
            video, frames = fields.get("video"), fields.get("frames")
            if not isinstance(video, bytes) or not isinstance(frames, int):
                raise BadClip("the record lacks 'video' or 'frames'")
            return Clip(decode_clip(video, frames, settings, Draws(seed, index)), 1.0, bad)
        except BadRecord:
            bad = bad or BAD_READ
        except BadClip:
            bad = bad or BAD_DECODE
    return Clip(np.zeros((settings.frames, settings.size, settings.size, 3), np.uint8), 0.0, bad)
