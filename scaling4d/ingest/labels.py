"""Labels of source videos, from a table.

Responsible for: reading the file of ``--labels`` (specified in ``docs/data.md``), the types of its columns, and which
of the videos it names. Not responsible for: labels in records (``shards.py``) or counting clips (``join.py``).
"""

import codecs
import hashlib
import os
import re
from collections.abc import Iterable
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
    """``types``: of each column, by name. ``rows``: by a source's name as stored, its cells as they stand in the file.

    ``digest`` names the contents of the file. Cells become values when they are asked for, which takes a quarter of the
    memory.
    """

    types: dict[str, str] = field(default_factory=dict)
    rows: dict[bytes, bytes] = field(default_factory=dict)
    digest: str = ""

    def of(self, name: str) -> dict[str, Value]:
        """The labels of a source by its name."""
        row = self.rows.get(name_bytes(name))
        cells = map(unescape, row.split(b"\t")) if row is not None else ()
        return {
            label: TYPES[kind](cell) for (label, kind), cell in zip(self.types.items(), cells, strict=False) if cell
        }


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
    digest = hashlib.sha256()
    rows: dict[bytes, bytes] = {}
    try:
        with open(os.path.expanduser(path), "rb") as file:
            header = file.readline()
            digest.update(header)
            columns = [_Column(name) for name in _column_names(header, path)]
            for number, raw in enumerate(file, 2):
                digest.update(raw)
                line = _without_end(raw)
                if not line:
                    continue
                source, _, row = line.partition(b"\t")
                cells = row.split(b"\t") if b"\t" in line else []
                if len(cells) != len(columns):
                    raise UserError(
                        f"--labels {path}: line {number} has {len(cells) + 1} columns, the first {len(columns) + 1}"
                    )
                try:
                    source = unescape(source)
                    for column, cell in zip(columns, cells, strict=True):
                        column.add(unescape(cell))
                except ValueError as error:
                    raise UserError(f"--labels {path}: line {number}: {error}; write a backslash as two") from error
                if source in rows:
                    twice = printable(os.fsdecode(source))
                    raise UserError(f"--labels {path}: line {number} names {twice} a second time")
                rows[source] = row
    except OSError as error:
        raise UserError(f"--labels {path}: cannot be read: {error.strerror}") from error
    return Labels({column.name: column.type for column in columns}, rows, digest.hexdigest()[:32])


def _column_names(header: bytes, path: str | os.PathLike) -> list[str]:
    header = _without_end(header.removeprefix(codecs.BOM_UTF8))
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


class _Column:
    """Which types hold all of a column without loss; an empty cell is no label."""

    def __init__(self, name: str):
        self.name = name
        self._is_filled = False
        self._are_integers = self._are_numbers = True

    def add(self, cell: bytes) -> None:
        if not cell:
            return
        self._is_filled = True
        if self._are_numbers and _INTEGER.fullmatch(cell):
            # A longer one is a name, and would be rounded as a float.
            self._are_numbers = len(cell) <= 20 and -(2**63) <= int(cell) < 2**63
        elif self._are_numbers:
            self._are_integers = False
            self._are_numbers = bool(_DECIMAL.fullmatch(cell)) and abs(float(cell)) <= _LARGEST_FLOAT

    @property
    def type(self) -> str:
        """The first of ``TYPES`` that does."""
        if not (self._is_filled and self._are_numbers):
            return "bytes"
        return "int64" if self._are_integers else "float"


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")
