"""Data sets of clips by name, in seqio's registry.

Responsible for: registering a folder of clip records as a ``seqio.Task``, and several with rates as a
``seqio.Mixture``. Not responsible for: how examples are read (``source.py``). A package outside the repository adds its
data set by calling ``register_clips`` when it is imported.
"""

import math
import os
from collections.abc import Mapping

from scaling4d.data.decode import ClipSettings
from scaling4d.data.source import ClipSource
from scaling4d.data.storage import real_directory
from scaling4d.data.tensorflow_setup import seqio, tf
from scaling4d.errors import UserError

OUTPUT_FEATURES = {"video": seqio.ContinuousFeature(dtype=tf.uint8, rank=4)}


def register_clips(name: str, directory: str | os.PathLike, settings: ClipSettings | None = None) -> seqio.Task:
    """Registers the data set in ``directory`` as the seqio Task ``name``, with splits train and validation.

    The folder is first read when the task is used; what cannot be the address of a bucket is refused at once.
    ``settings`` are those of seqio's plain API; a ``ClipStream`` brings its own. Registering the same name for the same
    folder again is fine; for another folder it raises UserError.
    """
    if name in seqio.TaskRegistry.names():
        task = seqio.TaskRegistry.get(name)
        if not isinstance(task.source, ClipSource) or real_directory(task.source.directory) != real_directory(
            directory
        ):
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


def register_mixture(name: str, parts: Mapping[str, tuple[str | os.PathLike, float]]) -> seqio.Mixture:
    """Registers the seqio Mixture ``name`` of data sets: their names, each with its folder and rate.

    An empty folder stands for a name that is registered already (a task or a mixture). Registering the same again is
    fine; anything else under the same name raises UserError.
    """
    if not parts:
        raise UserError(f"the mixture {name!r} has no data sets: write {{'NAME': ('FOLDER', RATE), ...}}")
    for part, (directory, rate) in parts.items():
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"the rate of data set {part!r} is {rate}: must be above 0; or leave it out")
        if directory:
            register_clips(part, directory)
        elif part not in [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]:
            raise UserError(f"data set {part!r} has no folder and no task of that name is registered: give one")
    rates = {part: float(rate) for part, (_, rate) in parts.items()}
    if name in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(name)
        if dict(mixture.rate_per_task_name) != rates:
            raise UserError(
                f"the mixture name {name!r} is already taken, with other data sets or rates; choose another"
            )
        return mixture
    if name in seqio.TaskRegistry.names():
        raise UserError(f"{name!r} is a data set and cannot be the mixture's name too; change --gin.ClipData.task")
    try:
        return seqio.MixtureRegistry.add(name, list(rates.items()))
    except ValueError as error:
        raise UserError(f"{name!r} cannot be a mixture's name: {error}; change --gin.ClipData.task") from error
