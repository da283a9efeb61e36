"""A whole ingest: videos in, a data set of clips out.

Responsible for: workers, skipped files, and that a folder either becomes a complete data set or keeps looking
unfinished. Not responsible for: single files (``clips.py``), the record files (``shards.py``) or the command line
(``cli.py``).

Everything is written to ``OUTPUT/.ingest`` and renamed when it is complete, the manifest last. The output does not
depend on the number of workers.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

import av

import scaling4d
from scaling4d.data.cores import usable_cores
from scaling4d.data.manifest import ERRORS_NAME, MANIFEST_NAME, Manifest, Split, read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest.clips import Dropped, encode_file
from scaling4d.ingest.media import MediaError, MediaLimits
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.shards import Spool, SpoolWriter, write_durably, write_split
from scaling4d.ingest.sources import Source, files_digest, find_sources, held_out, printable

_WORK_FOLDER = ".ingest"


@dataclass(frozen=True)
class Skipped:
    """A file that gave no clips: a reason of ``media.py`` and one line of detail."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Progress:
    """How far an ingest is; bytes are those of the input files."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int
    clips: int
    skipped: int


@dataclass(frozen=True)
class Summary:
    """What an ingest made; ``already_done`` when the same ingest had finished before and nothing was written."""

    manifest: Manifest
    skipped: tuple[Skipped, ...]
    already_done: bool = False


class NothingUsable(UserError):
    """No file gave a clip; ``skipped`` says why for each."""

    def __init__(self, message: str, skipped: tuple[Skipped, ...]):
        super().__init__(message)
        self.skipped = skipped


@dataclass(frozen=True)
class _Result:
    spool: Spool | None
    dropped_frames: int = 0
    skipped: Skipped | None = None


def ingest(
    inputs: str | os.PathLike,
    output: str | os.PathLike,
    settings: IngestSettings | None = None,
    *,
    limits: MediaLimits | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Makes the data set ``output`` from the videos of ``inputs`` (a folder, a glob pattern or a file).

    workers: files worked on at the same time, each in a process of its own; None for one a core. overwrite: replaces a
    data set that is there. progress: called with every finished file, from this thread.

    A file that cannot be used is skipped and listed. Raises UserError when the input is missing, the output cannot be
    written or holds another data set, and NothingUsable when every file was skipped.
    """
    settings, limits = settings or IngestSettings(), limits or MediaLimits()
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be 1 or more")
    sources = find_sources(inputs)
    folder = pathlib.Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            finished = _finished_before(folder, sources, settings, overwrite)
            if finished:
                return finished
            with _work_folder(folder) as work:
                results = _encode_all(sources, settings, limits, workers or usable_cores(), work, progress)
                return _finish(folder, work, sources, results, settings)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"ingest stopped, nothing was finished: {where}: {error.strerror or error}") from error


