"""metrics.jsonl: what is in a line, cutting back, half-written lines, buckets."""

import json
import math
import time

import pytest

from scaling4d.observe import json_lines
from scaling4d.observe.json_lines import JsonLinesWriter
from scaling4d.run_folder import RunFolder
from tests import gcs_server

NAME = "train/metrics.jsonl"


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def steps(folder: RunFolder) -> list[int]:
    return [json.loads(line)["step"] for line in folder.read_text(NAME).splitlines()]


def test_a_line(folder):
    writer = JsonLinesWriter(folder)
    writer.write(3, {"train/loss": 0.1, "eval/loss": math.nan, "x": -math.inf})
    [line] = folder.read_text(NAME).splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert abs(record.pop("time") - time.time()) < 60
    assert record == {"step": 3, "train/loss": 0.1, "eval/loss": "nan", "x": "-inf"}
    assert math.isnan(float(record["eval/loss"])) and float(record["x"]) == -math.inf


def test_numbers_come_back_exactly(folder):
    writer = JsonLinesWriter(folder)
    value = 0.1 + 0.2
    writer.write(1, {"loss": value})
    assert json.loads(folder.read_text(NAME))["loss"] == value


def test_cutting_back(folder):
    writer = JsonLinesWriter(folder)
    for step in (1, 2, 2, 3, 4):
        writer.write(step, {"loss": 1.0})
    writer.close()
    for kept, step in (([1, 2, 2, 3, 4], 9), ([1, 2, 2], 2), ([1], 1), ([], 0)):
        JsonLinesWriter(folder).truncate(step)
        assert steps(folder) == kept
    writer = JsonLinesWriter(folder)
    writer.truncate(0)
    writer.write(1, {})
    assert steps(folder) == [1]


TAILS = [b'{"step": 3, "lo', b'{"step": 3}', b"\x00\x00\x00", b"\n\n", b'{"loss": 1}\n', b"[3]\n", b"\xff\xfe"]


@pytest.mark.parametrize("tail", TAILS)
def test_what_a_killed_writer_left(folder, tail):
    writer = JsonLinesWriter(folder)
    writer.write(1, {})
    writer.write(2, {})
    whole = folder.read_bytes(NAME)
    folder.write_bytes(NAME, whole + tail)
    writer = JsonLinesWriter(folder)
    writer.truncate(2)
    assert folder.read_bytes(NAME) == whole
    writer.write(3, {})
    assert steps(folder) == [1, 2, 3]


def test_nothing_to_cut(folder):
    JsonLinesWriter(folder).truncate(5)
    assert not folder.exists(NAME)


def test_a_bucket_object_is_uploaded_now_and_then(monkeypatch):
    with gcs_server.serve():
        folder = RunFolder("gs://bucket/run")
        writer = JsonLinesWriter(folder)
        for step in range(5):
            writer.write(step, {})
        assert not folder.exists(NAME)
        writer.flush()
        assert steps(folder) == [0, 1, 2, 3, 4]
        monkeypatch.setattr(json_lines, "_BUCKET_PERIOD_S", 0.0)
        writer.write(5, {})
        assert steps(folder) == [0, 1, 2, 3, 4, 5]
        JsonLinesWriter(folder).truncate(2)
        writer = JsonLinesWriter(folder)
        writer.write(3, {})
        writer.close()
        assert steps(folder) == [0, 1, 2, 3]
