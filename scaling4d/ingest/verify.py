"""Checks a finished data set of clips, byte by byte.

Responsible for: every record's CRC and fields, each shard's checksum, the counts of the manifest, and whether clips
decode. Not responsible for: the files beside the shards (``verify_files.py``), printing (``checks_cli.py``) or mending;
a training run gets past bad records by itself (``scaling4d.data.clips``).

Shards are checked one after the other in ``workers`` threads, each read once from front to back, so that memory does
not depend on the size of the data set but for 8 bytes a source video.
"""

import contextlib
import pathlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import google_crc32c

from scaling4d.data.catalog import encode_entry, entry_of, table_name
from scaling4d.data.clips import decode_fields
from scaling4d.data.cores import usable_cores
from scaling4d.data.decode import MAX_FRAMES, BadClip, ClipSettings
from scaling4d.data.example import Value
from scaling4d.data.in_place import InPlaceClips
from scaling4d.data.jpeg_clips import JpegClips
from scaling4d.data.manifest import (
    IN_PLACE_FORMAT,
    JPEG_FORMAT,
    MANIFEST_NAME,
    Label,
    Manifest,
    Shard,
    Split,
    packed_index_name,
    read_manifest,
)
from scaling4d.data.order import Draws
from scaling4d.data.records import BadRecord, ShardedRecords, unframe_record
from scaling4d.ingest.labels import TYPES
from scaling4d.ingest.sources import printable
from scaling4d.ingest.verify_files import (
    Problem,
    check_packed_index,
    check_table,
    indexed_lengths,
    stray_files,
    walked_lengths,
)

DECODED_SHARE = 0.01
_DECODED_SIZE = 32  # pixels a side of the pictures that are made to see that a clip decodes
_FIELDS = {"source": bytes, "frames": int, "width": int, "height": int, "fps": float, "start_us": int}


@dataclass(frozen=True)
class VerifyProgress:
    """How far a check is; bytes are those of the shard files."""

    shards_done: int
    shards: int
    bytes_done: int
    bytes: int
    problems: int


@dataclass(frozen=True)
class Report:
    """What was looked at, and every problem in the order of the shards.

    ``missing``: names of files that a data set may lack, and this one does. ``labels``: in how many clips each is.
    """

    shards: int
    clips: int
    bytes: int
    decoded: int
    problems: tuple[Problem, ...]
    missing: tuple[str, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)


@dataclass
class _Found:
    """What one shard really holds."""

    problems: list[Problem] = field(default_factory=list)
    clips: int = 0
    frames: int = 0
    seconds: float = 0.0
    bytes: int = 0
    decoded: int = 0
    sources: set[int] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)
    table: list[bytes] = field(default_factory=list)
    unread: int = 0


