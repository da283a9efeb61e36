"""What an ingest will take and make, from a few of its files; writes nothing.

Responsible for: choosing the files that are looked at, timing them, and the sums. Not responsible for: the work itself
(``clips.py``) or flags (``cli.py``).

Seconds of video follow from the bytes of the files and what some of them say about themselves; clips, bytes and work
from encoding a few of those for some seconds each, ``workers`` at a time as the ingest would.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from scaling4d.data.records import FRAMING_BYTES
from scaling4d.ingest.clips import Dropped, encode_file
from scaling4d.ingest.media import MediaError, MediaLimits, probe
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.sources import Source, name_bytes
from scaling4d.ingest.work import Done
from scaling4d.status_line import format_duration

PROBED, TIMED = 32, 8
SECONDS_A_FILE = 10.0
_FIELD_BYTES = 150  # of a record besides its video and its source's name


@dataclass(frozen=True)
class Sample:
    """A file that was encoded for a while: how much of it, and what that gave. ``work`` is seconds of one worker."""

    seconds: float
    work: float
    clips: int
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """Sums over all files; ``work`` is seconds of one worker, ``seconds`` those of the video."""

    files: int
    probed: int
    unusable: int
    timed: int
    input_bytes: int
    seconds: float
    clips: float
    bytes: float
    work: float


def estimate(
    sources: Sequence[Source],
    settings: IngestSettings,
    limits: MediaLimits,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Estimate:
    """The estimate; always looks at the same files. progress: called with the files looked at and how many will be."""
    ranked = sorted(sources, key=lambda source: hashlib.sha256(name_bytes(source.name)).digest())
    probed = ranked[:PROBED]
    to_look_at = len(probed) + min(len(probed), TIMED)
    with ThreadPoolExecutor(workers, thread_name_prefix="estimate") as pool:
        lengths: list[float | None] = []
        for length in pool.map(lambda source: _probed_seconds(source, limits), probed):
            lengths.append(length)
            progress(len(lengths), to_look_at)
        usable = [(source, length) for source, length in zip(probed, lengths, strict=True) if length is not None]
        samples: list[Sample] = []
        tried = usable[:TIMED]
        for number, sample in enumerate(pool.map(lambda item: _sample(item[0], settings, limits), tried), 1):
            samples += [sample] if sample else []
            progress(len(probed) + number, len(probed) + len(tried))
    return _sum_up(sources, probed, usable, samples, settings)


def _probed_seconds(source: Source, limits: MediaLimits) -> float | None:
    """What the file says; 0 where it says nothing, None where it cannot be used."""
    try:
        return probe(source.path, limits).seconds
    except MediaError:
        return None


def _sample(source: Source, settings: IngestSettings, limits: MediaLimits) -> Sample | None:
    began, seconds, size, clips, work = time.monotonic(), 0.0, 0, 0, 0.0
    try:
        with closing(encode_file(source.path, settings, limits)) as items:
            for item in items:
                work = time.monotonic() - began
                if isinstance(item, Dropped):
                    break
                clips, seconds = clips + 1, item.start_us * 1e-6 + item.frames / item.fps
                size += len(item.video) + len(name_bytes(source.name)) + _FIELD_BYTES + FRAMING_BYTES
                if work > SECONDS_A_FILE:
                    break
    except MediaError:
        return None
    return Sample(seconds, work, clips, size)


def _sum_up(
    sources: Sequence[Source],
    probed: Sequence[Source],
    usable: Sequence[tuple[Source, float]],
    samples: Sequence[Sample],
    settings: IngestSettings,
) -> Estimate:
    total = sum(max(source.size, 0) for source in sources)
    stated = [(source, length) for source, length in usable if length]
    unstated = sum(max(source.size, 0) for source, length in usable if not length)
    seen = sum(max(source.size, 0) for source in probed) - unstated
    seconds = sum(length for _, length in stated) * total / seen if seen > 0 else 0.0
    # With a limit on the clips of a file, a file gives as much however long it is.
    sampled = len(samples) if settings.clips_per_file else sum(sample.seconds for sample in samples)
    units = len(sources) * len(usable) / len(probed) if settings.clips_per_file else seconds
    scale = units / sampled if sampled else 0.0
    return Estimate(
        files=len(sources),
        probed=len(probed),
        unusable=len(probed) - len(usable),
        timed=len(samples),
        input_bytes=total,
        seconds=seconds,
        clips=scale * sum(sample.clips for sample in samples),
        bytes=scale * sum(sample.bytes for sample in samples),
        work=scale * sum(sample.work for sample in samples),
    )


def done_text(sources: Sequence[Source], done: Mapping[str, Done]) -> str:
    """The line about what earlier calls did of ``sources``."""
    size = sum(max(source.size, 0) for source in sources if source.name in done)
    lengths = [one.spool.lengths for one in done.values() if one.spool]
    clips = f"{sum(map(len, lengths)):,} clips, {sum(map(sum, lengths)) / 1e9:,.3f} GB"
    return f"  done    {len(done):,} of {len(sources):,} files, {size / 1e9:,.3f} GB, which gave {clips}"


def text(found: Estimate, settings: IngestSettings, workers: int, output: Path) -> Iterator[str]:
    """Yields the lines to print."""
    yield f"from looking at {found.probed} of {found.files:,} files and encoding (parts of) {found.timed} of those:"
    useless = f"; {found.unusable} of the {found.probed} cannot be used" if found.unusable else ""
    video = f"about {found.seconds / 3600:,.2f} hours of video"
    yield f"  input   {found.files:,} files, {found.input_bytes / 1e9:,.3f} GB, {video}{useless}"
    if not found.timed:
        yield "  output  unknown: none of the files that were looked at gives a clip"
        return
    shards = max(round(found.clips / settings.shard_clips), 1)
    yield f"  output  about {found.clips:,.0f} clips, {found.bytes / 1e9:,.3f} GB, {shards:,} shards"
    yield f"  disk    {_free(output) / 1e9:,.1f} GB are free for {output}"
    hours = f"{found.work / 3600:,.2f} hours of one worker"
    yield f"  work    about {format_duration(found.work / workers)} with {workers} workers on this machine ({hours})"


def _free(output: Path) -> int:
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
