"""The n-th example of a run, whatever happens to its record.

Responsible for: going from a global index to pixels (plan, order, read, decode) and for what stands in for a record
that is bad or blocked, so that every index always gives exactly one example and no batch ever shifts. Pure Python:
usable without TensorFlow. Not responsible for: threads, batches and prefetching (``source.py`` and ``stream.py``).
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scaling4d.data.decode import BadClip, ClipSettings, decode_clips
from scaling4d.data.example import Value
from scaling4d.data.mixture import DataSet, Plan, Share
from scaling4d.data.order import BLOCK_RECORDS, Draws, Order, epoch_and_record, substitute_record
from scaling4d.data.records import BadRecord, RecordSource

GOOD, BAD_READ, BAD_DECODE, BLOCKED = range(4)
SUBSTITUTE_TRIES = 3


@dataclass(frozen=True)
class Clip:
    """One example.

    video: uint8 [frames, size, size, 3].
    weight: 1, or 0 where no record could be used and the video is zeros.
    bad: why the record that belonged here was not used: 0 it was, 1 reading or CRC, 2 decoding, 3 source is blocked.
    source: the data set it belongs to, by its place in the plan.
    """

    video: np.ndarray
    weight: float
    bad: int
    source: int = 0


class _Blocked(Exception):
    """A record whose source may not be used."""


Notice = Callable[[int, int], None]
"""Told the number of a data set and of a record in it."""


def _ignore(source: int, record: int) -> None:
    pass


class ClipLoader:
    """Examples of a plan by their global index; ``load`` may be called from any thread.

    A record that is bad or blocked is replaced by another one of the same data set that depends only on the seed and
    the draw; after three that cannot be used either the video is zeros with weight 0. The augmentation's random numbers
    are those of the index, whichever record is used.
    """

    def __init__(
        self,
        plan: Plan,
        records: Sequence[RecordSource],
        *,
        seed: int,
        order: Order,
        settings: ClipSettings,
        block_records: int = BLOCK_RECORDS,
        blocked: frozenset[bytes] = frozenset(),
        on_bad: Notice = _ignore,
    ):
        """``records``: of the data sets of the plan's last segment, in its order; examples before that segment cannot
        be loaded. blocked: sources whose records are not used. on_bad: told of each record that is bad."""
        self.settings = settings
        self.records = list(records)
        self._plan, self._seed, self._order = plan, seed, order
        self._block_records, self._blocked, self._on_bad = block_records, blocked, on_bad
        self._on_try: Notice = _ignore

    def watched(self, *, on_bad: Notice = _ignore, on_try: Notice = _ignore) -> "ClipLoader":
        """The same loader with other listeners; on_try is told of a record before it is touched, and may raise BadClip
        to have it left alone."""
        loader = copy.copy(self)
        loader._on_bad, loader._on_try = on_bad, on_try
        return loader

    @property
    def retries(self) -> int:
        """How many reads of storage were tried again so far, by all who share the records."""
        return sum(records.retries for records in self.records)

    def load(self, indices: Sequence[int], outs: Sequence[np.ndarray] | None = None) -> list[Clip]:
        """The examples of global indices; neighbours that share a draw are decoded in one pass.

        outs: an array uint8 [frames, size, size, 3] for each index, to hold its video; None for new ones.
        """
        clips: list[Clip] = []
        for (source, draw), group in itertools.groupby(indices, self._plan.locate):
            numbers = list(group)
            targets = outs[len(clips) : len(clips) + len(numbers)] if outs is not None else None
            clips += self._load_draw(source, draw, numbers, targets)
        return clips

    def _load_draw(self, source: int, draw: int, indices: list[int], outs: Sequence[np.ndarray] | None) -> list[Clip]:
        share, records = self._plan.segments[-1].shares[source], self.records[source]
        bad = GOOD
        for attempt in range(SUBSTITUTE_TRIES + 1):
            record = self._record(share, draw, attempt)
            try:
                self._on_try(source, record)
                videos = self._videos(records, record, indices, outs)
                return [Clip(video, 1.0, bad, source) for video in videos]
            except BadRecord:
                bad = bad or BAD_READ
            except BadClip:
                bad = bad or BAD_DECODE
            except _Blocked:
                bad = bad or BLOCKED
            if not attempt and bad != BLOCKED:
                self._on_bad(source, record)
        if outs is None:
            size = self.settings.size
            outs = [np.empty((self.settings.frames, size, size, 3), np.uint8) for _ in indices]
        for out in outs:
            out.fill(0)
        return [Clip(out, 0.0, bad, source) for out in outs]

    def _record(self, share: Share, draw: int, attempt: int) -> int:
        if attempt:
            return substitute_record(self._seed, draw, share.clips, attempt, share.key)
        return epoch_and_record(self._seed, draw, share.clips, self._order, share.key, self._block_records)[1]

    def _videos(
        self, records: RecordSource, record: int, indices: list[int], outs: Sequence[np.ndarray] | None
    ) -> Sequence[np.ndarray]:
        fields = records.read(record)
        if self._blocked and fields.get("source") in self._blocked:
            raise _Blocked
        return decode_fields(records, fields, self.settings, [Draws(self._seed, index) for index in indices], outs)


def decode_fields(
    records: RecordSource,
    fields: Mapping[str, Value],
    settings: ClipSettings,
    draws: Sequence[Draws],
    outs: Sequence[np.ndarray] | None = None,
) -> Sequence[np.ndarray]:
    """The examples of a record of ``records``, one for each of ``draws``; raises BadClip.

    outs: as for ``decode.cut_examples``. Sources whose records are no mp4 have a method ``decode(fields, settings,
    draws, outs)`` of their own.
    """
    decode = getattr(records, "decode", None)
    if decode is not None:
        return decode(fields, settings, draws, outs)
    video, frames = fields.get("video"), fields.get("frames")
    if not isinstance(video, bytes) or not isinstance(frames, int):
        raise BadClip("the record lacks 'video' or 'frames'")
    return decode_clips(video, frames, settings, draws, outs)


def load_clip(records: RecordSource, index: int, *, seed: int, order: Order, settings: ClipSettings) -> Clip:
    """Example ``index`` of the stream over one data set alone."""
    plan = Plan.fresh([DataSet("clips", len(records), "")], seed=seed)
    return ClipLoader(plan, [records], seed=seed, order=order, settings=settings).load([index])[0]
