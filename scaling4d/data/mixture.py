"""Which draw of which data set the n-th example of a run is, as a pure function of integers.

Responsible for: the plan of a mixture (exact shares, segments, repeats), its JSON form for checkpoints, and the change
of a mixture in the middle of a run. NumPy at most. Not responsible for: which record a draw is (``order.py``), reading
(``clips.py``) or names and rates (seqio's registry, ``stream.py``).

Positions come in blocks, and a block holds data set d exactly ``draws`` times: the rates, rounded by largest remainder.
A block is the smallest in which each data set is drawn at least once and each rate holds within 1%: 10 positions for
rates of 0.7 and 0.3. Blocks of more than 1024 positions are cut into chunks of 4096 in which every data set has as
equal a share as whole numbers allow; a chunk's positions are permuted. So draw c of a data set is closed form,

    c = first + block * draws + (draws in the block's chunks before) + (rank in the chunk),

a start at any position needs no history, and the draws of a data set come in order, apart from a chunk's shuffling.
Changing any of this changes every run on a mixture: ``order.ORDER_VERSION`` must then be raised.
"""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np

from scaling4d.data.order import MIXTURE_KEY, derive_key, permute
from scaling4d.errors import UserError

TOLERANCE = 0.01  # of each rate, relative
MAX_BLOCK = 2**24  # with 50 draws rounding is within 1%: every rate of 50 / 2**24 (one clip in 335,545) or more holds
CHUNK = 4096
_ANY_SIZE = 1024  # up to here every block size is tried, from there on powers of two


@dataclass(frozen=True)
class DataSet:
    """A data set as the mixture names it: number of clips, fingerprint of its records, rate relative to the others."""

    name: str
    clips: int
    records: str
    rate: float = 1.0


