"""``model.json``: what a run says of its model, for readers that know no gin.

Responsible for: the version of the file's form, the commit that goes into it, and reading it. Not responsible for: what
it says (``run_records.py`` and the objective's ``model_description``) or building a model from it (``objectives/``).
Works with the base install.
"""

import pathlib
import subprocess
from typing import Any

from scaling4d.errors import UserError
from scaling4d.run_folder import RunFolder

NAME = "model.json"
FORMAT_VERSION = 1


def read(folder: RunFolder) -> dict[str, Any]:
    """The folder's ``model.json``; raises UserError where there is none, or none that this version can read."""
    path = folder.file(NAME)
    if not folder.exists(NAME):
        raise UserError(f"no {path}: it says what the model is; copy it from the run that saved the checkpoint")
    found = folder.read_json(NAME)
    if not isinstance(found, dict) or not isinstance(found.get("format_version"), int):
        raise UserError(f"{path} is no model.json of a run: it has no format_version; restore it from the run")
    if found["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {found['format_version']}, this scaling4d reads {FORMAT_VERSION}: use the "
            "version that wrote it, or a newer one"
        )
    return found


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; None outside a checkout."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return (revision + ("+changes" if git("status", "--porcelain", "-uno") else "")) or None
    except (OSError, subprocess.TimeoutExpired):
        return None
