"""Metrics for TensorBoard: event files in ``MODEL_DIR/train``, written through clu.

Responsible for: event files, and cutting them back at a resume. Not responsible for: which metrics there are.

TensorFlow, which writes them, has a client of its own for buckets, and one that reads and writes a whole file again for
each line. So there events are written on the local disk and uploaded whenever they are flushed.

At a resume the event files themselves are cut: TensorBoard's own remedy (a restart event that hides later steps) would
leave the stale numbers in the files for every other reader. Records are copied byte for byte.
"""

import struct
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from scaling4d.data import records
from scaling4d.observe.metric_writer import MetricWriter
from scaling4d.run_folder import RunFolder

_HEAD = struct.Struct("<QI")  # length and its CRC; the data and its CRC follow


class TensorBoardWriter(MetricWriter):
    """Scalars and pictures; TensorFlow is imported with the first one."""

    def __init__(self, folder: RunFolder, subfolder: str = "train"):
        self._folder, self._subfolder = folder, subfolder
        self._clu: Any = None
        self._local: tempfile.TemporaryDirectory[str] | None = None
        """Where the events of a run in a bucket are written."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._open().write_scalars(step, {name: np.float32(value) for name, value in metrics.items()})

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._open().write_images(step, images)

    def truncate(self, step: int) -> None:
        self.close()
        for name in self._folder.glob(f"{self._subfolder}/*.tfevents.*"):
            cut_events(self._folder, name, step)

    def flush(self) -> None:
        if self._clu is not None:
            self._clu.flush()
            self._upload()

    def close(self) -> None:
        if self._clu is not None:
            self._clu.close()
            self._clu = None
            self._upload()
        if self._local is not None:
            self._local.cleanup()
            self._local = None

    def _upload(self) -> None:
        if self._local is not None:
            self._folder.take_in(self._local.name, self._subfolder)

    def _open(self) -> Any:
        if self._clu is None:
            import scaling4d.data.tensorflow_setup  # noqa: F401  keeps TensorFlow quiet and off the accelerator

            # isort: split
            from clu import metric_writers

            if self._folder.is_bucket:
                self._local = tempfile.TemporaryDirectory(prefix="scaling4d-events-")
            folder = self._local.name if self._local else str(self._folder.file(self._subfolder))
            self._clu = metric_writers.SummaryWriter(folder)
        return self._clu


def cut_events(folder: RunFolder, name: str, step: int) -> None:
    """Removes the events after ``step``, and all from the first broken record on, from one event file."""
    from tensorboard.compat.proto import event_pb2

    with folder.file(name).open("rb") as source:
        stays = all(event_pb2.Event.FromString(data).step <= step for data, _ in _records(source))
        if stays and not source.read(1):
            return
    with folder.file(name).open("rb") as source, folder.replacing(name) as target:
        for data, entry in _records(source):
            if event_pb2.Event.FromString(data).step <= step:
                target.write(entry)


def _records(source: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(data, entry with its TFRecord framing) of every record up to the first broken one, where the file is left."""
    while True:
        start = source.tell()
        head = source.read(_HEAD.size)
        length, length_crc = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, 0)
        is_sound = length_crc == records.masked_crc(head[:8])  # before so many bytes are asked for
        entry = head + source.read(length + records.FRAMING_BYTES - _HEAD.size) if is_sound else b""
        try:
            yield records.unframe_record(entry), entry
        except records.BadRecord:
            source.seek(start)
            return
