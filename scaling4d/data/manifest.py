"""The manifest of a data set of clips: what is in the folder, for the machine and for a reader.

Responsible for: ``manifest.json`` (its fields are specified in ``docs/data.md``), the names of the files beside it and
opening a split through it. The manifest is written last: a folder without one is not a data set. Not responsible for:
the shards' contents (``records.py``) or making them (``scaling4d.ingest``).
"""

import hashlib
import json
import pathlib
from dataclasses import asdict, dataclass, field
from typing import Any

import google_crc32c

from scaling4d.data.records import ShardedRecords, decode_index
from scaling4d.errors import UserError

FORMAT = "scaling4d-clips"
VERSION = 1
MANIFEST_NAME = "manifest.json"
ERRORS_NAME = "errors.tsv"
SPLITS = ("train", "validation")


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
        return pathlib.PurePath(self.name).stem + ".index"


@dataclass(frozen=True)
class Split:
    """The shards of one split and what they add up to; ``seconds`` is the clips' total duration."""

    clips: int = 0
    frames: int = 0
    sources: int = 0
    seconds: float = 0.0
    shards: tuple[Shard, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything ``manifest.json`` says; ``skipped`` counts the files by reason."""

    settings: dict[str, Any]
    software: dict[str, str]
    files: int
    files_digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    dropped_frames: int = 0
    splits: dict[str, Split] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def fingerprint(self) -> str:
        """Names the records and their numbering: equal for two data sets exactly when all their shards are equal."""
        shards = {name: [asdict(shard) for shard in split.shards] for name, split in self.splits.items()}
        return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()[:32]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tfrecord"


def read_manifest(directory: pathlib.Path) -> Manifest:
    """The manifest of the data set in ``directory``; raises UserError when there is none or it cannot be used."""
    path = directory / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no clips: there is no {MANIFEST_NAME}; make it with "
            f"`scaling4d ingest --input VIDEOS --output {directory}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); ingest the data set again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path} is not the manifest of a clip data set (its format is not {FORMAT!r})")
    if raw.get("version") != VERSION:
        raise UserError(f"{path} has version {raw.get('version')!r}; this program reads version {VERSION}")
    try:
        splits = {
            name: Split(**{**split, "shards": tuple(Shard(**shard) for shard in split["shards"])})
            for name, split in raw["splits"].items()
        }
        return Manifest(**{**raw, "splits": splits})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); ingest the data set again") from error


def open_split(directory: pathlib.Path, manifest: Manifest, split: str) -> ShardedRecords:
    """The records of one split; raises UserError when the split has none or an index is missing or damaged."""
    if split not in manifest.splits or not manifest.splits[split].clips:
        filled = [name for name, found in manifest.splits.items() if found.clips]
        raise UserError(f"{directory} holds no clips in split {split!r}; it has {', '.join(filled) or 'none at all'}")
    shards = []
    for shard in manifest.splits[split].shards:
        index_path = directory / shard.index_name
        try:
            index = index_path.read_bytes()
        except OSError as error:
            raise UserError(f"{index_path} cannot be read: {error.strerror}; ingest the data set again") from error
        offsets = decode_index(index, str(index_path))
        if f"{google_crc32c.value(index):08x}" != shard.index_crc32c:
            raise UserError(f"{index_path} belongs to another shard or data set (its CRC is not that of the manifest)")
        shards.append((directory / shard.name, offsets))
    return ShardedRecords(shards)
