"""A whole ingest: videos in, a data set of clips out.

Responsible for: the order of the steps, and that a folder either becomes a complete data set or keeps looking
unfinished. Not responsible for: workers (``encode.py``), what is finished already (``work.py``), shards (``join.py``),
the hand-over (``publish.py``) or the command line (``cli.py``).

Everything is written to ``OUTPUT/.ingest`` and renamed when it is complete, the manifest last. The same call again goes
on where one stopped. The output does not depend on the number of workers, on parts or on restarts.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from scaling4d.data.cores import usable_cores
from scaling4d.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from scaling4d.errors import UserError
from scaling4d.ingest.encode import Encoder, Progress
from scaling4d.ingest.join import Joining, JoinProgress, make_plan
from scaling4d.ingest.labels import Labels, LabelsFound, find_labels
from scaling4d.ingest.media import MediaLimits
from scaling4d.ingest.publish import put_in_place, read_errors, skipped_of, write_manifest
from scaling4d.ingest.settings import IngestSettings, changes
from scaling4d.ingest.sources import Source, files_digest, find_sources
from scaling4d.ingest.work import FOLDER, Done, Part, Skipped, WorkFolder

Report = Callable[[LabelsFound | Progress | JoinProgress], None]


@dataclass(frozen=True)
class Summary:
    """What an ingest made; ``already_done`` when the same ingest had finished before and nothing was written."""

    manifest: Manifest
    skipped: tuple[Skipped, ...]
    already_done: bool = False


@dataclass(frozen=True)
class PartSummary:
    """A part of a job array: its files, those of them skipped, and how many files are left for other commands."""

    files: int
    skipped: tuple[Skipped, ...]
    files_left: int


@dataclass(frozen=True)
class Standing:
    """How far an ingest is: its sources and, by name, what was done of them; or the summary, when it is complete."""

    sources: list[Source]
    done: dict[str, Done]
    complete: Summary | None = None


class NothingUsable(UserError):
    """No file gave a clip; ``skipped`` says why for each."""

    def __init__(self, message: str, skipped: tuple[Skipped, ...]):
        super().__init__(message)
        self.skipped = skipped


@dataclass
class Ingest:
    """One ingest of ``inputs`` (a folder, a glob pattern or a file) into the folder ``output``.

    workers: files worked on at the same time, each in a process of its own; None for one a core. overwrite: replaces a
    data set that is there, and throws unfinished work of other settings away. labels: become fields of the records, and
    part of the settings. progress: called with every finished file and shard, from the calling thread.
    """

    inputs: str | os.PathLike
    output: str | os.PathLike
    settings: IngestSettings = field(default_factory=IngestSettings)
    limits: MediaLimits = field(default_factory=MediaLimits)
    workers: int | None = None
    overwrite: bool = False
    labels: Labels = field(default_factory=Labels)
    progress: Report = lambda _: None

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers}: must be 1 or more")
        self.folder = pathlib.Path(self.output).expanduser()
        self.settings = replace(self.settings, labels=self.labels.digest)

    def run(self, *, only_join: bool = False) -> Summary:
        """Does all that is left to do. A file that cannot be used is skipped and listed.

        only_join: what parts of a job array must have done is not done here.

        Raises UserError when the input is missing, the output cannot be written or holds another data set, or (with
        only_join) files are left; NothingUsable when every file was skipped.
        """
        sources = self._sources()
        with self._writing(shared=False):
            finished = _finished_before(self.folder, sources, self.settings, self.overwrite)
            if finished:
                return finished
            work = self._work()
            work.open(alone=True, discard=self.overwrite)
            return self._published(work, sources) or self._finish(work, sources, only_join)

    def run_part(self, part: Part) -> PartSummary:
        """Encodes one part of the sources, for a last ``run`` to join; other parts may run at the same time."""
        sources = self._sources()
        with self._writing(shared=True):
            finished = _finished_before(self.folder, sources, self.settings, self.overwrite)
            if finished or (self.folder / FOLDER / MANIFEST_NAME).exists():
                return PartSummary(0, finished.skipped if finished else (), 0)
            work = self._work()
            work.open(alone=False, discard=False)
            done = work.finished(sources)
            mine = sources[part.index :: part.count]
            done |= self._encoder().encode(mine, done, lambda: work.session(part), self.progress)
            left = len(sources) - len(work.finished(sources))
        return PartSummary(len(mine), skipped_of(mine, done), left)

    def prepare(self) -> bool:
        """Makes OUTPUT ready for parts, with room for them if ``overwrite``; False where nothing is left to encode."""
        sources = self._sources()
        with self._writing(shared=False):
            if _finished_before(self.folder, sources, self.settings, self.overwrite):
                return False
            work = self._work()
            work.open(alone=True, discard=self.overwrite)
            return len(work.finished(sources)) < len(sources)

    def look(self) -> Standing:
        """How far earlier calls came; writes nothing. Raises UserError as ``run``."""
        sources = self._sources()
        complete = _finished_before(self.folder, sources, self.settings, self.overwrite)
        if complete:
            return Standing(sources, {}, complete)
        work = self._work()
        done = work.finished(sources) if work.look(alone=True, discard=self.overwrite) else {}
        if len(done) < len(sources):
            done = {name: one for name, one in done.items() if not one.spool or work.has_clips(one.spool)}
        return Standing(sources, done)

    def _work(self) -> WorkFolder:
        return WorkFolder(self.folder / FOLDER, self.settings, self.limits)

    def _sources(self) -> list[Source]:
        sources = find_sources(self.inputs)
        if self.labels.types:
            self.progress(find_labels(self.labels, sources))
        return sources

    def _finish(self, work: WorkFolder, sources: list[Source], only_join: bool) -> Summary:
        done = work.finished(sources)
        joining = Joining(work.folder)
        plan = make_plan(_usable(sources, done), self.settings, self.labels) if len(done) == len(sources) else None
        if plan is None or not joining.can_go_on(plan, work.has_clips):
            joining.forget()
            done = {name: one for name, one in done.items() if not one.spool or work.has_clips(one.spool)}
            left = len(sources) - len(done)
            if only_join and left:
                raise UserError(
                    f"--merge: {left} of {len(sources)} files are not done yet; start the parts that failed again, or "
                    "leave --merge out to do those files here"
                )
            done |= self._encoder().encode(sources, done, lambda: work.session(Part()), self.progress)
            plan = make_plan(_usable(sources, done), self.settings, self.labels)
        if not any(plan.shards.values()):
            work.remove()
            skipped = skipped_of(sources, done)
            raise NothingUsable(f"none of the {len(sources)} files gave a clip; nothing is in {self.folder}", skipped)
        splits = joining.join(plan, self._worker_count(), self.progress)
        manifest = write_manifest(work.folder, sources, done, splits, self.settings, plan.labels)
        put_in_place(work.folder, self.folder, manifest)
        return Summary(manifest, skipped_of(sources, done))

    def _published(self, work: WorkFolder, sources: list[Source]) -> Summary | None:
        """Puts in place what was complete when an earlier call ended, if it is what this call would make."""
        path = work.folder / MANIFEST_NAME
        if not path.exists():
            return None
        if _difference(read_manifest(work.folder), path, sources, self.settings):
            path.unlink()
            return None
        manifest = read_manifest(work.folder)
        put_in_place(work.folder, self.folder, manifest)
        return Summary(manifest, read_errors(self.folder))

    def _encoder(self) -> Encoder:
        return Encoder(self.settings, self.limits, self.labels, self._worker_count())

    def _worker_count(self) -> int:
        return self.workers or usable_cores()

    @contextlib.contextmanager
    def _writing(self, *, shared: bool) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder, shared):
                yield
        except OSError as error:
            where, why = error.filename or self.folder, error.strerror or error
            raise UserError(
                f"ingest stopped: {where}: {why}; what is finished is kept, the same command goes on from there"
            ) from error


def ingest(
    inputs: str | os.PathLike, output: str | os.PathLike, settings: IngestSettings | None = None, **options
) -> Summary:
    """Makes the data set ``output`` from the videos of ``inputs``; ``options`` are those of ``Ingest``."""
    return Ingest(inputs, output, settings or IngestSettings(), **options).run()


def _usable(sources: Sequence[Source], done: dict[str, Done]):
    return {source.name: done[source.name].spool for source in sources if done[source.name].spool}


@contextlib.contextmanager
def _locked(folder: pathlib.Path, shared: bool) -> Iterator[None]:
    """Holds a lock on the folder, where its file system has locks; raises UserError when another ingest has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"--output {folder}: another ingest is writing there; choose another") from None
            if error.errno not in (errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        yield
    finally:
        os.close(descriptor)


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
    difference = _difference(manifest, path, sources, settings)
    if difference:
        raise UserError(f"--output {folder}: holds clips of {difference}; {advice}")
    return Summary(manifest, read_errors(folder), already_done=True)


def _difference(manifest: Manifest, path: pathlib.Path, sources: list[Source], settings: IngestSettings) -> str | None:
    """In what the data set of ``manifest`` (the file ``path``) is not the one that would be made now."""
    changed = changes(asdict(IngestSettings()) | manifest.settings, asdict(settings))
    if changed:
        return f"other settings ({', '.join(changed)})"
    newest = max(source.modified for source in sources)
    if manifest.files_digest != files_digest(sources) or newest > path.stat().st_mtime_ns:
        return "other videos than --input has now"
    return None
