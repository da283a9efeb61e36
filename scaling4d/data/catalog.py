"""The table beside each shard: what every record is, without opening it.

Responsible for: ``train-00000.sources.tsv``, one line a record in the shard's order (specified in ``docs/data.md``).
Not responsible for: the records themselves (``records.py``). Training does not read it; statistics, searches and other
programs do.
"""

import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scaling4d.data.example import Value
from scaling4d.errors import UserError

_ESCAPES = ((b"\\", b"\\\\"), (b"\t", b"\\t"), (b"\n", b"\\n"), (b"\r", b"\\r"))
_UNESCAPED = {b"\\": b"\\", b"t": b"\t", b"n": b"\n", b"r": b"\r"}


class Entry(NamedTuple):
    """One record: its source video's name as stored, where in it the clip starts (microseconds), and its size."""

    source: bytes
    start_us: int
    frames: int
    fps: float
    width: int
    height: int


_HEADER = "\t".join(Entry._fields).encode()


def table_name(shard: str) -> str:
    """The name of the table of the shard file ``shard``."""
    return shard.removesuffix(".tfrecord") + ".sources.tsv"


def entry_of(fields: Mapping[str, Value]) -> Entry:
    """The entry of a record with these fields; raises KeyError where one is missing."""
    return Entry(*(fields[name] for name in Entry._fields))


def encode_entry(entry: Entry) -> bytes:
    """One line of the table."""
    source = entry.source
    for raw, escaped in _ESCAPES:
        source = source.replace(raw, escaped)
    numbers = (entry.start_us, entry.frames, f"{entry.fps:.6g}", entry.width, entry.height)
    return b"\t".join([source, *(str(number).encode() for number in numbers)])


def encode_table(lines: Iterable[bytes]) -> bytes:
    """The file of these lines (of ``encode_entry``)."""
    return b"\n".join([_HEADER, *lines, b""])


def read_table(path: pathlib.Path) -> list[Entry]:
    """The entries of a table file; raises UserError when it is no such table, FileNotFoundError when it is missing."""
    header, *lines = path.read_bytes().split(b"\n")
    if header != _HEADER or lines[-1:] != [b""]:
        raise UserError(f"{path} is not a whole table of records; its first line must be {_HEADER.decode()!r}")
    try:
        return [_decode_entry(line) for line in lines[:-1]]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _decode_entry(line: bytes) -> Entry:
    source, start_us, frames, fps, width, height = line.split(b"\t")
    return Entry(unescape(source), int(start_us), int(frames), float(fps), int(width), int(height))


def unescape(text: bytes) -> bytes:
    """A cell of a table as it was before its backslashes, tabs and ends of lines were escaped; raises ValueError."""
    first, *parts = text.split(b"\\")
    out, place = [first], 0
    while place < len(parts):
        part = parts[place]
        if not part and place + 1 < len(parts):  # two backslashes in a row leave an empty part between them
            out.append(b"\\" + parts[place + 1])
            place += 2
            continue
        if part[:1] not in _UNESCAPED or not part:
            raise ValueError(f"unknown escape in {text!r}")
        out.append(_UNESCAPED[part[:1]] + part[1:])
        place += 1
    return b"".join(out)
