"""Many videos into clips, several at a time.

Responsible for: the workers of one process, what they finished, and how far they are. Not responsible for: a single
file (``clips.py``), where its clips are kept (``work.py``) or what is worked on (``run.py``).
"""

import contextlib
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from scaling4d.ingest.clips import Dropped, encode_file
from scaling4d.ingest.labels import Labels
from scaling4d.ingest.media import MediaError, MediaLimits
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.shards import SpoolWriter
from scaling4d.ingest.sources import Source
from scaling4d.ingest.work import Done, Session, Skipped, full


@dataclass(frozen=True)
class Progress:
    """How far the encoding is; bytes are those of the input files, ``bytes_before`` those an earlier call did."""

    files_done: int
    files: int
    bytes_done: int
    bytes: int
    clips: int
    skipped: int
    bytes_before: int = 0


@dataclass(frozen=True)
class Encoder:
    """What all videos of an ingest have in common; ``workers`` are worked on at the same time."""

    settings: IngestSettings
    limits: MediaLimits
    labels: Labels
    workers: int

    def encode(
        self,
        sources: Sequence[Source],
        done: Mapping[str, Done],
        session: Callable[[], Session],
        progress: Callable[[Progress], None],
    ) -> dict[str, Done]:
        """Works on those ``sources`` that are not ``done``; what was done of them, by name.

        ``session`` is called once, and only if there is anything to do. Raises OSError.
        """
        todo = [source for source in sources if source.name not in done]
        count = _Count(sources, [(source, done[source.name]) for source in sources if source.name in done])
        progress(count.progress())
        results: dict[str, Done] = {}
        if not todo:
            return results
        with session() as opened, contextlib.closing(self._each(todo, opened)) as each:
            for source, one in each:
                results[source.name] = one
                count.add(source, one)
                progress(count.progress())
        return results

    def _each(self, todo: Sequence[Source], session: Session) -> Iterator[tuple[Source, Done]]:
        """Yields what was done of each source, as they are finished; each in a child process (threads only wait)."""
        stop, lock = threading.Event(), threading.Lock()
        waiting = iter(todo)
        results: queue.SimpleQueue = queue.SimpleQueue()

        def work(worker: int) -> None:
            number = 0
            while not stop.is_set():
                with lock:
                    source = next(waiting, None)
                if source is None:
                    return
                while full(path := session.spool_path(worker, number)):
                    number += 1
                try:
                    one = self._one(source, path, stop)
                    session.record(source, one)
                except BaseException as error:
                    results.put(error)
                    return
                results.put((source, one))

        with ThreadPoolExecutor(self.workers, thread_name_prefix="ingest") as pool:
            try:
                for worker in range(min(self.workers, len(todo))):
                    pool.submit(work, worker)
                for _ in todo:
                    result = results.get()
                    if isinstance(result, BaseException):
                        raise result
                    yield result
            finally:
                stop.set()  # the children end within a moment, so that leaving does not wait for whole films

    def _one(self, source: Source, spool_path: pathlib.Path, stop: threading.Event) -> Done:
        state = (source.size, source.modified)
        writer = SpoolWriter(spool_path, source.name, state, self.labels.of(source.name))
        dropped = 0
        try:
            for item in encode_file(source.path, self.settings, self.limits, stop):
                if isinstance(item, Dropped):
                    dropped = item.frames
                else:
                    writer.add(item)
            return Done(writer.finish(), dropped)
        except MediaError as error:
            writer.discard()
            return Done(None, skipped=Skipped(source.name, error.reason, error.detail))
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                writer.discard()
            raise


class _Count:
    """Adds up what is done."""

    def __init__(self, sources: Sequence[Source], before: Sequence[tuple[Source, Done]]):
        self._files, self._bytes = len(sources), sum(max(source.size, 0) for source in sources)
        self._files_done = self._bytes_done = self._clips = self._skipped = self._bytes_before = 0
        for source, one in before:
            self.add(source, one)
        self._bytes_before = self._bytes_done

    def add(self, source: Source, one: Done) -> None:
        self._files_done += 1
        self._bytes_done += max(source.size, 0)
        self._clips += len(one.spool.lengths) if one.spool else 0
        self._skipped += one.skipped is not None

    def progress(self) -> Progress:
        return Progress(
            self._files_done, self._files, self._bytes_done, self._bytes, self._clips, self._skipped, self._bytes_before
        )
