"""Describes a data set of clips: tables, text histograms and a sheet of pictures.

Responsible for: the numbers and the pictures. Not responsible for: whether the data set is sound (``verify.py``) or
flags (``checks_cli.py``).

Frames, rates and sizes come from the tables beside the shards and from the index; a shard without a table is read.
"""

import math
import pathlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from scaling4d.data.catalog import Entry, entry_of, read_table, table_name
from scaling4d.data.clips import decode_fields
from scaling4d.data.decode import BadClip, ClipSettings
from scaling4d.data.manifest import Manifest, Shard, open_split, read_manifest
from scaling4d.data.order import Draws
from scaling4d.data.records import BadRecord, RecordSource, decode_index
from scaling4d.errors import UserError
from scaling4d.observe.previews import encode_png, sheet

_MOST_ROWS = 8
_BAR = 30  # characters of the longest bar
_SHEET_CLIPS, _SHEET_FRAMES, _SHEET_SIZE = 16, 8, 112
_MISSING = np.uint8(200)  # grey of a clip that cannot be shown


@dataclass
class Counts:
    """How often each value occurs among the clips; ``seconds`` and ``bytes`` by powers of two."""

    clips: int = 0
    unread: int = 0
    frames: Counter[int] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)
    pixels: Counter[tuple[int, int]] = field(default_factory=Counter)
    seconds: Counter[int] = field(default_factory=Counter)
    bytes: Counter[int] = field(default_factory=Counter)


def count(directory: pathlib.Path, manifest: Manifest) -> Counts:
    """Counts all clips of all splits; raises UserError when a shard's index or table is damaged."""
    counts = Counts()
    for name, split in manifest.splits.items():
        first = 0
        records = open_split(directory, manifest, name) if split.clips else None
        for shard in split.shards:
            sizes = _sizes(directory, shard)
            for entry, size in zip(_entries(directory, shard, records, first), sizes, strict=False):
                if entry is None:
                    counts.unread += 1
                    continue
                counts.clips += 1
                counts.frames[entry.frames] += 1
                counts.rates[round(entry.fps, 2)] += 1
                counts.pixels[entry.width, entry.height] += 1
                if entry.fps > 0:  # shards of other programs may not say it
                    counts.seconds[_power(entry.frames / entry.fps)] += 1
                counts.bytes[_power(size)] += 1
            first += shard.clips
    return counts


def _sizes(directory: pathlib.Path, shard: Shard) -> list[int]:
    path = directory / shard.index_name
    return np.diff(decode_index(path.read_bytes(), str(path)).astype(np.int64)).tolist()


def _entries(directory: pathlib.Path, shard: Shard, records: RecordSource, first: int) -> Iterator[Entry | None]:
    """The entries of a shard; None for a record that cannot be read."""
    try:
        yield from read_table(directory / table_name(shard.name))
    except FileNotFoundError:
        for record in range(first, first + shard.clips):
            try:
                yield entry_of(records.read(record))
            except (BadRecord, KeyError):
                yield None


def _power(value: float) -> int:
    return math.floor(math.log2(value)) if value > 0 else -20


def describe(directory: str | pathlib.Path) -> str:
    """The tables as text; raises UserError where there is no data set or its index files are damaged."""
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    counts = count(directory, manifest)
    blocks = [_overview(manifest)]
    blocks.append(_histogram("frames a clip", _numbers(counts.frames)))
    blocks.append(_histogram("seconds a clip", _powers(counts.seconds, 1)))
    blocks.append(_histogram("frames a second", _numbers(counts.rates)))
    blocks.append(_histogram("pixels", _common({f"{w} x {h}": n for (w, h), n in counts.pixels.items()})))
    blocks.append(_histogram("KiB a clip", _powers(counts.bytes, 1024)))
    if manifest.labels:
        blocks.append(_label_table(manifest))
    if manifest.skipped:
        blocks.append(_histogram(f"files skipped, of {manifest.files}", list(manifest.skipped.items())))
    if counts.unread:
        blocks.append(f"{counts.unread} records cannot be read and are not counted; `--verify` tells why")
    return "\n\n".join(blocks)


