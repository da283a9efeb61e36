"""Puts a finished data set in place, its manifest last.

Responsible for: the manifest, the packed indexes, the list of skipped files, and a hand-over that can be killed at any
point and repeated. Not responsible for: the shards (``join.py``).

When the manifest is in the work folder, everything else is written: from there on files are only renamed and removed.
That can be repeated, because a file that is gone was renamed before.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from scaling4d.data.manifest import (
    ERRORS_NAME,
    FORMAT,
    IN_PLACE_FORMAT,
    MANIFEST_NAME,
    SPLITS,
    Label,
    Manifest,
    Split,
    packed_index_name,
)
from scaling4d.ingest.settings import IngestSettings
from scaling4d.ingest.shards import file_names, write_durably, write_packed_indexes
from scaling4d.ingest.sources import Source, files_digest, printable, root_of
from scaling4d.ingest.work import Done, Skipped, software

_PATTERNS = ("train-*.tfrecord", "train-*.index", "train-*.sources.tsv")
_PATTERNS += tuple(pattern.replace("train", "validation") for pattern in _PATTERNS)
_PATTERNS += tuple(map(packed_index_name, SPLITS))


def write_manifest(
    work: pathlib.Path,
    sources: Sequence[Source],
    done: Mapping[str, Done],
    splits: dict[str, Split],
    settings: IngestSettings,
    labels: dict[str, Label],
) -> Manifest:
    """Writes the packed indexes, ``errors.tsv``, then ``manifest.json``, to the work folder."""
    write_packed_indexes(work, splits)
    skipped = skipped_of(sources, done)
    reasons = [item.reason for item in skipped]
    manifest = Manifest(
        settings=asdict(settings),
        software=software(),
        files=len(sources),
        files_digest=files_digest(sources),
        skipped={reason: reasons.count(reason) for reason in sorted(set(reasons))},
        dropped_frames=sum(item.dropped_frames for item in done.values()),
        splits=splits,
        format=IN_PLACE_FORMAT if settings.in_place else FORMAT,
        root=root_of(sources[0]) if settings.in_place else "",
        labels=labels,
    )
    lines = ["file\treason\tdetail", *("\t".join(map(printable, (s.name, s.reason, s.detail))) for s in skipped)]
    write_durably(work / ERRORS_NAME, ("\n".join(lines) + "\n").encode())
    aside = work / f"{MANIFEST_NAME}.aside"
    write_durably(aside, manifest.to_json().encode())
    os.replace(aside, work / MANIFEST_NAME)
    return manifest


def put_in_place(work: pathlib.Path, folder: pathlib.Path, manifest: Manifest) -> None:
    """Moves the files of ``manifest`` from ``work`` to ``folder``, in place of another data set if there is one."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    names = {name for split in manifest.splits.values() for shard in split.shards for name in file_names(shard)}
    names |= {packed_index_name(name) for name, split in manifest.splits.items() if split.shards}
    for name in sorted(names | {ERRORS_NAME}):
        with contextlib.suppress(FileNotFoundError):
            os.replace(work / name, folder / name)
    for path in [path for pattern in _PATTERNS for path in folder.glob(pattern)]:
        if path.name not in names:
            path.unlink()
    for path in work.iterdir():  # now, so that nothing is left over when the data set is there
        if path.name != MANIFEST_NAME:
            path.unlink()
    os.replace(work / MANIFEST_NAME, folder / MANIFEST_NAME)
    work.rmdir()


def skipped_of(sources: Iterable[Source], done: Mapping[str, Done]) -> tuple[Skipped, ...]:
    """The skipped files in the order of the sources."""
    found = (done[source.name].skipped for source in sources if source.name in done)
    return tuple(item for item in found if item)


def read_errors(folder: pathlib.Path) -> tuple[Skipped, ...]:
    """The skipped files of a finished data set."""
    path = folder / ERRORS_NAME
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else []
    return tuple(Skipped(*line.split("\t")) for line in lines)
