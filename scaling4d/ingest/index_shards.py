"""Makes a data set of TFRecord shards that are there already: JPEG clips as DMVR and Scenic read them.

Responsible for: an index and a table for each shard, the packed indexes and a manifest; the shards themselves are not
touched. Not responsible for: what the records hold (``scaling4d.data.jpeg_clips``) or flags (``checks_cli.py``).

Every byte is read once: the CRC and the form of each record are checked, and a shard's checksum is kept. What a shard
gave is written down in a journal when its index and table are on the disk, so that a killed call goes on there.
"""

import json
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import google_crc32c

from scaling4d.data.catalog import encode_entry, encode_table, entry_of, read_table, table_name
from scaling4d.data.cores import usable_cores
from scaling4d.data.jpeg_clips import parse_jpeg_clip
from scaling4d.data.manifest import (
    ERRORS_NAME,
    FORMAT,
    JPEG_FORMAT,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Shard,
    Split,
    read_manifest,
)
from scaling4d.data.records import MAX_SHARD_BYTES, BadRecord, encode_index, unframe_record
from scaling4d.errors import UserError
from scaling4d.ingest.publish import read_errors
from scaling4d.ingest.scan import scan_lengths
from scaling4d.ingest.shards import write_durably, write_packed_indexes
from scaling4d.ingest.sources import Source, files_digest, printable
from scaling4d.ingest.verify import VerifyProgress
from scaling4d.ingest.work import Skipped, software

_JOURNAL = ".indexed.jsonl"


@dataclass(frozen=True)
class Indexed:
    """A shard file, what its usable records add up to, and what is wrong with it."""

    shard: Shard
    frames: int = 0
    seconds: float = 0.0
    problems: tuple[Skipped, ...] = ()