def verify(
    directory: str | pathlib.Path,
    *,
    decoded_share: float = DECODED_SHARE,
    workers: int | None = None,
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> Report:
    """Checks the data set in ``directory``; raises UserError where there is none.

    decoded_share: part of each shard's clips that is decoded as well, at least one a shard, always the same ones; 1
    decodes all. progress: called from this thread after every shard.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    with contextlib.closing(_kind_of(manifest)) as kind:
        return _verify(directory, manifest, kind, decoded_share, workers or usable_cores(), progress)


def _kind_of(manifest: Manifest) -> ShardedRecords:
    """What parses and decodes the records of this format, without any shard."""
    if manifest.format == JPEG_FORMAT:
        return JpegClips([])
    return InPlaceClips([], None, manifest) if manifest.format == IN_PLACE_FORMAT else ShardedRecords([])


def _verify(
    directory: pathlib.Path,
    manifest: Manifest,
    kind: ShardedRecords,
    decoded_share: float,
    workers: int,
    progress: Callable[[VerifyProgress], None],
) -> Report:
    shards = [(name, shard) for name, split in manifest.splits.items() for shard in split.shards]
    found: dict[str, list[_Found]] = {name: [] for name in manifest.splits}
    problems = stray_files(directory, manifest)
    total, done = sum(shard.bytes for _, shard in shards), 0
    stop = threading.Event()
    progress(VerifyProgress(0, len(shards), 0, total, len(problems)))
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        try:
            checks = pool.map(
                lambda item: _check_shard(directory, item[1], kind, manifest.labels, decoded_share, stop), shards
            )
            for number, ((split, shard), result) in enumerate(zip(shards, checks, strict=True), 1):
                found[split].append(result)
                problems += result.problems
                done += shard.bytes
                progress(VerifyProgress(number, len(shards), done, total, len(problems)))
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    missing = []
    for name, split in manifest.splits.items():
        problems += _check_totals(name, split, manifest.labels, found[name])
        path = directory / packed_index_name(name)
        if split.shards and path.exists():
            problems += check_packed_index(path, split.shards)
        elif split.shards:
            missing.append(path.name)
    problems += _shared_sources({name: set().union(*(f.sources for f in each)) for name, each in found.items()})
    everything = [result for each in found.values() for result in each]
    return Report(
        shards=len(shards),
        clips=sum(result.clips for result in everything),
        bytes=sum(result.bytes for result in everything),
        decoded=sum(result.decoded for result in everything),
        problems=tuple(problems),
        missing=tuple(missing),
        labels={name: sum(result.labels[name] for result in everything) for name in manifest.labels},
    )


def _check_shard(
    directory: pathlib.Path,
    shard: Shard,
    kind: ShardedRecords,
    labels: Mapping[str, Label],
    decoded_share: float,
    stop: threading.Event,
) -> _Found:
    found = _Found()

    def problem(what: str, record: int | None = None, name: str = shard.name) -> None:
        found.problems.append(Problem(name, record, what))

    path = directory / shard.name
    lengths = indexed_lengths(directory, shard, problem)
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            problem(f"has {size} bytes; the manifest says {shard.bytes}")
        if lengths is None:
            lengths = list(walked_lengths(path, problem))
        if len(lengths) != shard.clips:
            problem(f"has {len(lengths)} records; the manifest says {shard.clips}")
        decoded = _sample(shard, len(lengths), decoded_share)
        checksum = google_crc32c.Checksum()
        with open(path, "rb") as file:
            for number, length in enumerate(lengths):
                if stop.is_set():
                    return found
                entry = file.read(length)
                checksum.update(entry)
                what = _check_entry(entry, kind, labels, number in decoded, found)
                if what:
                    found.unread += 1
                    problem(what, number)
            while rest := file.read(1 << 20):
                checksum.update(rest)
    except OSError as error:
        problem(f"cannot be read: {error.strerror}")
        found.unread += shard.clips
        return found
    found.bytes = size
    if checksum.hexdigest().decode() != shard.crc32c and not found.problems:
        problem("its checksum is not that of the manifest")
    if not found.unread:
        check_table(directory / table_name(shard.name), found.table, problem)
    found.table.clear()
    return found


def _check_entry(
    entry: bytes, kind: ShardedRecords, labels: Mapping[str, Label], decode: bool, found: _Found
) -> str | None:
    """Counts one record; what is wrong with it, or None."""
    try:
        fields = kind.parse(unframe_record(entry))
    except (BadRecord, ValueError) as error:
        return str(error)
    own = {} if hasattr(kind, "decode") else {"video": bytes}
    for name, wanted in (_FIELDS | own).items():
        if not isinstance(fields.get(name), wanted):
            return f"has no field {name!r}"
    found.clips += 1
    found.frames += fields["frames"]
    found.seconds += fields["frames"] / fields["fps"] if fields["fps"] else 0.0
    if fields["source"]:
        found.sources.add(hash(fields["source"]))
    found.table.append(encode_entry(entry_of(fields)))
    for name, label in labels.items():
        if name in fields:
            found.labels[name] += 1
            if not isinstance(fields[name], TYPES[label.type]):
                return f"its label {name!r} is not of type {label.type}"
    if not 1 <= fields["frames"] <= MAX_FRAMES:
        return f"says {fields['frames']} frames; allowed are 1 to {MAX_FRAMES}"
    return _check_video(fields, kind, found) if decode else None


def _check_video(fields: dict[str, Value], kind: ShardedRecords, found: _Found) -> str | None:
    found.decoded += 1
    every_frame = ClipSettings(frames=fields["frames"], size=_DECODED_SIZE, stride=1, crop="center")
    try:
        decode_fields(kind, fields, every_frame, [Draws(0, 0)])
    except BadClip as error:
        return f"does not decode: {error} ({printable(fields['source'].decode('utf-8', 'surrogateescape'))})"
    return None


def _sample(shard: Shard, clips: int, share: float) -> set[int]:
    """The records that are decoded: evenly spaced, beginning where the shard's name says."""
    count = min(max(round(share * clips), 1), clips)
    first = google_crc32c.value(shard.name.encode())
    return {(first + place * clips // count) % clips for place in range(count)}


def _check_totals(name: str, split: Split, labels: Mapping[str, Label], found: list[_Found]) -> list[Problem]:
    problems = []
    stated = sum(shard.clips for shard in split.shards)
    if stated != split.clips:
        problems.append(Problem(MANIFEST_NAME, None, f"{name}: {split.clips} clips, its shards have {stated}"))
    if any(result.unread for result in found):
        return problems  # the sums of a part mean nothing
    sources = len(set().union(*(result.sources for result in found)))
    for what, said, counted in (
        ("frames", split.frames, sum(result.frames for result in found)),
        ("sources", split.sources, sources),
        ("seconds", round(split.seconds), round(sum(result.seconds for result in found))),
        *(
            (f"clips with the label {label!r}", said.clips.get(name, 0), sum(result.labels[label] for result in found))
            for label, said in labels.items()
        ),
    ):
        if abs(said - counted) > (max(1, 1e-3 * counted) if what == "seconds" else 0):
            problems.append(Problem(MANIFEST_NAME, None, f"{name}: says {said} {what}, its records have {counted}"))
    return problems


def _shared_sources(sources: dict[str, set[int]]) -> list[Problem]:
    names = list(sources)
    pairs = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
    return [
        Problem(MANIFEST_NAME, None, f"{len(shared)} source videos are in {a} and in {b}")
        for a, b in pairs
        if (shared := sources[a] & sources[b])
    ]
