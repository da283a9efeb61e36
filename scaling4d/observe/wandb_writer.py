"""Metrics for Weights & Biases (optional: the extra ``wandb``).

Responsible for: one W&B run for one run folder, across resumes (its id is kept in ``MODEL_DIR/wandb.json``), and going
on without a network: then W&B keeps files in ``MODEL_DIR/wandb`` for a later ``wandb sync``. Not responsible for: what
W&B already received; it cannot be cut back, and W&B itself ignores a step that it has.
"""

import netrc
import os
import secrets
import socket
import tempfile
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from scaling4d.errors import UserError
from scaling4d.observe.metric_writer import MetricWriter
from scaling4d.run_folder import RunFolder

_ID_FILE = "wandb.json"
_CONNECT_S = 3.0


class WandbWriter(MetricWriter):
    """Scalars and pictures; ``WANDB_MODE``, ``WANDB_API_KEY`` and ``WANDB_BASE_URL`` work as W&B documents them.

    Args:
      folder: the run folder.
      project: W&B project.
      entity: W&B team or user; None is the account's own.
      name: the run's display name; None is the run folder's last part.
    """

    def __init__(
        self, folder: RunFolder, project: str = "scaling4d", entity: str | None = None, name: str | None = None
    ):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError("WandbWriter needs wandb: pip install 'scaling4d[wandb]', or use another writer") from error
        if not folder.exists(_ID_FILE):
            folder.write_json(_ID_FILE, {"id": secrets.token_hex(8)})
        config = {"gin": folder.read_text("config.gin")} if folder.exists("config.gin") else {}
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=project,
            entity=entity,
            name=name or folder.path.name,
            id=folder.read_json(_ID_FILE)["id"],
            resume="allow",
            dir=tempfile.mkdtemp(prefix="wandb-") if folder.is_bucket else str(folder),
            config=config,
            mode=_mode(),
            settings=wandb.Settings(console="off"),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._run.log({name: self._wandb.Image(image) for name, image in images.items()}, step=step)

    def truncate(self, step: int) -> None:
        """Nothing: see the module's first lines."""

    def close(self) -> None:
        self._run.finish()


def _mode() -> str | None:
    """None leaves the choice to ``WANDB_MODE``; otherwise offline unless there is a key and the server answers.

    Left to itself W&B asks for a key on a terminal, and waits a minute and a half for a server that is not there.
    """
    if os.environ.get("WANDB_MODE"):
        return None
    server = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = server.hostname or "", server.port or (80 if server.scheme == "http" else 443)
    if not (os.environ.get("WANDB_API_KEY") or _netrc_has(host)):
        return "offline"
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError:
        return "offline"
    return "online"


def _netrc_has(host: str) -> bool:
    """True if ``wandb login`` left a key, which it keeps in the netrc file."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
