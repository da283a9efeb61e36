"""Joins the clips of all source videos to shards, in the order of the sources' names.

Responsible for: which source goes to which split, which clips to which shard, and doing that so that a killed process
goes on where it was. Not responsible for: the shard files themselves (``shards.py``) or putting them in place
(``publish.py``).

The plan follows from the finished sources and the settings alone: not from the number of workers, from parts of a job
array, or from restarts. So the shards do not either. A spool file is deleted when no shard needs it any more; what is
joined is written down in ``joined.jsonl`` before that.
"""

import hashlib
import json
import os
import pathlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from scaling4d.data.manifest import SPLITS, Label, Shard, Split
from scaling4d.ingest.labels import Labels
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.shards import PlannedShard, Spool, file_names, plan_shards, write_durably, write_shard
from scaling4d.ingest.sources import held_out, name_bytes

_JOINED = "joined.jsonl"


@dataclass(frozen=True)
class JoinProgress:
    """How many of the shards are written."""

    shards_done: int
    shards: int


@dataclass(frozen=True)
class Plan:
    """Every shard of the data set, by split, a digest that names all of it, and what the manifest says of labels."""

    shards: dict[str, list[PlannedShard]]
    totals: dict[str, Split]
    digest: str
    labels: dict[str, Label]


def make_plan(usable: Mapping[str, Spool], settings: IngestSettings, labels: Labels) -> Plan:
    """The plan for sources (by name, in their order) and the clips they gave."""
    validation = held_out(list(usable), settings.holdout)
    digest = hashlib.sha256(json.dumps([settings.holdout, settings.shard_clips]).encode())
    shards: dict[str, list[PlannedShard]] = {}
    totals: dict[str, Split] = {}
    labeled: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for name, spool in usable.items():
        digest.update(b"%d:%b:" % (len(name_bytes(name)), name_bytes(name)) + spool.lengths.tobytes())
        for label in labels.of(name):
            labeled["validation" if name in validation else "train"][label] += len(spool.lengths)
    for split in SPLITS:
        numbered = [
            (number, spool)
            for number, (name, spool) in enumerate(usable.items())
            if (name in validation) == (split == "validation")
        ]
        shards[split] = plan_shards(split, numbered, settings.shard_clips)
        totals[split] = Split(
            clips=sum(len(spool.lengths) for _, spool in numbered),
            frames=sum(spool.frames for _, spool in numbered),
            sources=len(numbered),
            seconds=round(sum(spool.seconds for _, spool in numbered), 3),
        )
    counts = {
        label: Label(kind, {split: labeled[split][label] for split in SPLITS}) for label, kind in labels.types.items()
    }
    return Plan(shards, totals, digest.hexdigest(), counts)


class Joining:
    """The shards that are written so far, in the folder ``work``."""

    def __init__(self, work: pathlib.Path):
        self._work = work
        self._path = work / _JOINED
        self._lock = threading.Lock()
        self._done: dict[str, Shard] = {}
        self.digest = ""
        self._read()

    def _read(self) -> None:
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []
        for line in lines:
            entry = json.loads(line)
            if "plan" in entry:
                self.digest = entry["plan"]
            else:
                self._done[entry["name"]] = Shard(**entry)

    def can_go_on(self, plan: Plan, has_clips: Callable[[Spool], bool]) -> bool:
        """Whether this was the joining of just this plan, and the clips of the shards still to be written are there."""
        missing = [shard for shards in plan.shards.values() for shard in shards if shard.name not in self._done]
        return plan.digest == self.digest and all(has_clips(p.spool) for shard in missing for p in shard.pieces)

    def forget(self) -> None:
        """Deletes the shards that were written."""
        self._path.unlink(missing_ok=True)
        for shard in self._done.values():
            for name in file_names(shard):
                (self._work / name).unlink(missing_ok=True)
        self._done, self.digest = {}, ""

    def join(self, plan: Plan, workers: int, progress: Callable[[JoinProgress], None]) -> dict[str, Split]:
        """Writes the missing shards, ``workers`` at a time; the splits, complete. Raises OSError."""
        if plan.digest != self.digest:
            self.forget()
            write_durably(self._path, json.dumps({"plan": plan.digest}).encode() + b"\n")
            self.digest = plan.digest
        planned = [shard for shards in plan.shards.values() for shard in shards]
        todo = sorted((s for s in planned if s.name not in self._done), key=lambda s: (s.first, s.name))
        needed = Counter(path for shard in todo for path in shard.paths)
        with ThreadPoolExecutor(workers, thread_name_prefix="join") as pool, open(self._path, "ab", 0) as journal:
            progress(JoinProgress(len(self._done), len(planned)))
            futures = [pool.submit(self._join_one, shard, needed, journal) for shard in todo]
            try:
                for future in as_completed(futures):
                    future.result()
                    progress(JoinProgress(len(self._done), len(planned)))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        self._remove(path for path in self._work.glob("*.spool"))
        return {
            split: Split(**{**asdict(total), "shards": tuple(self._done[s.name] for s in plan.shards[split])})
            for split, total in plan.totals.items()
        }

    def _join_one(self, planned: PlannedShard, needed: Counter, journal) -> None:
        shard = write_shard(self._work, planned)
        with self._lock:
            journal.write(json.dumps(asdict(shard)).encode() + b"\n")
            os.fsync(journal.fileno())
            self._done[shard.name] = shard
            needed.subtract(planned.paths)
            self._remove(path for path in planned.paths if not needed[path])

    def _remove(self, paths: Iterable[pathlib.Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
