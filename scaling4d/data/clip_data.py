"""The clips of a run: which data set, how examples are cut from it, and the streams over its two splits.

Responsible for: what the training loop asks of data. Not responsible for: reading (``stream.py``) or which slots of a
batch this process holds (``partitioning.py``).
"""

import dataclasses
from collections.abc import Sequence

from scaling4d.data.decode import ClipSettings
from scaling4d.data.stream import ClipStream
from scaling4d.errors import UserError


@dataclasses.dataclass(frozen=True)
class ClipData:
    """Clips by the name of a seqio task.

    Attributes:
      task: the task's name; with ``directory`` it is registered for that folder first.
      directory: a folder made by ``scaling4d ingest``; empty where a gin ``import`` registered the task.
      settings: frames, size, stride and crops of an example.
      seed: of the order and the augmentation.
      threads: clips decoded at the same time; None for as many as there are cores.
      prefetch: batches kept ready.
    """

    task: str = "clips"
    directory: str = ""
    settings: ClipSettings = ClipSettings()
    seed: int = 0
    threads: int | None = None
    prefetch: int = 2

    def train_stream(self, *, batch_size: int, slots: Sequence[int], start: int) -> ClipStream:
        """The endless shuffled stream over the split ``train``, from global example ``start`` on."""
        self._register()
        return ClipStream(
            task=self.task,
            split="train",
            settings=self.settings,
            seed=self.seed,
            batch_size=batch_size,
            slots=slots,
            start=start,
            threads=self.threads,
            prefetch=self.prefetch,
        )

    def held_out_stream(self, *, batch_size: int, slots: Sequence[int]) -> ClipStream:
        """The split ``validation`` in file order, cropped at the center: always the same pixels."""
        self._register()
        return ClipStream(
            task=self.task,
            split="validation",
            settings=dataclasses.replace(self.settings, crop="center", flip=False),
            seed=self.seed,
            batch_size=batch_size,
            slots=slots,
            order="sequential",
            threads=self.threads,
            prefetch=self.prefetch,
        )

    def num_clips(self, split: str) -> int:
        """Clips in a split; 0 where the data set has no such split."""
        self._register()
        import seqio

        source = seqio.get_mixture_or_task(self.task).source
        return len(source.records(split)) if split in source.splits else 0

    def check_fingerprint(self, stored: dict, current: dict, source: str) -> None:
        """Raises UserError where a checkpoint's stream position counts in other data than this run's."""
        changed = [key for key in stored.keys() | current.keys() if stored.get(key) != current.get(key)]
        if changed:
            differences = "; ".join(f"{key} was {stored.get(key)}, is {current.get(key)}" for key in sorted(changed))
            raise UserError(
                f"{source} was saved on other data ({differences}): its position in the stream means nothing here; "
                "give back the same data set, or start a new --model_dir"
            )

    def _register(self) -> None:
        if self.directory:
            from scaling4d.data.tasks import register_clips

            register_clips(self.task, self.directory)
