"""The clips of a run: which data set, how examples are cut from it, and the streams over its two splits.

Responsible for: what the training loop asks of data. Not responsible for: reading (``stream.py``) or which slots of a
batch this process holds (``partitioning.py``).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from scaling4d.data.decode import ClipSettings
from scaling4d.data.mixture import DataSet
from scaling4d.data.order import BLOCK_RECORDS
from scaling4d.data.resume import Resume
from scaling4d.data.stream import ClipStream


@dataclasses.dataclass(frozen=True)
class ClipData:
    """Clips by the name of a seqio task or mixture.

    Attributes:
      task: the name; with ``directory`` it is registered for that first.
      directory: a folder made by ``scaling4d ingest``; or several with rates, ``{'kinetics': ('/data/kinetics', 0.7),
        'world': ('/data/world', 0.3)}``, where an empty folder stands for a name that a gin ``import`` registered.
        Empty where such an import registered ``task`` itself.
      settings: frames, size, stride and crops of an example.
      seed: of the order and the augmentation.
      order: ``blocks`` reads neighbouring records at about the same time, for storage that dislikes random reads.
      block_records: how many neighbours.
      repeats: examples in a row from one record, each with its own frames and crop: decoding costs that much less.
      blocked: a text file of sources (as the records name them, one a line) whose clips are not used.
      max_bad_share: the run ends when more of a host's clips than this could not be read or decoded.
      threads: clips decoded at the same time; None for as many as there are cores. With ``workers``, in each of them;
        None for one.
      workers: processes that decode training clips, over shared memory; 0 decodes in threads of the trainer, which is
        enough for some hundred clips/s of a host.
      prefetch: batches kept ready.
    """

    task: str = "clips"
    directory: str | dict[str, tuple[str, float]] = ""
    settings: ClipSettings = ClipSettings()
    seed: int = 0
    order: Literal["shuffled", "blocks"] = "shuffled"
    block_records: int = BLOCK_RECORDS
    repeats: int = 1
    blocked: str = ""
    max_bad_share: float = 0.01
    threads: int | None = None
    workers: int = 0
    prefetch: int = 2

    def train_stream(
        self, *, batch_size: int, slots: Sequence[int], start: int, resume: Resume | None = None
    ) -> ClipStream:
        """The endless stream over the split ``train``, from global example ``start`` on.

        ``resume``: the checkpoint that ``start`` is from; raises UserError where it counts in other data than this.
        """
        self._register()
        return ClipStream(
            task=self.task,
            split="train",
            settings=self.settings,
            seed=self.seed,
            batch_size=batch_size,
            slots=slots,
            start=start,
            order=self.order,
            block_records=self.block_records,
            repeats=self.repeats,
            blocked=self.blocked,
            max_bad_share=self.max_bad_share,
            resume=resume,
            threads=self.threads,
            workers=self.workers,
            prefetch=self.prefetch,
        )

    def held_out_stream(self, *, batch_size: int, slots: Sequence[int]) -> ClipStream:
        """The split ``validation``, cropped at the center: always the same pixels in the same order, that of the files
        (of a mixture: every clip of every data set once, whatever the rates)."""
        self._register()
        return ClipStream(
            task=self.task,
            split="validation",
            settings=dataclasses.replace(self.settings, crop="center", flip=False),
            seed=self.seed,
            batch_size=batch_size,
            slots=slots,
            order="sequential",
            blocked=self.blocked,
            threads=None if self.workers else self.threads,  # those of a worker
            prefetch=self.prefetch,
        )

    def speed_settings(self) -> dict[str, object]:
        """What the rate of clips depends on, by its gin name, with its value."""
        return {f"ClipData.{name}": getattr(self, name) for name in ("workers", "threads", "repeats", "prefetch")}

    def data_sets(self, split: str) -> list[DataSet]:
        """The data sets that have the split, with their rates; empty where none has it."""
        self._register()
        from scaling4d.data.source import data_sets, find_provider

        return data_sets(find_provider(self.task), split, skip=True)

    def num_clips(self, split: str) -> int:
        """Clips in a split, over all data sets."""
        return sum(one.clips for one in self.data_sets(split))

    def _register(self) -> None:
        if not self.directory:
            return
        from scaling4d.data.tasks import register_clips, register_mixture

        if isinstance(self.directory, str):
            register_clips(self.task, self.directory)
        else:
            register_mixture(self.task, self.directory)
