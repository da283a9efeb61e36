"""The interface of whatever keeps metrics.

Responsible for: what a writer must and may do. Not responsible for: any one writer (``json_lines.py``,
``tensorboard.py``, ``wandb_writer.py``) or for keeping them off the training loop's thread (``writers.py``).

A writer is made with the run folder, ``Writer(run_folder)``, by process 0 alone. One from another package needs only an
``import`` line in a gin file, ``gin.register`` on its class, and its name in ``train.writers``.
"""

import abc
from collections.abc import Mapping

import numpy as np


class MetricWriter(abc.ABC):
    """Keeps metrics by step; the same step may be written more than once with other names."""

    @abc.abstractmethod
    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keeps numbers that are already on the host."""

    @abc.abstractmethod
    def truncate(self, step: int) -> None:
        """Forgets everything after ``step``: a resumed run writes those steps again. Comes before the first write."""

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:  # noqa: B027  (a writer may ignore pictures)
        """Keeps pictures, uint8 ``[height, width, 3]``."""

    def flush(self) -> None:  # noqa: B027  (a writer may hold nothing back)
        """Returns once everything written so far would survive the end of the process."""

    def close(self) -> None:  # noqa: B027
        """Flushes and lets go of what the writer holds; nothing is written afterwards."""