def index_shards(
    directory: str | pathlib.Path,
    *,
    workers: int | None = None,
    progress: Callable[[VerifyProgress], None] = lambda _: None,
) -> tuple[Manifest, tuple[Skipped, ...]]:
    """Writes the index files, tables and the manifest of ``directory``; the manifest and what is wrong with records.

    Shards are the files directly in it whose names hold ``tfrecord``. Those whose names begin with ``val`` are the
    split ``validation``, those with ``test`` are left out, all others are ``train``; each in the order of the names.
    Damaged records keep their numbers, and a run gets past them. Raises UserError when there are no such shards, none
    has a usable record, or the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    files = _find(directory)
    finished = _finished_before(directory, files)
    if finished:
        return finished
    total = sum(file.size for file in files)
    try:
        journal = _Journal(directory / _JOURNAL)
        found: list[Indexed] = []
        done = problems = 0
        stop = threading.Event()
        progress(VerifyProgress(0, len(files), 0, total, 0))
        with ThreadPoolExecutor(workers or usable_cores(), thread_name_prefix="index") as pool:
            try:
                for file, indexed in zip(files, pool.map(lambda file: _index(file, journal, stop), files), strict=True):
                    found.append(indexed)
                    done, problems = done + file.size, problems + len(indexed.problems)
                    progress(VerifyProgress(len(found), len(files), done, total, problems))
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return _finish(directory, files, found)
    except OSError as error:
        where = error.filename or directory
        raise UserError(f"indexing stopped: {where}: {error.strerror}; the same command goes on from there") from error


def _find(directory: pathlib.Path) -> list[Source]:
    try:
        paths = sorted(path for path in directory.iterdir() if path.is_file() and "tfrecord" in path.name)
        manifest = directory / MANIFEST_NAME
        own = manifest.exists() and json.loads(manifest.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError) as error:
        raise UserError(f"--index {directory}: cannot be read: {error}") from error
    if own:
        raise UserError(f"--index {directory}: holds a data set that `scaling4d ingest` made, which has its index")
    paths = [path for path in paths if not path.name.endswith((".index", ".sources.tsv")) and path.name[:1] != "."]
    shards = [path for path in paths if not path.name.startswith("test")]
    if not shards:
        raise UserError(
            f"--index {directory}: holds no shards (files with 'tfrecord' in their names, but for 'test...')"
        )
    states = [(path, path.stat()) for path in shards]
    return [Source(path.name, path, state.st_size, state.st_mtime_ns) for path, state in states]


def _finished_before(directory: pathlib.Path, files: Sequence[Source]) -> tuple[Manifest, tuple[Skipped, ...]] | None:
    path = directory / MANIFEST_NAME
    if not path.exists():
        return None
    manifest, newest = read_manifest(directory), max(file.modified for file in files)
    if manifest.files_digest != files_digest(files) or newest > path.stat().st_mtime_ns:
        return None
    return manifest, read_errors(directory)


def _index(file: Source, journal: "_Journal", stop: threading.Event) -> Indexed:
    known = journal.find(file)
    if known:
        return known
    lengths, lines, problems = [], [], []
    frames, seconds = 0, 0.0
    checksum = google_crc32c.Checksum()
    with open(file.path, "rb") as data:
        for length in _lengths(file, problems):
            if stop.is_set():
                raise UserError("indexing was stopped")
            entry = data.read(length)
            checksum.update(entry)
            try:
                fields = parse_jpeg_clip(unframe_record(entry))
                frames, seconds = frames + fields["frames"], seconds + _seconds(fields)
            except (BadRecord, ValueError) as error:
                problems.append(Skipped(f"{file.name}, record {len(lengths)}", "corrupt", str(error)))
                fields = {"source": b"", "start_us": 0, "frames": 0, "fps": 0.0, "width": 0, "height": 0}
            lines.append(encode_entry(entry_of(fields)))
            lengths.append(length)
        while rest := data.read(1 << 20):
            checksum.update(rest)
    index = encode_index(lengths)
    crcs = {"crc32c": checksum.hexdigest().decode(), "index_crc32c": f"{google_crc32c.value(index):08x}"}
    shard = Shard(name=file.name, clips=len(lengths), bytes=sum(lengths), **crcs)
    write_durably(file.path.with_name(shard.index_name), index)
    write_durably(file.path.with_name(table_name(shard.name)), encode_table(lines))
    indexed = Indexed(shard, frames, seconds, tuple(problems))
    journal.add(file, indexed)
    return indexed


def _lengths(file: Source, problems: list[Skipped]) -> Iterator[int]:
    """The lengths of the entries as far as there are any; an index reaches to 4 GiB."""
    place = 0
    try:
        for length in scan_lengths(file.path):
            place += length
            if place > MAX_SHARD_BYTES:
                raise BadRecord(f"what lies beyond {MAX_SHARD_BYTES} bytes cannot be indexed; split the shard")
            yield length
    except BadRecord as error:
        problems.append(Skipped(file.name, "corrupt", str(error)))


def _seconds(fields: dict) -> float:
    return fields["frames"] / fields["fps"] if fields["fps"] else 0.0


def _finish(
    directory: pathlib.Path, files: Sequence[Source], found: Sequence[Indexed]
) -> tuple[Manifest, tuple[Skipped, ...]]:
    splits = {}
    for split in SPLITS:
        mine = [
            one for one in found if (one.shard.name.startswith("val")) == (split == "validation") and one.shard.clips
        ]
        sources: set[int] = set()
        for one in mine:
            entries = read_table(directory / table_name(one.shard.name))
            sources.update(hash(entry.source) for entry in entries if entry.source)
        splits[split] = Split(
            clips=sum(one.shard.clips for one in mine),
            frames=sum(one.frames for one in mine),
            sources=len(sources),
            seconds=round(sum(one.seconds for one in mine), 3),
            shards=tuple(one.shard for one in mine),
        )
    problems = tuple(problem for one in found for problem in one.problems)
    if not any(split.frames for split in splits.values()):
        first = f" ({problems[0].name}: {problems[0].detail})" if problems else ""
        raise UserError(f"--index {directory}: no record is a clip of JPEG frames{first}")
    (directory / MANIFEST_NAME).unlink(missing_ok=True)  # what it said of the shards is over
    write_packed_indexes(directory, splits)
    lines = ["file\treason\tdetail", *("\t".join(map(printable, (p.name, p.reason, p.detail))) for p in problems)]
    write_durably(directory / ERRORS_NAME, ("\n".join(lines) + "\n").encode())
    manifest = Manifest(
        settings={},
        software=software(),
        files=len(files),
        files_digest=files_digest(files),
        skipped={"corrupt": len(problems)} if problems else {},
        splits=splits,
        format=JPEG_FORMAT,
    )
    write_durably(directory / f"{MANIFEST_NAME}.aside", manifest.to_json().encode())
    (directory / f"{MANIFEST_NAME}.aside").replace(directory / MANIFEST_NAME)
    (directory / _JOURNAL).unlink(missing_ok=True)
    return manifest, problems


class _Journal:
    """What shards gave, by name, size and time of change."""

    def __init__(self, path: pathlib.Path):
        self._path, self._lock = path, threading.Lock()
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        self._known = {tuple(entry["file"]): entry["indexed"] for entry in map(json.loads, lines)}
        # A last line that was cut off must not run into the next one.
        write_durably(path, b"".join(line + b"\n" for line in lines))

    def find(self, file: Source) -> Indexed | None:
        raw = self._known.get((file.name, file.size, file.modified))
        if raw is None:
            return None
        problems = tuple(Skipped(**problem) for problem in raw["problems"])
        return Indexed(Shard(**raw["shard"]), raw["frames"], raw["seconds"], problems)

    def add(self, file: Source, indexed: Indexed) -> None:
        entry = {"file": [file.name, file.size, file.modified], "indexed": asdict(indexed)}
        with self._lock, open(self._path, "ab") as journal:
            journal.write(json.dumps(entry).encode() + b"\n")