@dataclass(frozen=True)
class Share:
    """A data set in a segment.

    draws: how often a block holds it. first: the number of its first draw in the segment. key: goes into the key of its
    order; 0 for the data set of a run that began with one alone.
    """

    name: str
    clips: int
    records: str
    draws: int
    first: int
    key: int


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream over which the mixture stays the same.

    start: index of its first example. repeats: examples in a row that share one draw. chunk: positions that are
    permuted together; divides the block.
    """

    start: int
    repeats: int
    chunk: int
    shares: tuple[Share, ...]

    @functools.cached_property
    def block(self) -> int:
        """Draws of all data sets in a block."""
        return sum(share.draws for share in self.shares)

    @functools.cached_property
    def _before(self) -> np.ndarray:
        """int64 [chunks + 1, data sets]: draws of each data set in the chunks of a block before this one."""
        return _spread([share.draws for share in self.shares], self.block // self.chunk)

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        """int64 [chunks, data sets]: where each data set ends among a chunk's draws before they are permuted."""
        return np.cumsum(np.diff(self._before, axis=0), axis=1)

    def locate(self, seed: int, index: int) -> tuple[int, int]:
        """The data set and the number of its draw that global example ``index`` is."""
        position = (index - self.start) // self.repeats
        if len(self.shares) == 1:
            return 0, self.shares[0].first + position
        chunk, place = divmod(position, self.chunk)
        rank = permute(place, self.chunk, derive_key(_segment_key(seed, self.start), chunk))
        block, row = divmod(chunk, self.block // self.chunk)
        ends = self._ends[row]
        source = int(ends.searchsorted(rank, side="right"))
        rank -= int(ends[source - 1]) if source else 0
        share = self.shares[source]
        return source, share.first + block * share.draws + int(self._before[row, source]) + rank

    def counters(self, index: int) -> list[int]:
        """For each data set the first draw that no example before ``index`` is; of a chunk that is cut, what is left
        is passed over, so that nothing is drawn again."""
        position = -(-(index - self.start) // self.repeats)
        block, row = divmod(-(-position // self.chunk), self.block // self.chunk)
        before = self._before[row].tolist()
        return [share.first + block * share.draws + n for share, n in zip(self.shares, before, strict=True)]


@dataclass(frozen=True)
class Plan:
    """The segments of a run's stream, ascending by start; the last one has no end."""

    seed: int
    segments: tuple[Segment, ...]

    @classmethod
    def fresh(cls, sets: Sequence[DataSet], *, seed: int, repeats: int = 1) -> "Plan":
        """The plan of a run that begins with these data sets (sorted by name); raises UserError."""
        sets = _checked(sets)
        if repeats < 1:
            raise UserError(f"repeats = {repeats}: must be 1 or more; change --gin.ClipData.repeats")
        draws = block_draws([(one.name, one.rate) for one in sets])
        keys = [_key(one.records) if len(sets) > 1 else 0 for one in sets]
        shares = (Share(s.name, s.clips, s.records, n, 0, k) for s, n, k in zip(sets, draws, keys, strict=True))
        block = sum(draws)
        return cls(seed, (Segment(0, repeats, min(block, CHUNK), tuple(shares)),))

    @classmethod
    def each_once(cls, sets: Sequence[DataSet]) -> "Plan":
        """Every clip of every data set once, then again, in a fixed shuffle over the data sets; for evaluation."""
        sets = _checked(sets)
        if len(sets) == 1:
            return cls.fresh(sets, seed=0)
        shares = tuple(Share(one.name, one.clips, one.records, one.clips, 0, 0) for one in sets)
        return cls(0, (Segment(0, 1, sum(one.clips for one in sets), shares),))

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets of the last segment, in the order that ``locate`` counts them."""
        return tuple(share.name for share in self.segments[-1].shares)

    def segment_at(self, index: int) -> Segment:
        """The segment of global example ``index``."""
        if len(self.segments) == 1:
            return self.segments[0]
        return self.segments[bisect.bisect_right(self.segments, index, key=lambda segment: segment.start) - 1]

    def locate(self, index: int) -> tuple[int, int]:
        """The data set (its place in the segment's shares) and its draw that global example ``index`` is."""
        return self.segment_at(index).locate(self.seed, index)

    def continued(self, fresh: "Plan", at: int) -> "Plan":
        """This plan with the mixture of ``fresh`` from global example ``at`` on.

        Data sets are told by their records: names may change. Those that were there before go on with their next draw.
        Without a difference in what is drawn there is no new segment.
        """
        last, new = self.segments[-1], fresh.segments[-1]
        names = {share.records: share.name for share in new.shares}
        if last.repeats == new.repeats and _drawn(last) == _drawn(new):
            renamed = tuple(replace(share, name=names[share.records]) for share in last.shares)
            return replace(self, segments=(*self.segments[:-1], replace(last, shares=renamed)))
        known: dict[str, Share] = {}
        for segment, end in zip(self.segments, (*(s.start for s in self.segments[1:]), at), strict=True):
            for share, count in zip(segment.shares, segment.counters(end), strict=True):
                known[share.records] = replace(share, first=count)
        shares = (
            replace(share, first=known[share.records].first, key=known[share.records].key)
            if share.records in known
            else share
            for share in new.shares
        )
        kept = tuple(segment for segment in self.segments if segment.start < at)
        return replace(self, segments=(*kept, replace(new, start=at, shares=tuple(shares))))

    def to_json(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps: the segments (the seed is in the fingerprint)."""
        return [dataclasses.asdict(segment) for segment in self.segments]

    @classmethod
    def from_json(cls, seed: int, segments: Sequence[dict[str, Any]]) -> "Plan":
        """The inverse of ``to_json``."""
        made = (Segment(**{**one, "shares": tuple(Share(**share) for share in one["shares"])}) for one in segments)
        return cls(seed, tuple(made))


def block_draws(rates: Sequence[tuple[str, float]]) -> list[int]:
    """How often a block holds each of the named data sets; raises UserError for rates that no block can hold."""
    wrong = [(name, rate) for name, rate in rates if not (np.isfinite(rate) and rate > 0)]
    if wrong:
        raise UserError(f"the rate of data set '{wrong[0][0]}' is {wrong[0][1]}: must be above 0; or leave it out")
    names = [name for name, _ in rates]
    shares = np.array([rate for _, rate in rates], np.float64)
    shares /= shares.sum()
    sizes = [*range(1, _ANY_SIZE + 1), *(2**bits for bits in range(11, MAX_BLOCK.bit_length()))]
    for size in sizes:
        draws = _largest_remainder(shares * size, size)
        off = np.abs(draws / size / shares - 1)
        if draws.min() >= 1 and off.max() <= TOLERANCE:
            return draws.tolist()
    worst = int(off.argmax())
    raise UserError(
        f"data set '{names[worst]}' has {shares[worst]:.2g} of the mixture, too little to hold within 1% in "
        f"{MAX_BLOCK:,} clips; raise its rate to {50 / MAX_BLOCK:.1g} of the sum or more, or leave it out"
    )


def _largest_remainder(shares: np.ndarray, size: int) -> np.ndarray:
    """Whole numbers that add up to ``size``: shares rounded down, and one more for the largest remainders."""
    whole = np.floor(shares).astype(np.int64)
    order = np.argsort(whole - shares, kind="stable")
    whole[order[: size - int(whole.sum())]] += 1
    return whole


def _spread(draws: Sequence[int], chunks: int) -> np.ndarray:
    """int64 [chunks + 1, data sets]: running sums of a table of whole numbers whose rows (chunks) all have the same sum
    and whose columns have the sums ``draws``; each entry is within 2 of the even share of its chunks."""
    total = np.array(draws, np.int64)
    chunk = int(total.sum()) // chunks
    before = np.zeros((chunks + 1, len(draws)), np.int64)
    for row in range(chunks):
        due = total * (row + 1) - before[row] * chunks  # in units of 1 / chunks draws
        here = np.maximum(due // chunks, 0)
        missing = chunk - int(here.sum())
        by_need = np.argsort(here * chunks - due, kind="stable")
        if missing >= 0:
            here[by_need[:missing]] += 1
        else:
            here[[i for i in by_need[::-1] if here[i]][:-missing]] -= 1
        before[row + 1] = before[row] + here
    return before


def _checked(sets: Sequence[DataSet]) -> list[DataSet]:
    if not sets:
        raise UserError("a mixture of no data sets: name one or more")
    sets = sorted(sets, key=lambda one: one.name)
    names: dict[str, str] = {}
    for one in sets:
        if one.records in names:
            raise UserError(
                f"data sets '{names[one.records]}' and '{one.name}' hold the same records: keep one, with both rates"
            )
        names[one.records] = one.name
    return sets


@functools.lru_cache(64)
def _segment_key(seed: int, start: int) -> int:
    return derive_key(seed, MIXTURE_KEY, start)


def _drawn(segment: Segment) -> dict[str, Fraction]:
    return {share.records: Fraction(share.draws, segment.block) for share in segment.shares}


def _key(records: str) -> int:
    return int.from_bytes(hashlib.sha256(records.encode()).digest()[:6], "big") or 1
