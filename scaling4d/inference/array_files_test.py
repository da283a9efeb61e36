import errno
import io
import itertools
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from scaling4d.inference.array_files import FORMATS, read_note, write_arrays
from scaling4d.inference.spool import Spool

NOTE = {"video": "straße/übung.mp4", "clip": [16, 224, 224], "fps": None}


@pytest.fixture
def arrays(tmp_path):
    values = np.random.default_rng(0).normal(size=(150_003, 33)).astype(np.float16)  # more than one piece
    with Spool(tmp_path, (33,), np.float16) as spool:
        for part in np.array_split(values, 7):
            spool.append(part)
        yield {"features": spool, "seconds": np.arange(5.0), "table": values.astype(np.float32)[:, ::3]}


def expected(arrays):
    return {name: array[:] for name, array in arrays.items()}


def test_numpy_reads_the_npz_without_pickles(tmp_path, arrays):
    with open(tmp_path / "a.npz", "wb") as file:
        write_arrays(file, arrays, NOTE, "npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        assert sorted(stored.files) == ["features", "metadata", "seconds", "table"]
        for name, values in expected(arrays).items():
            assert stored[name].dtype == values.dtype and np.array_equal(stored[name], values)
    assert read_note(tmp_path / "a.npz") == NOTE


def test_the_library_reads_the_safetensors(tmp_path, arrays):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        write_arrays(file, arrays, NOTE, "safetensors")
    stored = load_file(path)
    assert stored.keys() == arrays.keys()
    for name, values in expected(arrays).items():
        assert stored[name].dtype == values.dtype and np.array_equal(stored[name], values)
    with safe_open(path, "numpy") as opened:
        assert "straße" in opened.metadata()["metadata"].encode().decode("unicode_escape")
    assert read_note(path) == NOTE


@pytest.mark.parametrize("format", FORMATS)
def test_equal_arrays_give_equal_bytes(arrays, format):
    files = []
    for _ in range(2):
        files.append(io.BytesIO())
        write_arrays(files[-1], arrays, NOTE, format)
    assert files[0].getvalue() == files[1].getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_and_foreign_files_have_no_note(tmp_path, arrays, format):
    path = tmp_path / f"a.{format}"
    assert read_note(path) is None
    with open(path, "wb") as file:
        write_arrays(file, arrays, NOTE, format)
    whole = path.read_bytes()
    for damaged in (b"", b"x" * 100, whole[:5], whole[:200], whole[:-30], b"{}" * 50):
        path.write_bytes(damaged)
        assert read_note(path) is None
    np.savez(tmp_path / "a.npz", features=np.zeros(3))
    assert read_note(tmp_path / "a.npz") is None
    np.save(tmp_path / "b.npy", np.zeros(3))
    os.replace(tmp_path / "b.npy", tmp_path / "a.npz")
    assert read_note(tmp_path / "a.npz") is None


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error(tmp_path, arrays, format):
    class Full(io.BytesIO):
        """Seekable, as a file is; full after some bytes."""

        def write(self, data):
            if self.tell() > 100_000:
                raise OSError(errno.ENOSPC, "full")
            return super().write(data)

    with pytest.raises(OSError):
        write_arrays(Full(), arrays, NOTE, format)


def test_a_spool_gives_back_what_it_took_and_leaves_nothing(tmp_path):
    values = np.arange(1000 * 6, dtype=np.float32).reshape(1000, 2, 3)
    with Spool(tmp_path, (2, 3), np.float32) as spool:
        for first, last in itertools.pairwise([0, 1, 1, 400, 1000]):
            spool.append(values[first:last])
            assert np.array_equal(spool[:], values[:last]) and len(spool) == last
            assert np.array_equal(spool[:1], values[:1])  # reading does not disturb writing
        assert np.array_equal(spool[990:2000], values[990:]) and spool[2000:].shape == (0, 2, 3)
        assert np.array_equal(spool.vectors(np.array([1999, 3, 0])), values.reshape(-1, 3)[[1999, 3, 0]])
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ValueError, match="float64"):
            spool.append(values.astype(np.float64))


def test_a_spool_is_read_in_pieces_of_bounded_size(tmp_path):
    with Spool(tmp_path, (1 << 20,), np.uint8) as spool:
        for number in range(20):
            spool.append(np.full((1, 1 << 20), number, np.uint8))
        pieces = list(spool.pieces())
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    assert [int(row[0]) for piece in pieces for row in piece] == list(range(20))
