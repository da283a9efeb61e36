"""Labels of source videos, from a table.

Responsible for: reading the file of ``--labels`` (specified in ``docs/data.md``), the types of its columns, and which
of the videos it names. Not responsible for: labels in records (``shards.py``) or counting clips (``join.py``).
"""

import codecs
import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scaling4d.data.catalog import unescape
from scaling4d.data.example import Value
from scaling4d.errors import UserError
from scaling4d.ingest.sources import Source, name_bytes, printable

TYPES: dict[str, type] = {"int64": int, "float": float, "bytes": bytes}
"""The types of labels, as the manifest names them, and those of their values in a record."""

OWN_FIELDS = frozenset(
    ("video", "source", "clip", "start_us", "fps", "frames", "width", "height", "first", "file_bytes", "file_modified")
)
"""What records hold anyway; no label may have such a name."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)")  # with no leading zero: "007" is a name and not a number
_DECIMAL = re.compile(rb"-?(0|[1-9][0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_LARGEST_FLOAT = 3.4028234e38  # of 32 bits, as records hold them


@dataclass(frozen=True)
class Labels:
    """``types``: of each column, by name. ``rows``: by a source's name as stored, its values, None where it has none.

    ``digest`` names the contents of the file.
    """

    types: dict[str, str] = field(default_factory=dict)
    rows: dict[bytes, Sequence[Value | None]] = field(default_factory=dict)
    digest: str = ""

    def of(self, name: str) -> dict[str, Value]:
        """The labels of a source by its name."""
        values = self.rows.get(name_bytes(name), ())
        return {label: value for label, value in zip(self.types, values, strict=False) if value is not None}


@dataclass(frozen=True)
class LabelsFound:
    """How many of the sources have a row, and how many rows name no source (``first_unknown`` is one of those)."""

    sources: int
    labeled: int
    unknown: int
    first_unknown: str

    def __str__(self) -> str:
        text = f"labels: for {self.labeled} of {self.sources} videos"
        return text + (f"; {self.unknown} rows name no video, such as {self.first_unknown}" if self.unknown else "")


def find_labels(labels: Labels, sources: Iterable[Source]) -> LabelsFound:
    """Compares the table with the sources; raises UserError when it names none of them."""
    names = {name_bytes(source.name) for source in sources}
    unknown = [name for name in labels.rows if name not in names]
    first = printable(os.fsdecode(unknown[0])) if unknown else ""
    found = LabelsFound(len(names), len(labels.rows) - len(unknown), len(unknown), first)
    if not found.labeled:
        raise UserError(
            f"--labels: none of its {found.unknown} rows names a video of --input; the first is {first or 'missing'}, "
            f"a video's name is such as {printable(os.fsdecode(min(names)))}"
        )
    return found


def read_labels(path: str | os.PathLike) -> Labels:
    """The table in the file ``path``; raises UserError when it is none."""
    try:
        data = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"--labels {path}: cannot be read: {error.strerror}") from error
    header, *lines = (line.removesuffix(b"\r") for line in data.removeprefix(codecs.BOM_UTF8).split(b"\n"))
    names = _column_names(header, path)
    cells: dict[bytes, list[bytes]] = {}
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        try:
            source, *values = map(unescape, line.split(b"\t"))
        except ValueError as error:
            raise UserError(f"--labels {path}: line {number}: {error}; write a backslash as two") from error
        if len(values) != len(names):
            raise UserError(f"--labels {path}: line {number} has {len(values) + 1} columns, the first {len(names) + 1}")
        if source in cells:
            raise UserError(f"--labels {path}: line {number} names {printable(os.fsdecode(source))} a second time")
        cells[source] = values
    types, columns = {}, []
    for place, name in enumerate(names):
        types[name], values = _typed([row[place] for row in cells.values()])
        columns.append(values)
    rows = dict(zip(cells, zip(*columns, strict=True), strict=True))
    return Labels(types, rows, hashlib.sha256(data).hexdigest()[:32])


def _column_names(header: bytes, path: str | os.PathLike) -> list[str]:
    first, *names = header.decode("utf-8", "replace").split("\t")
    if first != "source" or not names:
        raise UserError(
            f"--labels {path}: its first line must be 'source' and the names of the labels, separated by tabs; it is "
            f"{printable(header[:80].decode('utf-8', 'replace'))!r}"
        )
    for place, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--labels {path}: the label name {name!r} is no letter followed by letters, digits and _./-"
            )
        if name in OWN_FIELDS:
            raise UserError(f"--labels {path}: the label name {name!r} is a field of every record; choose another")
        if name in names[:place]:
            raise UserError(f"--labels {path}: two labels are named {name!r}")
    return names


def _typed(cells: Sequence[bytes]) -> tuple[str, list[Value | None]]:
    """The first type that holds all of a column without loss; an empty cell is no label."""
    filled = [cell for cell in cells if cell]
    integers = [bool(_INTEGER.fullmatch(cell)) for cell in filled]
    in_range = all(-(2**63) <= int(cell) < 2**63 for cell, integer in zip(filled, integers, strict=True) if integer)
    if filled and in_range and all(integers):
        return "int64", [int(cell) if cell else None for cell in cells]
    if filled and in_range and all(_DECIMAL.fullmatch(cell) and abs(float(cell)) <= _LARGEST_FLOAT for cell in filled):
        return "float", [float(cell) if cell else None for cell in cells]
    return "bytes", [cell or None for cell in cells]
