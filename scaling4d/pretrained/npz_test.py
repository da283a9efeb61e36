"""Files of weights that somebody else wrote: whole ones are read to the bit, all others are refused in one line."""

import io
import pathlib
import random
import struct
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling4d.errors import UserError
from scaling4d.models import released
from scaling4d.models.sizes import ModelSize
from scaling4d.pretrained.npz import NpzArrays
from tests import weight_files

TINY = ModelSize("custom", width=4, layers=2, mlp=3, heads=2)
VALUES = weight_files.backbone_values(TINY, (2, 4, 4), (1, 2, 2))
NAME = "processor/layers_1/mlp/dense_in/kernel"
KEY = f"params/{NAME}"


def whole() -> bytes:
    file = io.BytesIO()
    np.savez(file, **{f"params/{name}": VALUES[name] for name in sorted(VALUES)})
    return file.getvalue()


WHOLE = whole()


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All that ``load_backbone`` asks of a file."""
    arrays = NpzArrays(path)
    released.backbone_architecture(arrays.shapes, arrays.source)
    return {name: arrays.read(name) for name in arrays.shapes}


def refused(path: pathlib.Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    assert message.startswith(str(path)), message
    for word in words:
        assert word in message


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def zipped(path: pathlib.Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> pathlib.Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def with_member(path: pathlib.Path, data: bytes, name: str = f"{KEY}.npy") -> pathlib.Path:
    """A good file but for one member, which comes last."""
    good = [(f"params/{other}.npy", npy(array)) for other, array in VALUES.items() if f"params/{other}.npy" != name]
    return zipped(path, [*good, (name, data)])


def test_values_are_those_of_the_file(tmp_path):
    loaded = load(weight_files.write_backbone(tmp_path / "a.npz", VALUES))
    assert loaded.keys() == VALUES.keys()
    for name, array in VALUES.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == np.float32 and loaded[name].flags.c_contiguous


def test_a_readout_lies_under_a_name_of_its_own(tmp_path):
    readout = {"readout/query": np.ones((2, 3), np.float32)}
    arrays = NpzArrays(weight_files.write_depth(tmp_path / "a.npz", VALUES, readout))
    assert arrays.shapes.keys() == VALUES.keys() | readout.keys()
    assert arrays.shapes["readout/query"] == (2, 3)
    np.testing.assert_array_equal(arrays.read(NAME), VALUES[NAME])


# A column is contiguous in both orders, so the kernel of a product is what tells them apart.
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_other_floats_and_orders_are_converted(dtype, order, tmp_path):
    stored = np.asarray(VALUES[NAME], dtype, order=order)
    array = NpzArrays(with_member(tmp_path / "a.npz", npy(stored))).read(NAME)
    np.testing.assert_array_equal(array, stored.astype(np.float32))
    assert array.dtype == np.float32 and array.flags.c_contiguous


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(version, tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array(file, VALUES[NAME], version=version)
    np.testing.assert_array_equal(load(with_member(tmp_path / "a.npz", file.getvalue()))[NAME], VALUES[NAME])


def test_a_shape_without_axes_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.float32(3))
    arrays = NpzArrays(tmp_path / "a.npz")
    assert arrays.shapes == {"x": ()}
    assert arrays.read("x").shape == () and arrays.read("x") == 3


# Types that are no weights.


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_objects_are_refused_and_not_unpickled(tmp_path):
    fuse = tmp_path / "went-off"
    data = npy(np.array([Bomb(fuse)], object))
    refused(with_member(tmp_path / "a.npz", data), KEY, "Python objects; those are never loaded")
    assert not fuse.exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:
        _ = file[KEY]
    assert fuse.exists()  # the payload is alive


STRUCTURED = np.zeros(3, [("a", "f4"), ("b", "O")])
OTHER_TYPES = {
    "integers": np.zeros((4, 3), np.int32),
    "bytes": np.zeros((4, 3), np.uint8),
    "booleans": np.zeros((4, 3), bool),
    "complex": np.zeros((4, 3), np.complex64),
    "text": np.full((4, 3), "weights"),
    "times": np.zeros((4, 3), "M8[s]"),
    "bfloat16 as NumPy writes it": np.zeros((4, 3), "V2"),
    "records": STRUCTURED[["a"]].copy(),
    "records with objects": STRUCTURED,
    "long double": np.zeros((4, 3), np.longdouble),
}


@pytest.mark.parametrize("array", OTHER_TYPES.values(), ids=OTHER_TYPES.keys())
def test_other_types_are_refused(array, tmp_path):
    words = ["is not an array of numbers"] if array.dtype.names else ["has type", "float16, float32 or float64"]
    refused(with_member(tmp_path / "a.npz", npy(array)), KEY, *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [NAME, "encoder/patch_embedding/Conv_0/bias"])
def test_numbers_that_are_not_finite_are_refused(name, value, tmp_path):
    array = VALUES[name].copy()
    array.reshape(-1)[-1] = value
    path = with_member(tmp_path / "a.npz", npy(array), f"params/{name}.npy")
    refused(path, name, "not finite")


@pytest.mark.filterwarnings("error")
def test_numbers_that_float32_cannot_hold_are_refused(tmp_path):
    refused(with_member(tmp_path / "a.npz", npy(np.full((4, 3), 1e300))), KEY, "not finite")


# Headers that lie, or that are programs.


def header(text: str, version: bytes = b"\1\0", data: bytes = bytes(48)) -> bytes:
    text += "\n"
    length = struct.pack("<H" if version == b"\1\0" else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode("latin-1") + data


GOOD_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), }"
HEADERS = {
    "a million million values": GOOD_HEADER.replace("(4, 3)", "(1000000, 1000000)"),
    "more digits than a number has": GOOD_HEADER.replace("(4, 3)", f"({'9' * 5000},)"),
    "fewer values": GOOD_HEADER.replace("(4, 3)", "(4, 2)"),
    "more values": GOOD_HEADER.replace("(4, 3)", "(4, 4)"),
    "no values, endless axes": GOOD_HEADER.replace("(4, 3)", f"(0, {10**14}, {10**14})"),
    "negative": GOOD_HEADER.replace("(4, 3)", "(-4, -3)"),
    "true": GOOD_HEADER.replace("(4, 3)", "(True, 12)"),
    "wider type": GOOD_HEADER.replace("<f4", "<f8"),
    "two orders of bytes": GOOD_HEADER.replace("<f4", "<>f4"),
    "many axes": GOOD_HEADER.replace("(4, 3)", "(4, 3" + ", 1" * 100 + ")"),
    "unknown type": GOOD_HEADER.replace("<f4", "<z9"),
    "type of a type": GOOD_HEADER.replace("<f4", "3<f4,(2,"),
    "no type": "{'fortran_order': False, 'shape': (4, 3), }",
    "a call": GOOD_HEADER.replace("(4, 3)", "exit(4)"),
    "no end": GOOD_HEADER[:-1],
    "keys of two types": "{1: 2, 'descr': '<f4', 'fortran_order': False, 'shape': (4, 3), }",
    "a list as a key": "{[]: 1}",
    "deep brackets": "(" * 9000,
    "deep minus": "-" * 9000 + "1",
    "open text": "{'descr': '''",
    "zero bytes": "\0" * 60,
    "very long": GOOD_HEADER + " " * 20000,
    "empty": "",
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_lie_are_refused(text, tmp_path):
    refused(with_member(tmp_path / "a.npz", header(text)), KEY)


def test_an_array_without_values_is_refused(tmp_path):
    data = header(GOOD_HEADER.replace("(4, 3)", f"(0, {10**14}, {10**14})"), data=b"")
    refused(with_member(tmp_path / "a.npz", data), KEY, "not an array of numbers")


def test_the_header_used_above_is_good_as_it_is(tmp_path):
    assert not load(with_member(tmp_path / "a.npz", header(GOOD_HEADER)))[NAME].any()


RAW = npy(VALUES[NAME])
BEGINNINGS = {
    "nothing": b"",
    "magic alone": RAW[:6],
    "header cut": RAW[:40],
    "no magic": b"PK" + RAW[2:],
    "version 9": header(GOOD_HEADER, b"\x09\0"),
    "header longer than the file": RAW[:8] + b"\xff\xff" + RAW[10:],
    "header longer than memory": b"\x93NUMPY\2\0\xff\xff\xff\xff" + RAW[12:],
    "one value more": RAW + b"1234",
    "one byte less": RAW[:-1],
    "pickle": b"\x80\x04\x95\x10\x00",
}


@pytest.mark.parametrize("data", BEGINNINGS.values(), ids=BEGINNINGS.keys())
def test_members_that_are_no_arrays_are_refused(data, tmp_path):
    refused(with_member(tmp_path / "a.npz", data), KEY)


# Archives that are none, or none of ours.


def test_what_is_no_npz_file_is_refused(tmp_path):
    for number, data in enumerate([b"", b"weights\n", b"PK\3\4", npy(VALUES[NAME]), WHOLE[:-1], WHOLE[1000:2000]]):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(data)
        refused(path, "not an npz file, or one cut short")
    refused(tmp_path, "cannot be read (Is a directory)")
    refused(tmp_path / "none.npz", "no such file")


def test_an_empty_archive_and_foreign_ones_are_refused(tmp_path):
    refused(zipped(tmp_path / "a.npz", []), "not the weights of a 4DS backbone")
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 2), np.float32))
    refused(tmp_path / "b.npz", "not the weights of a 4DS backbone")
    np.savez_compressed(tmp_path / "c.npz", **VALUES)
    refused(tmp_path / "c.npz", "is compressed; write the file again with numpy.savez")
    refused(zipped(tmp_path / "d.npz", [("word/document.xml", b"<xml>")]), "'word/document.xml' is not the name of")


@pytest.mark.parametrize("name", ["params/README.txt", "params/encoder/", "params/a\nb.npy", "params/\x1b[31m.npy",
                                  "params/ü.npy", ".npy", "x" * 300 + ".npy", "params/encoder/x"])
def test_names_that_no_array_has_are_refused(name, tmp_path):
    refused(with_member(tmp_path / "a.npz", npy(VALUES[NAME]), name), "is not the name of an array")


@pytest.mark.parametrize("name", ["params/encoder/extra", "params/processor/layers_1/extra", "params/layers_3/query",
                                  "opt_state/mu"])
def test_arrays_that_no_model_has_are_refused(name, tmp_path):
    refused(with_member(tmp_path / "a.npz", npy(VALUES[NAME]), f"{name}.npy"), "belongs to no known model")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", [KEY, f"params/layers_0/{NAME}", NAME])
def test_a_name_that_is_there_twice_is_refused(name, tmp_path):
    """Also where the two layouts of keys give one array twice."""
    members = [(f"params/{other}.npy", npy(array)) for other, array in VALUES.items()]
    refused(zipped(tmp_path / "a.npz", [*members, (f"{name}.npy", RAW)]), f"'{name}' is there twice")


def test_members_that_share_their_bytes_are_refused(tmp_path):
    """A small file whose directory lists one large array many times, under many names."""
    array = npy(np.zeros(9999, np.float32))
    path = zipped(tmp_path / "a.npz", [("params/1.npy", array), ("params/2.npy", array)])
    data = path.read_bytes()
    second = data.index(b"PK\3\4", 4)
    directory, end = data[data.index(b"PK\1\2") :].split(b"PK\5\6")
    entries = bytearray(directory)
    at = entries.rindex(b"PK\1\2") + 42
    entries[at : at + 4] = bytes(4)  # the second member now lies where the first is
    end = bytearray(b"PK\5\6" + end)
    end[16:20] = struct.pack("<I", second)
    path.write_bytes(data[:second] + entries + end)
    refused(path, "said to be larger than the file")


def test_a_directory_that_claims_more_than_the_file_is_refused(tmp_path):
    data = bytearray(WHOLE)
    sizes = data.rindex(b"PK\1\2") + 20
    data[sizes : sizes + 8] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", "said to be larger than the file")


@pytest.mark.parametrize("offset", [2**31, 2**40, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_member_that_lies_outside_of_the_file_is_refused(offset, tmp_path):
    """Offsets of 8 bytes are in an extra field, whose 4-byte form is then all ones."""
    data, extra = WHOLE, struct.pack("<HHQ", 1, 8, offset)
    entry, end = data.rindex(b"PK\1\2"), data.index(b"PK\5\6")
    last = bytearray(data[entry:end])
    last[30:32] = struct.pack("<H", len(extra))
    last[42:46] = b"\xff" * 4
    tail = bytearray(data[end:])
    tail[12:16] = struct.pack("<I", struct.unpack("<I", tail[12:16])[0] + len(extra))
    (tmp_path / "a.npz").write_bytes(data[:entry] + last + extra + tail)
    refused(tmp_path / "a.npz", "is not where the file says")


def test_a_directory_that_skips_members_is_refused(tmp_path):
    """One wrong byte, the length of a comment: the last block is swallowed, and what is left is a smaller model."""
    data = bytearray(WHOLE)
    last_block = data.index(b"params/processor/layers_1/", data.index(b"PK\1\2")) - 46
    before = data.rindex(b"PK\1\2", 0, last_block)
    end = data.index(b"PK\5\6")
    data[before + 32 : before + 34] = struct.pack("<H", end - last_block)
    (tmp_path / "a.npz").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert len(archive.infolist()) == len(VALUES) - 16
    refused(tmp_path / "a.npz", "does not list as many arrays as it says")


def test_a_comment_at_the_end_does_no_harm(tmp_path):
    path = weight_files.write_backbone(tmp_path / "a.npz", VALUES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"written by hand"
    assert load(path).keys() == VALUES.keys()


def test_encrypted_members_are_refused(tmp_path):
    data = bytearray(WHOLE)
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + flags] |= 1
    start = data.index(b"\x93NUMPY")
    data[start : start + 100] = random.Random(0).randbytes(100)
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", "encoder/patch_embedding/Conv_0/bias")


# Files that were good once.


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    for length in [*range(0, len(WHOLE), 97), *range(len(WHOLE) - 200, len(WHOLE))]:
        path.write_bytes(WHOLE[:length])
        refused(path)


def test_every_flipped_bit_of_an_array_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    start = WHOLE.index(VALUES[NAME].tobytes())
    for position in range(start, start + VALUES[NAME].nbytes):
        for bit in (0, 7):
            data = bytearray(WHOLE)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            refused(path, f"'{KEY}' is damaged: its checksum does not fit")


def test_an_array_cut_short_after_it_was_opened_is_refused(tmp_path):
    path = weight_files.write_backbone(tmp_path / "a.npz", VALUES)
    arrays = NpzArrays(path)
    path.write_bytes(WHOLE[:3000])
    with pytest.raises(UserError, match="checksum does not fit"):
        arrays.read(NAME)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        arrays.read(NAME)


def either_equal_or_refused(path: pathlib.Path) -> None:
    try:
        loaded = load(path)
    except UserError as error:
        assert str(error).isprintable()
        return
    assert loaded.keys() == VALUES.keys()
    assert all(np.array_equal(loaded[name], VALUES[name]) for name in VALUES)


CHANGES = st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4)
DIRECTORY = st.lists(
    st.tuples(st.integers(WHOLE.index(b"PK\1\2"), len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=3
)


@settings(max_examples=300)
@given(changes=st.one_of(CHANGES, DIRECTORY))
def test_changed_bytes_never_change_a_value_unnoticed(changes, tmp_path_factory):
    data = bytearray(WHOLE)
    for position, value in changes:
        data[position] = value
    path = tmp_path_factory.getbasetemp() / "changed.npz"
    path.write_bytes(data)
    either_equal_or_refused(path)


def test_pieces_that_move_never_change_a_value_unnoticed(tmp_path):
    """Pieces cut out, doubled, or copied over others: lengths and offsets stop fitting."""
    rng, path = random.Random(1), tmp_path / "a.npz"
    for _ in range(400):
        a, b, length = rng.randrange(len(WHOLE)), rng.randrange(len(WHOLE)), rng.choice([1, 4, 30, 100, 1000])
        cut = WHOLE[:a] + WHOLE[a + length :]
        doubled = WHOLE[: a + length] + WHOLE[a:]
        copied = (WHOLE[:b] + WHOLE[a : a + length] + WHOLE[b + length :])[: len(WHOLE)]
        path.write_bytes(rng.choice([cut, doubled, copied]))
        either_equal_or_refused(path)


def test_a_hostile_file_takes_no_longer_than_a_good_one(tmp_path):
    """Headers are matched, not searched: a shape of very many axes is no trap."""
    data = header(GOOD_HEADER.replace("(4, 3)", "(" + "1, " * 3000 + "!)"))
    start = time.monotonic()
    refused(with_member(tmp_path / "a.npz", data), KEY)
    assert time.monotonic() - start < 2