@contextlib.contextmanager
def _only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Holds a lock on the folder, where its file system has locks; raises UserError when another ingest has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"--output {folder}: another ingest is writing there; choose another") from None
            if error.errno not in (errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _work_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder that is gone afterwards; one left by a killed ingest is removed first."""
    work = folder / _WORK_FOLDER
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _finished_before(
    folder: pathlib.Path, sources: list[Source], settings: IngestSettings, overwrite: bool
) -> Summary | None:
    """The summary of an identical ingest that is complete; None to go on; UserError when another data set is there."""
    path = folder / MANIFEST_NAME
    if not path.exists() or overwrite:
        return None
    advice = "--overwrite replaces it, or choose another --output"
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        raise UserError(f"--output {folder}: holds something else ({error}); {advice}") from error
    before, now = manifest.settings, asdict(settings)
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(f"--output {folder}: holds clips of other settings ({', '.join(changed)}); {advice}")
    newest = max(source.modified for source in sources)
    if manifest.files_digest != files_digest(sources) or newest > path.stat().st_mtime_ns:
        raise UserError(f"--output {folder}: holds clips of other videos than --input has now; {advice}")
    return Summary(manifest, tuple(_read_errors(folder)), already_done=True)


def _encode_all(
    sources: list[Source],
    settings: IngestSettings,
    limits: MediaLimits,
    workers: int,
    work: pathlib.Path,
    progress: Callable[[Progress], None],
) -> list[_Result]:
    """The result of each source, in order; each in a child process, ``workers`` at a time (threads only wait)."""
    stop = threading.Event()
    results: dict[int, _Result] = {}
    total = sum(max(source.size, 0) for source in sources)
    done = clips = skipped = 0
    progress(Progress(0, len(sources), 0, total, 0, 0))
    with ThreadPoolExecutor(workers, thread_name_prefix="ingest") as pool:
        try:
            futures = {
                pool.submit(_encode_one, source, work / f"{number:08d}", settings, limits, stop): number
                for number, source in enumerate(sources)
            }
            for future in as_completed(futures):
                number = futures[future]
                result = results[number] = future.result()
                done += max(sources[number].size, 0)
                clips += len(result.spool.lengths) if result.spool else 0
                skipped += result.skipped is not None
                progress(Progress(len(results), len(sources), done, total, clips, skipped))
        except BaseException:
            stop.set()  # the children end within a moment, so that leaving does not wait for whole films
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [results[number] for number in range(len(sources))]


def _encode_one(
    source: Source, spool_path: pathlib.Path, settings: IngestSettings, limits: MediaLimits, stop: threading.Event
) -> _Result:
    writer = SpoolWriter(spool_path, source.name)
    dropped = 0
    try:
        for item in encode_file(source.path, settings, limits, stop):
            if isinstance(item, Dropped):
                dropped = item.frames
            else:
                writer.add(item)
        return _Result(writer.finish(), dropped)
    except MediaError as error:
        writer.discard()
        return _Result(None, skipped=Skipped(source.name, error.reason, error.detail))
    except BaseException:
        writer.discard()
        raise


def _finish(
    folder: pathlib.Path, work: pathlib.Path, sources: list[Source], results: list[_Result], settings: IngestSettings
) -> Summary:
    """Joins the spools to shards, moves everything in place and writes the manifest last."""
    skipped = tuple(result.skipped for result in results if result.skipped)
    usable = {source.name: result.spool for source, result in zip(sources, results, strict=True) if result.spool}
    if not usable:
        raise NothingUsable(f"none of the {len(sources)} files gave a clip; nothing was written to {folder}", skipped)
    validation = held_out(list(usable), settings.holdout)
    splits: dict[str, Split] = {}
    for split, names in (("train", usable.keys() - validation), ("validation", validation)):
        spools = [spool for name, spool in usable.items() if name in names]
        splits[split] = write_split(work, split, spools, settings.shard_clips)
    reasons = [item.reason for item in skipped]
    manifest = Manifest(
        settings=asdict(settings),
        software=_software(),
        files=len(sources),
        files_digest=files_digest(sources),
        skipped={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        dropped_frames=sum(result.dropped_frames for result in results),
        splits=splits,
    )
    _write_errors(work, skipped)
    write_durably(work / MANIFEST_NAME, manifest.to_json().encode())
    _remove_finished(folder)  # from here on nothing is written, only renamed: a full disk has been noticed before
    shards = [shard for split in splits.values() for shard in split.shards]
    names = [name for shard in shards for name in (shard.name, shard.index_name)]
    for name in (*names, ERRORS_NAME, MANIFEST_NAME):
        os.replace(work / name, folder / name)
    return Summary(manifest, skipped)


def _remove_finished(folder: pathlib.Path) -> None:
    """Takes away the data set that is replaced, its manifest first."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("train-*.tfrecord", "train-*.index", "validation-*.tfrecord", "validation-*.index"):
        for path in folder.glob(pattern):
            path.unlink()


def _software() -> dict[str, str]:
    libraries = {name: ".".join(map(str, version)) for name, version in sorted(av.library_versions.items())}
    return {"scaling4d": scaling4d.__version__, "av": av.__version__, **libraries}


def _write_errors(folder: pathlib.Path, skipped: tuple[Skipped, ...]) -> None:
    lines = ["file\treason\tdetail", *("\t".join(map(printable, (s.name, s.reason, s.detail))) for s in skipped)]
    write_durably(folder / ERRORS_NAME, ("\n".join(lines) + "\n").encode())


def _read_errors(folder: pathlib.Path) -> list[Skipped]:
    path = folder / ERRORS_NAME
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return [Skipped(*line.split("\t")) for line in lines]
