"""Metrics as JSON lines: ``MODEL_DIR/train/metrics.jsonl``.

Responsible for: one object a line with ``step``, ``time`` (Unix seconds) and the metrics, made to be read by
``pandas.read_json(path, lines=True)``. Numbers that JSON does not have are strings (``"nan"``, ``"inf"``), which
``float`` reads. Not responsible for: where files are (``run_folder.py``).
"""

import json
import math
import time
from collections.abc import Iterator, Mapping

from scaling4d.observe.metric_writer import MetricWriter
from scaling4d.run_folder import RunFolder

_BUCKET_PERIOD_S = 60.0
"""A bucket object cannot grow: every append uploads the whole of it, so lines are gathered for a while."""


class JsonLinesWriter(MetricWriter):
    """Appends to one file; on a disk every line is there when ``write`` returns."""

    def __init__(self, folder: RunFolder, name: str = "train/metrics.jsonl"):
        self._folder, self._name = folder, name
        self._waiting: list[str] = []
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        numbers = {name: _json_number(float(value)) for name, value in metrics.items()}
        self._waiting.append(json.dumps({"step": int(step), "time": round(time.time(), 3), **numbers}))
        if not self._folder.is_bucket or time.monotonic() - self._flushed >= _BUCKET_PERIOD_S:
            self.flush()

    def truncate(self, step: int) -> None:
        if not self._folder.exists(self._name):
            return
        text = self._folder.read_bytes(self._name).decode(errors="replace")
        kept = "".join(f"{line}\n" for line, at in _lines(text) if at <= step)
        if kept != text:
            self._folder.write_text(self._name, kept)

    def flush(self) -> None:
        if self._waiting:
            self._folder.append_lines(self._name, self._waiting)
            self._waiting = []
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """(line, step) of every whole line; what a killed writer left half-written is passed over."""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            yield line, int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue
