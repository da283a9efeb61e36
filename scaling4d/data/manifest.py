"""The manifest of a data set of clips: what is in the folder, for the machine and for a reader.

Responsible for: ``manifest.json`` (its fields are specified in ``docs/data.md``), the names of the files beside it and
opening a split through it. The manifest is written last: a folder without one is not a data set. Not responsible for:
the shards' contents (``records.py``) or making them (``scaling4d.ingest``).
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from scaling4d.data.indexes import read_offsets
from scaling4d.data.records import ShardedRecords
from scaling4d.data.retries import MissingFile, ReadError
from scaling4d.data.storage import is_bucket, open_store
from scaling4d.errors import UserError

FORMAT = "scaling4d-clips"
JPEG_FORMAT = "jpeg-sequences"  # shards of other programs, see jpeg_clips.py
IN_PLACE_FORMAT = "scaling4d-in-place"  # records that say where in video files their clips are, see in_place.py
FORMATS = (FORMAT, JPEG_FORMAT, IN_PLACE_FORMAT)
VERSION = 1
MANIFEST_NAME = "manifest.json"
ERRORS_NAME = "errors.tsv"
SPLITS = ("train", "validation")

_PIECE = 1000  # shards that are turned to text at a time


@dataclass(frozen=True)
class Shard:
    """One shard file and its index; checksums are CRC-32C of the whole file, in hexadecimal."""

    name: str
    clips: int
    bytes: int
    crc32c: str
    index_crc32c: str

    @property
    def index_name(self) -> str:
        """The index beside it; names such as ``train.tfrecord-00000-of-00010`` stay whole, or they would collide."""
        return self.name.removesuffix(".tfrecord") + ".index"


@dataclass(frozen=True)
class Split:
    """The shards of one split and what they add up to; ``seconds`` is the clips' total duration."""

    clips: int = 0
    frames: int = 0
    sources: int = 0
    seconds: float = 0.0
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class Label:
    """A label of records: its type (``int64``, ``float`` or ``bytes``) and how many clips of each split have it."""

    type: str
    clips: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """Everything ``manifest.json`` says; ``skipped`` counts the files by reason.

    ``root``: the folder of the video files of clips that are read in place. ``labels``: by the names of their fields.
    Both are left out of the file where they are empty.
    """

    settings: dict[str, Any]
    software: dict[str, str]
    files: int
    files_digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    dropped_frames: int = 0
    splits: dict[str, Split] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION
    root: str = ""
    labels: dict[str, Label] = field(default_factory=dict)

    def to_json(self) -> str:
        fields = {name: value for name, value in vars(self).items() if value or name not in ("root", "labels")}
        # Not asdict, which copies every value: a data set of 170 million clips has 170,000 shards.
        return json.dumps(fields, indent=1, ensure_ascii=False, default=vars) + "\n"

    def fingerprint(self) -> str:
        """Names the records and their numbering: equal for two data sets exactly when all their shards are equal."""
        digest = hashlib.sha256()  # of this very text: checkpoints hold it
        for text in _shards_as_json(self.splits):
            digest.update(text.encode())
        return digest.hexdigest()[:32]


def _shards_as_json(splits: Mapping[str, Split]) -> Iterator[str]:
    """Yields, in pieces, the shards by split as ``json.dumps`` with ``sort_keys`` writes them."""
    yield "{"
    for place, (name, split) in enumerate(sorted(splits.items())):
        yield f"{', ' if place else ''}{json.dumps(name)}: ["
        for first in range(0, len(split.shards), _PIECE):
            piece = json.dumps([vars(shard) for shard in split.shards[first : first + _PIECE]], sort_keys=True)
            yield (", " if first else "") + piece[1:-1]
        yield "]"
    yield "}"


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tfrecord"


def packed_index_name(split: str) -> str:
    """The file that holds the index files of a split one after the other, in the manifest's order; may be missing."""
    return f"{split}.indexes"


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """The manifest of the data set in ``directory``, a folder or a ``gs://`` or ``s3://`` directory.

    Raises UserError when there is none or it cannot be used.
    """
    store = open_store(directory)
    path = f"{store.directory}/{MANIFEST_NAME}"
    try:
        raw = json.loads(store.read_bytes(MANIFEST_NAME).decode("utf-8"))
    except MissingFile:
        make = f"make it with `scaling4d ingest --input VIDEOS --output {store.directory}`"
        remedy = "copy there a folder that `scaling4d ingest` made" if is_bucket(directory) else make
        raise UserError(f"{store.directory} holds no clips: there is no {MANIFEST_NAME}; {remedy}") from None
    except ReadError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); ingest the data set again") from error
    finally:
        store.close()
    if not isinstance(raw, dict) or raw.get("format") not in FORMATS:
        raise UserError(f"{path} is not the manifest of a clip data set (its format is not {FORMAT!r})")
    if raw.get("version") != VERSION:
        raise UserError(f"{path} has version {raw.get('version')!r}; this program reads version {VERSION}")
    try:
        splits = {
            name: Split(**{**split, "shards": tuple(map(_shard, split["shards"]))})
            for name, split in raw["splits"].items()
        }
        labels = {name: Label(**label) for name, label in raw.get("labels", {}).items()}
        return Manifest(**{**raw, "splits": splits, "labels": labels})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); ingest the data set again") from error


def _shard(raw: dict[str, Any]) -> Shard:
    """Raises TypeError, or KeyError, where it is none."""
    shard = Shard(**raw)
    is_text = type(shard.name) is type(shard.crc32c) is type(shard.index_crc32c) is str
    is_number = type(shard.clips) is type(shard.bytes) is int  # no bool
    if not (is_text and is_number and shard.clips >= 0 and shard.bytes >= 0):
        raise TypeError(f"a shard of {raw}")
    return shard


def open_split(directory: str | os.PathLike, manifest: Manifest, split: str) -> ShardedRecords:
    """The records of one split; raises UserError when the split has none or an index is missing or damaged.

    ``directory``: as for ``read_manifest``.
    """
    if split not in manifest.splits or not manifest.splits[split].clips:
        filled = [name for name, found in manifest.splits.items() if found.clips]
        raise UserError(f"{directory} holds no clips in split {split!r}; it has {', '.join(filled) or 'none at all'}")
    store = open_store(directory)
    shards = manifest.splits[split].shards
    offsets = read_offsets(store, packed_index_name(split), shards)
    files = [(shard.name, one) for shard, one in zip(shards, offsets, strict=True)]
    if manifest.format == JPEG_FORMAT:
        from scaling4d.data.jpeg_clips import JpegClips  # needs OpenCV, which a reader of manifests does not

        return JpegClips(files, store)
    if manifest.format == IN_PLACE_FORMAT:
        from scaling4d.data.in_place import InPlaceClips  # needs PyAV

        return InPlaceClips(files, store, manifest)
    return ShardedRecords(files, store=store)
