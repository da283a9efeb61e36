"""What the outline of a video file says, without decoding: is it a video container, and is it all there?

Responsible for: telling "no video at all" from "a damaged video", and files that were cut off. Decoders do not notice
the latter in Matroska and WebM: they just end early, without an error. Not responsible for: anything inside the
streams (``media.py``).
"""

import os
import struct
from typing import BinaryIO

_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"free", b"wide", b"skip", b"pnot", b"styp", b"sidx")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_OTHERS = (b"OggS", b"FLV", b"\x00\x00\x01\xba", b"\x30\x26\xb2\x75", b"\x47\x40")
_MOST_BOXES = 100_000


def is_container(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (12 bytes) claims to be a video container."""
    return head.startswith((_EBML, *_OTHERS)) or head[4:8] in _MOV_BOXES or _is_avi(head)


def missing_bytes(file: BinaryIO) -> int:
    """How many bytes a file lacks by its own outline; 0 where it is complete or its format does not say."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(64)
    if _is_avi(head):
        return max(8 + struct.unpack_from("<I", head, 4)[0] - size, 0)
    if head.startswith(_EBML):
        return max(_matroska_end(head) - size, 0)
    if head[4:8] in _MOV_BOXES:
        return max(_mov_end(file, size) - size, 0)
    return 0


def _is_avi(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:11] == b"AVI"


def _matroska_end(head: bytes) -> int:
    """Where the segment ends (RFC 8794, 9559); 0 for a live stream, whose size is not known."""
    header_size, place = _element_size(head, 4)
    place += header_size or 0
    if head[place : place + 4] != _SEGMENT:
        return 0
    size, place = _element_size(head, place + 4)
    return place + size if size is not None else 0


def _element_size(data: bytes, place: int) -> tuple[int | None, int]:
    """An EBML variable-length size (None when it is "unknown") and the place after it."""
    first = data[place] if place < len(data) else 0
    length = 9 - first.bit_length()
    raw = data[place : place + length]
    if not 1 <= length <= 8 or len(raw) < length:
        return None, place + 1
    value = int.from_bytes(raw, "big") & ((1 << (7 * length)) - 1)
    return (None if value == (1 << (7 * length)) - 1 else value), place + length


def _mov_end(file: BinaryIO, size: int) -> int:
    """Where the last known top-level box ends (ISO 14496-12, 4.2); bytes of other kinds after it do not count."""
    place = end = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        header = file.read(16)
        if len(header) < 8 or header[4:8] not in _MOV_BOXES:
            break
        length = struct.unpack_from(">I", header)[0]
        if length == 1 and len(header) == 16:
            length = struct.unpack_from(">Q", header, 8)[0]
        if length < 8:  # 0: the box goes on to the end of the file, whatever that is
            break
        place += length
        end = place
        if place >= size:
            break
    return end
