"""Finds the records of a TFRecord file that has no index.

Responsible for: walking from entry to entry by their lengths. Not responsible for: what the records hold, or whether
the CRC of their data holds (``scaling4d.data.records``).
"""

import os
import pathlib
import struct
from collections.abc import Iterator

from scaling4d.data.records import FRAMING_BYTES, BadRecord, masked_crc

_LENGTH = struct.Struct("<QI")


def scan_lengths(path: pathlib.Path) -> Iterator[int]:
    """Yields the length in bytes of each entry, framing included; only the entries' heads are read.

    Raises BadRecord where the file is not a row of entries from there on, OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        place = 0
        while place < size:
            head = os.pread(file.fileno(), _LENGTH.size, place)
            if len(head) < _LENGTH.size:
                raise BadRecord(f"{size - place} bytes at the end are no record")
            length, crc = _LENGTH.unpack(head)
            if masked_crc(head[:8]) != crc:
                raise BadRecord(f"no record begins at byte {place}: the CRC of its length fails")
            if place + length + FRAMING_BYTES > size:
                raise BadRecord(f"the record at byte {place} says {length} bytes, past the end of the file")
            yield length + FRAMING_BYTES
            place += length + FRAMING_BYTES
