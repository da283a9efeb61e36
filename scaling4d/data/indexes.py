"""The offset indexes of all shards of a split, read at once.

Responsible for: reading them concurrently, from the packed file where there is one, and comparing each with the
manifest. Not responsible for: what an index says (``records.py``).

A data set of 170 million clips may have 166,000 shards. Opening as many small objects of a bucket takes minutes and
each host does it, so the index files of a split may also lie one after the other in one file (``docs/data.md``).
"""

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import google_crc32c
import numpy as np

from scaling4d.data.records import decode_index, index_bytes
from scaling4d.data.retries import ReadError
from scaling4d.data.storage import Store
from scaling4d.errors import UserError

PIECE_BYTES = 2**24  # of the packed file, read at a time
PIECE_THREADS = 8  # bounds the memory
THREADS = 64  # for small files: what counts is how many are waited for at the same time

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class IndexedShard(Protocol):
    """What is asked of ``manifest.Shard``."""

    @property
    def name(self) -> str: ...

    @property
    def clips(self) -> int: ...

    @property
    def index_crc32c(self) -> str: ...

    @property
    def index_name(self) -> str: ...


def read_offsets(store: Store, packed_name: str, shards: Sequence[IndexedShard]) -> list[np.ndarray]:
    """For each shard its offsets uint32 [clips + 1]; raises UserError when an index is missing or not the shard's."""
    pieces = _pieces(shards)
    if not pieces:
        return []
    try:
        first = _read_piece(store, packed_name, pieces[0])
    except ReadError:  # buckets also say "forbidden" for what is not there
        return _in_threads(lambda shard: _read_index(store, shard), shards)
    rest = _in_threads(lambda piece: _read_piece(store, packed_name, piece, final=True), pieces[1:], PIECE_THREADS)
    return list(itertools.chain(first, *rest))


def _pieces(shards: Sequence[IndexedShard]) -> list[tuple[int, int, Sequence[IndexedShard]]]:
    """Runs of shards, with the place in the packed file where their indexes begin and end."""
    pieces = []
    begin = end = first = 0
    for number, shard in enumerate(shards):
        end += index_bytes(shard.clips)
        if end - begin >= PIECE_BYTES or number == len(shards) - 1:
            pieces.append((begin, end, shards[first : number + 1]))
            begin, first = end, number + 1
    return pieces


def _read_piece(
    store: Store, name: str, piece: tuple[int, int, Sequence[IndexedShard]], *, final: bool = False
) -> list[np.ndarray]:
    begin, end, shards = piece
    try:
        data = store.read(name, begin, end - begin)
    except ReadError as error:
        if not final:
            raise
        where = f"{store.directory}/{name}"
        raise UserError(f"{where} cannot be read: {error}; delete it (the indexes beside the shards do)") from error
    offsets, place = [], 0
    for shard in shards:
        length = index_bytes(shard.clips)
        offsets.append(_checked(data[place : place + length], f"{store.directory}/{name}", shard))
        place += length
    return offsets


def _read_index(store: Store, shard: IndexedShard) -> np.ndarray:
    path = f"{store.directory}/{shard.index_name}"
    try:
        return _checked(store.read_bytes(shard.index_name), path, shard)
    except ReadError as error:
        raise UserError(f"{path} cannot be read: {error}; ingest the data set again") from error


def _checked(data: bytes, path: str, shard: IndexedShard) -> np.ndarray:
    offsets = decode_index(data, path)
    if f"{google_crc32c.value(data):08x}" != shard.index_crc32c or len(offsets) != shard.clips + 1:
        raise UserError(
            f"{path} belongs to another shard or data set than {shard.name} (its CRC or length is not the manifest's)"
        )
    return offsets


def _in_threads(work: Callable[[_Item], _Result], items: Sequence[_Item], threads: int = THREADS) -> list[_Result]:
    """``work`` of each item, in order; ends at the first error."""
    if not items:
        return []
    results = {0: work(items[0])}  # alone: what fails for all fails once, and for the first
    threads = max(1, min(threads, len(items) - 1))
    stop = threading.Event()

    def take_every(start: int) -> None:
        try:
            for number in range(1 + start, len(items), threads):
                if stop.is_set():
                    return
                results[number] = work(items[number])
        except BaseException:
            stop.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="read-index") as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(take_every, start) for start in range(threads)]):
                done.result()
        finally:
            stop.set()
    return [results[number] for number in range(len(items))]
