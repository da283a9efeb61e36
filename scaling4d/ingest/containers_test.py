import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling4d.ingest.containers import is_container, missing_bytes
from tests.video_files import coded_video, write_video

KINDS = {
    "a.mp4": {},
    "fragmented.mp4": {"codec": "libx264"},
    "b.mov": {},
    "c.m4v": {},
    "d.mkv": {},
    "e.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8"}},
    "f.avi": {"codec": "mpeg4"},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_complete_file_misses_nothing_and_a_cut_one_does(tmp_path, name):
    data = write_video(tmp_path / name, coded_video(8), **KINDS[name]).read_bytes()
    assert is_container(data[:12])
    assert missing_bytes(io.BytesIO(data)) == 0
    for cut in (1, len(data) // 3, len(data) // 2):
        if missing_bytes(io.BytesIO(data[:-cut])) != cut:
            # The cut is in a box that came after a whole one: then the index is gone, which opening notices.
            assert name.endswith((".mp4", ".mov", ".m4v")) and b"moov" not in data[:-cut]
    assert missing_bytes(io.BytesIO(data + b"\x00" * 100)) == 0


def test_a_stream_of_unknown_length_is_taken_as_it_is():
    unknown = b"\x1a\x45\xdf\xa3\x84abcd" + b"\x18\x53\x80\x67\x01" + b"\xff" * 7
    known = b"\x1a\x45\xdf\xa3\x84abcd" + b"\x18\x53\x80\x67\x01" + (1000).to_bytes(7, "big")
    assert missing_bytes(io.BytesIO(unknown + b"x" * 10)) == 0
    assert missing_bytes(io.BytesIO(known + b"x" * 10)) == 990


@pytest.mark.parametrize(
    "head", [b"", b"x", b"plain text, really", b"\x89PNG\r\n\x1a\n....", b"RIFF\x00\x00\x00\x00WAVE"]
)
def test_other_files_are_no_containers(head):
    assert not is_container(head[:12])
    assert missing_bytes(io.BytesIO(head)) == 0


@given(
    st.sampled_from(
        [b"", b"\x1a\x45\xdf\xa3", b"\x00\x00\x00\x18ftyp", b"\x00\x00\x00\x01mdat", b"RIFF\x00\x00\x01\x00AVI "]
    ),
    st.binary(max_size=200),
)
def test_no_bytes_break_the_reading(start, rest):
    assert missing_bytes(io.BytesIO(start + rest)) >= 0
