"""Sources that may not be used (any more), as a text file names them.

Responsible for: reading the list and its digest. Not responsible for: leaving the records out (``clips.py``).
"""

import hashlib
import pathlib
from dataclasses import dataclass

from scaling4d.errors import UserError


@dataclass(frozen=True)
class BlockList:
    """``sources``: as in the records' field ``source``. ``digest``: of the set of names; empty for an empty set."""

    sources: frozenset[bytes] = frozenset()
    digest: str = ""


def read_block_list(path: str) -> BlockList:
    """The list in the text file ``path``, one source a line, in any data set; empty lines and order do not count.

    Raises UserError when the file cannot be read; an empty ``path`` is an empty list.
    """
    if not path:
        return BlockList()
    try:
        data = pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"the list of blocked sources {path} cannot be read: {error.strerror}; change --gin.ClipData.blocked"
        ) from error
    # Bytes throughout: a source keeps the bytes of a file name that is not UTF-8.
    sources = frozenset(line for line in (raw.removesuffix(b"\r") for raw in data.split(b"\n")) if line)
    digest = hashlib.sha256(b"\n".join(sorted(sources))).hexdigest()[:32] if sources else ""
    return BlockList(sources, digest)
