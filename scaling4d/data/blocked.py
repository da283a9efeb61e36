"""Sources that may not be used (any more), as a text file names them.

Responsible for: reading the list and its digest. Not responsible for: leaving the records out (``clips.py``).
"""

import contextlib
import hashlib
import os
from dataclasses import dataclass

from scaling4d.data.retries import ReadError
from scaling4d.data.storage import open_store
from scaling4d.errors import UserError


@dataclass(frozen=True)
class BlockList:
    """``sources``: as in the records' field ``source``. ``digest``: of the set of names; empty for an empty set."""

    sources: frozenset[bytes] = frozenset()
    digest: str = ""


def read_block_list(path: str) -> BlockList:
    """The list in ``path``, one source a line, in any data set; empty lines and order do not count.

    ``path``: a text file in a folder or under ``gs://`` or ``s3://``; an empty one is an empty list. Raises UserError
    when it cannot be read.
    """
    if not path:
        return BlockList()
    directory, name = os.path.split(os.path.expanduser(path))
    try:
        with contextlib.closing(open_store(directory)) as store:
            data = store.read_bytes(name)
    except (ReadError, UserError) as error:
        raise UserError(
            f"the list of blocked sources {path} cannot be read: {error}; change --gin.ClipData.blocked"
        ) from error
    # Bytes throughout: a source keeps the bytes of a file name that is not UTF-8.
    sources = frozenset(line for line in (raw.removesuffix(b"\r") for raw in data.split(b"\n")) if line)
    digest = hashlib.sha256(b"\n".join(sorted(sources))).hexdigest()[:32] if sources else ""
    return BlockList(sources, digest)
