"""An ingest on a cluster, as a pipeline of Apache Beam.

Responsible for: the parts of an ingest as the elements of a pipeline. Not responsible for: the work of a part or
joining them (``run.py``): only numbers of parts pass through Beam, everything else through the folder of the data set,
which all machines see under one path, as they do the videos.

Beam may start a part again, or twice at the same time; both are right, because parts go on where they were.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from scaling4d.errors import UserError
from scaling4d.ingest.labels import Labels, read_labels
from scaling4d.ingest.media import MediaLimits
from scaling4d.ingest.run import Ingest
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.work import Part


@dataclass(frozen=True)
class Job:
    """What a machine needs to know to work on parts of an ingest; ``labels`` is the path of their table, or None."""

    inputs: str
    output: str
    settings: IngestSettings
    limits: MediaLimits
    workers: int | None
    overwrite: bool
    labels: str | None
    parts: int


def encode_part(index: int, job: Job) -> int:
    """Encodes part number ``index``; how many files it has. Raises UserError as ``Ingest.run_part``."""
    ingest = Ingest(
        job.inputs,
        job.output,
        job.settings,
        job.limits,
        job.workers,
        job.overwrite,
        read_labels(job.labels) if job.labels is not None else Labels(),
    )
    return ingest.run_part(Part(index, job.parts)).files


def job_of(ingest: Ingest, labels: str | None, parts: int) -> Job:
    """``ingest`` in ``parts`` parts, for machines with another working folder; ``labels``: the path of its table."""
    absolute = {
        "inputs": os.path.abspath(os.path.expanduser(ingest.inputs)),
        "output": os.path.abspath(ingest.folder),
        "labels": None if labels is None else os.path.abspath(os.path.expanduser(labels)),
    }
    return Job(
        settings=ingest.settings,
        limits=ingest.limits,
        workers=ingest.workers,
        overwrite=ingest.overwrite,
        parts=parts,
        **absolute,
    )


def encode_on_beam(ingest: Ingest, labels: str | None, parts: int, options: Sequence[str]) -> None:
    """Encodes what is left of ``ingest`` in ``parts`` parts on the runner that ``options`` name, and waits for it.

    options: those of Beam, such as ``--runner=FlinkRunner``; its DirectRunner without. Afterwards ``ingest.run()``
    makes the data set. Raises UserError without Beam, and as ``Ingest.run`` for what is wrong before anything starts.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ModuleNotFoundError as error:
        raise UserError(
            f"--beam needs {error.name}: make an environment of its own with pip install 'scaling4d[train,beam]'"
        ) from error
    if not ingest.prepare():
        return
    job = job_of(ingest, labels, parts)
    with apache_beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        numbers = pipeline | "parts" >> apache_beam.Create(range(parts))
        # Without it a runner may leave all parts to the machine that counted them.
        spread = numbers | "spread" >> apache_beam.Reshuffle()
        spread | "encode" >> apache_beam.Map(encode_part, job=job)
