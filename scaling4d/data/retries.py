"""Reads that fail, and trying again: what storage of every kind has in common.

Responsible for: the errors of a read, how long it is tried again, and counting that. Not responsible for: which
failures pass (``storage.py`` for folders, ``buckets.py``).
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


class ReadError(Exception):
    """A file or a part of it cannot be read, also not by trying again; the message is one line without its name."""


class MissingFile(ReadError):
    """There is no such file."""


class TransientError(Exception):
    """A read failed in a way that may pass; for ``persist``."""


@dataclass(frozen=True)
class Patience:
    """How long a failing read is tried again.

    Between two tries lies a random time of up to ``first_wait_s``, doubled with each try, of at most
    ``longest_wait_s``. No try begins later than ``total_s`` after the first. A try ends when no byte has come for
    ``stall_s`` seconds (buckets only).
    """

    tries: int = 6
    first_wait_s: float = 0.2
    longest_wait_s: float = 5.0
    total_s: float = 60.0
    stall_s: float = 10.0


class Counter:
    """A number that threads may count up."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def count(self) -> None:
        with self._lock:
            self.value += 1


def persist(
    attempt: Callable[[], _T], patience: Patience, retries: Counter, ending: threading.Event | None = None
) -> _T:
    """What ``attempt`` returns, tried again after a TransientError; raises ReadError when patience is at an end.

    ``ending``, when it is set, ends all waiting.
    """
    begun = time.monotonic()
    tries = 0
    while True:
        try:
            return attempt()
        except TransientError as error:
            tries += 1
            # Random without a seed: it changes no data, and hosts that fail together must not return together.
            wait = random.uniform(0, min(patience.longest_wait_s, patience.first_wait_s * 2 ** (tries - 1)))
            late = time.monotonic() + wait - begun > patience.total_s
            if tries >= patience.tries or late or (ending is not None and ending.is_set()):
                raise ReadError(f"{error} (tried {tries} times)" if tries > 1 else str(error)) from error
            if ending is None:
                time.sleep(wait)
            elif ending.wait(wait):
                raise ReadError(f"{error} (the program ends)") from error
            retries.count()
