"""The order of examples and all their randomness, as pure functions of integers.

Responsible for: which record the n-th example of a run is, and the random numbers that go with it. There is no state:
every value follows from (seed, index), so that a resumed run, another host or another thread sees the same examples.
Not responsible for: reading (``records.py``) or what the random numbers are used for (``decode.py``).

The permutation is an 8-round Feistel network over splitmix64 with cycle walking (Black & Rogaway, "Ciphers with
arbitrary finite domains", 2002): 4 microseconds an index. Four rounds would do for large data sets, but for fewer than
20 records the order is then measurably uneven. It is not tied to a library version: changing anything here changes
every run, so ``ORDER_VERSION`` must then be raised.
"""

import functools
from typing import Literal

import numpy as np

ORDER_VERSION = 1
"""Part of the data fingerprint: two runs with different versions see different examples."""

Order = Literal["shuffled", "sequential", "blocks"]
"""``shuffled``: a permutation of all records an epoch. ``sequential``: file order. ``blocks``: a permutation of blocks
of neighbouring records, then of the records inside each window of ``WINDOW_BLOCKS`` blocks, for storage that dislikes
random reads."""

BLOCK_RECORDS = 64
WINDOW_BLOCKS = 16

_MASK64 = (1 << 64) - 1
_ROUNDS = 8

# What a key is used for; part of the key so that uses never share random numbers.
ORDER_KEY = 1
AUGMENT_KEY = 2
SUBSTITUTE_KEY = 3
MIXTURE_KEY = 4
WINDOW_KEY = 5


def splitmix64(x: int) -> int:
    """One step of splitmix64 (Steele, Lea & Flood 2014): a bijection on 64-bit integers that mixes all bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def splitmix64_array(x: np.ndarray) -> np.ndarray:
    """``splitmix64`` of every element; uint64 in and out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(seed: int, *words: int) -> int:
    """A 64-bit key from a seed and a list of words; any change of any of them gives an unrelated key."""
    key = splitmix64(seed & _MASK64)
    for word in words:
        key = splitmix64(key ^ splitmix64(word & _MASK64))
    return key


def permute(x: int, n: int, key: int) -> int:
    """The place of ``x`` in the permutation of 0..n-1 that belongs to ``key``."""
    if n < 2:
        return 0
    half = ((n - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:  # cycle walking: the network permutes [0, 4**half), fewer than 4 turns on average until x < n
        left, right = x >> half, x & mask
        for i in range(_ROUNDS):
            # splitmix64, written out: this is the work of every look-up, and calls would be a third of it.
            mixed = ((key ^ (right << 8) ^ i) + 0x9E3779B97F4A7C15) & _MASK64
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & mask)
        x = (left << half) | right
        if x < n:
            return x


def permute_array(x: np.ndarray, n: int, key: int) -> np.ndarray:
    """``permute`` of every element of ``x`` (uint64 [...] in, uint64 [...] out); 0.2 microseconds an element."""
    out = np.array(x, dtype=np.uint64)
    if n < 2:
        return np.zeros_like(out)
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    flat = out.reshape(-1)
    todo = np.arange(flat.size)
    while todo.size:
        left, right = flat[todo] >> half, flat[todo] & mask
        for i in range(_ROUNDS):
            mixed = splitmix64_array(np.uint64(key) ^ (right << np.uint64(8)) ^ np.uint64(i))
            left, right = right, left ^ (mixed & mask)
        flat[todo] = (left << half) | right
        todo = todo[flat[todo] >= np.uint64(n)]
    return out


def epoch_and_record(
    seed: int, draw: int, count: int, order: Order, key: int = 0, block_records: int = BLOCK_RECORDS
) -> tuple[int, int]:
    """The epoch and the record number (0..count-1) of draw ``draw`` from a data set of ``count`` records.

    Every epoch holds each record once; all orders but ``sequential`` draw another permutation for each epoch. ``key``
    tells the data sets of a mixture apart; 0 is that of a data set alone, whose draws are the global examples.
    """
    epoch, place = divmod(draw, count)
    if order == "sequential":
        return epoch, place
    words = (epoch, key) if key else (epoch,)
    epoch_key = _epoch_key(seed, *words)
    if order == "shuffled":
        return epoch, permute(place, count, epoch_key)
    return epoch, _record_in_blocks(place, count, epoch_key, block_records)


@functools.lru_cache(4096)  # the data sets of a mixture are each in an epoch of their own
def _epoch_key(seed: int, *words: int) -> int:
    return derive_key(seed, ORDER_KEY, *words)


@functools.lru_cache(4096)
def _window_key(epoch_key: int, window: int) -> int:
    return derive_key(epoch_key, WINDOW_KEY, window)


@functools.lru_cache(16384)  # the blocks of the windows that 64 data sets are in, many times over
def _permuted_block(block: int, blocks: int, epoch_key: int) -> int:
    return permute(block, blocks, epoch_key)


def _record_in_blocks(place: int, count: int, epoch_key: int, block_records: int) -> int:
    """The record at ``place`` of an epoch: blocks permuted (a last, shorter one stays last), then windows permuted."""
    window, inside = divmod(place, block_records * WINDOW_BLOCKS)
    start = window * block_records * WINDOW_BLOCKS
    size = min(block_records * WINDOW_BLOCKS, count - start)
    place = start + permute(inside, size, _window_key(epoch_key, window))
    block, inside = divmod(place, block_records)
    blocks = count // block_records
    if block < blocks:
        block = _permuted_block(block, blocks, epoch_key)
    return block * block_records + inside


def substitute_record(seed: int, draw: int, count: int, attempt: int, key: int = 0) -> int:
    """The record that stands in for a bad one: again a permutation of the epoch, with a key for each attempt."""
    epoch, place = divmod(draw, count)
    words = (epoch, attempt, key) if key else (epoch, attempt)
    return permute(place, count, derive_key(seed, SUBSTITUTE_KEY, *words))


class Draws:
    """The random numbers of one example: a counter-based sequence that depends only on (seed, index)."""

    def __init__(self, seed: int, index: int):
        self._key = derive_key(seed, AUGMENT_KEY, index)
        self._count = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """The next number in [low, high), with 53 random bits."""
        self._count += 1
        return low + (high - low) * ((derive_key(self._key, self._count) >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        """The next integer in 0..n-1."""
        return min(int(self.uniform() * n), n - 1)
