"""Sources of records that misbehave, and decode processes over them; light, because those import it too."""

import os
import pathlib
import signal
import subprocess
import time

from scaling4d.data.clips import ClipLoader
from scaling4d.data.decode import ClipSettings
from scaling4d.data.manifest import open_split, read_manifest
from scaling4d.data.mixture import DataSet, Plan
from scaling4d.data.records import ShardedRecords
from scaling4d.data.workers import DecodeWorkers

SETTINGS = ClipSettings(frames=4, size=48, stride=2)
BATCH = 8


class OddRecords:
    """The records of ``records``. Reading one in ``deadly`` kills the process, one in ``broken`` is a mistake of the
    program. Each read takes ``seconds`` longer and counts as tried again."""

    def __init__(self, records: ShardedRecords, *, deadly=(), broken=(), seconds=0.0):
        self.records, self.deadly, self.broken, self.seconds = records, deadly, broken, seconds
        self.retries = 0

    def __len__(self):
        return len(self.records)

    def read(self, record):
        self.retries += 1
        if record in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if record in self.broken:
            raise ZeroDivisionError(f"record {record}")
        time.sleep(self.seconds)
        return self.records.read(record)


def loader_of(clip_set: pathlib.Path, **odd) -> ClipLoader:
    records = OddRecords(open_split(clip_set, read_manifest(clip_set), "train"), **odd)
    plan = Plan.fresh([DataSet("clips", len(records), "")], seed=3)
    return ClipLoader(plan, [records], seed=3, order="sequential", settings=SETTINGS)


def start(loader: ClipLoader, **changes) -> DecodeWorkers:
    arguments = {"workers": 1, "threads": 1, "start": 0, "batch_size": BATCH, "slots": range(BATCH), "repeats": 1}
    rest = {"prefetch": 1, "on_bad": lambda source, record: None}
    return DecodeWorkers(loader, **(arguments | rest | changes))


def processes(found: DecodeWorkers) -> list[subprocess.Popen]:
    return [worker.process for worker in found._dispatcher._workers]
