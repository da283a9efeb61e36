"""Data sets of clips by name, in seqio's registry.

Responsible for: registering a folder of clip records as a ``seqio.Task``. Not responsible for: how examples are read
(``source.py``). A package outside the repository adds its data set by calling ``register_clips`` when it is imported.
"""

import os
import pathlib

from scaling4d.data.decode import ClipSettings
from scaling4d.data.source import ClipSource
from scaling4d.data.tensorflow_setup import seqio, tf
from scaling4d.errors import UserError

OUTPUT_FEATURES = {"video": seqio.ContinuousFeature(dtype=tf.uint8, rank=4)}


def register_clips(name: str, directory: str | os.PathLike, settings: ClipSettings | None = None) -> seqio.Task:
    """Registers the data set in ``directory`` as the seqio Task ``name``, with splits train and validation.

    The folder is first read when the task is used. ``settings`` are those of seqio's plain API; a ``ClipStream`` brings
    its own. Registering the same name for the same folder again is fine; for another folder it raises UserError.
    """
    if name in seqio.TaskRegistry.names():
        task = seqio.TaskRegistry.get(name)
        if not isinstance(task.source, ClipSource) or _real(task.source.directory) != _real(directory):
            where = getattr(task.source, "directory", "another source")
            raise UserError(f"the task name {name!r} is already taken by {where}; choose another name for {directory}")
        return task
    try:
        return seqio.TaskRegistry.add(
            name,
            source=ClipSource(directory, settings),
            output_features=OUTPUT_FEATURES,
            shuffle_buffer_size=None,  # the source shuffles; seqio would shuffle decoded videos
        )
    except ValueError as error:
        raise UserError(f"{name!r} cannot be a task name: {error}") from error


def _real(directory: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(directory).expanduser().resolve()
