"""Where a command that reads a run puts its results.

Responsible for: refusing to replace what is there, the space it takes, and messages that name ``--output``. Not
responsible for: files that appear at once or not at all (``run_folder.py``).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import IO

from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder


class ResultsFolder(RunFolder):
    """The folder that ``--output`` names, or lies in."""

    def exists(self, name: str = "") -> bool:
        with _naming_output(self.file(name)):
            return super().exists(name)

    def create(self) -> None:
        with _naming_output(self.path):
            super().create()

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[IO[bytes]]:
        with _naming_output(self.file(name)), super().replacing(name) as file:
            yield file

    def check_new(self, names: Iterable[str]) -> None:
        """Raises UserError where one of the files is there already."""
        for name in names:
            if self.exists(name):
                raise UserError(f"{self.file(name)} is there already: use another --output, or --overwrite")

    def check_space(self, needed: int) -> None:
        """Raises UserError where the disk has less than ``needed`` bytes left; a bucket is not asked."""
        free = self.free_bytes()
        if free is not None and free < needed:
            raise UserError(
                f"cannot write in {self}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free; free "
                "some space or use another --output"
            )


@contextlib.contextmanager
def _naming_output(path: os.PathLike) -> Iterator[None]:
    """A run folder's messages name the trainer's flag; errors of the system that it does not know become one line."""
    try:
        yield
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise UserError(str(error).replace("--model_dir", "--output")) from error.__cause__
    except OSError as error:
        raise UserError(f"cannot write {os.fspath(path)}: {error.strerror or error}; use another --output") from error