def _overview(manifest: Manifest) -> str:
    rows: list[tuple[str, ...]] = [("split", "clips", "videos", "hours", "frames", "GB", "shards")]
    for name, split in manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        hours, gigabytes = f"{split.seconds / 3600:.2f}", f"{size / 1e9:.3f}"
        rows.append((name, f"{split.clips:,}", f"{split.sources:,}", hours, f"{split.frames:,}", gigabytes,
                     f"{len(split.shards):,}"))  # fmt: skip
    return _table(rows)


def _label_table(manifest: Manifest) -> str:
    """In how many clips each label is, as the manifest says."""
    rows = [("label", "type", *manifest.splits)]
    for name, label in manifest.labels.items():
        rows.append((name, label.type, *(f"{label.clips.get(split, 0):,}" for split in manifest.splits)))
    return _table(rows)


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = -widths[0]  # the first column is text, to the left
    return "\n".join("  ".join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _padded(cell: str, width: int) -> str:
    return cell.rjust(width) if width > 0 else cell.ljust(-width)


def _histogram(title: str, rows: list[tuple[str, int]]) -> str:
    if not rows:
        return f"{title}: none"
    total, most = sum(number for _, number in rows), max(number for _, number in rows)
    names, numbers = max(len(name) for name, _ in rows), max(len(f"{number:,}") for _, number in rows)
    lines = [
        f"  {name:>{names}}  {number:>{numbers},}  {number / total:>4.0%}  {'#' * max(round(_BAR * number / most), 1)}"
        for name, number in rows
    ]
    return "\n".join([title, *lines])


def _numbers(counter: Counter) -> list[tuple[str, int]]:
    """Few values one by one, in their order; of many the commonest."""
    if len(counter) <= _MOST_ROWS:
        return [(f"{value:g}", counter[value]) for value in sorted(counter)]
    return _common({f"{value:g}": number for value, number in counter.items()})


def _common(counter: dict[str, int]) -> list[tuple[str, int]]:
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(number for _, number in ranked[_MOST_ROWS:])
    return ranked[:_MOST_ROWS] + ([(f"{len(ranked) - _MOST_ROWS} others", rest)] if rest else [])


def _powers(counter: Counter[int], unit: int) -> list[tuple[str, int]]:
    return [(f"{2.0**power / unit:g} to {2.0 ** (power + 1) / unit:g}", counter[power]) for power in sorted(counter)]


def picture(directory: str | pathlib.Path) -> bytes:
    """A PNG of evenly spaced clips: one a row, named by split and number, with frames from its beginning to its end.

    A clip that cannot be shown is grey. Raises UserError where there is no data set.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    filled = [name for name, split in manifest.splits.items() if split.clips]
    total = sum(manifest.splits[name].clips for name in filled)
    rows: dict[str, np.ndarray] = {}
    for name in filled:
        clips = manifest.splits[name].clips
        records = open_split(directory, manifest, name)
        shown = min(max(round(_SHEET_CLIPS * clips / total), 1), clips)
        for place in range(shown):
            number = place * clips // shown
            rows[f"{name} {number}"] = _frames(records, number)[None]
    if not rows:
        raise UserError(f"{directory} holds no clips to show")
    return encode_png(sheet(rows, frames=_SHEET_FRAMES))


def _frames(records: RecordSource, number: int) -> np.ndarray:
    """uint8 [_SHEET_FRAMES, _SHEET_SIZE, _SHEET_SIZE, 3] of one record."""
    try:
        fields = records.read(number)
        stored = fields["frames"]
        stride = max((stored - 1) // (_SHEET_FRAMES - 1), 1)
        wanted = ClipSettings(frames=_SHEET_FRAMES, size=_SHEET_SIZE, stride=stride, crop="center")
        return decode_fields(records, fields, wanted, [Draws(0, 0)])[0]
    except (BadRecord, BadClip, KeyError):
        return np.full((_SHEET_FRAMES, _SHEET_SIZE, _SHEET_SIZE, 3), _MISSING)
