import io
import pathlib
import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from scaling4d.data import decode, mp4_track
from scaling4d.data.decode import BadClip, ClipSettings, decode_clip
from scaling4d.data.mp4_track import read_track
from scaling4d.data.order import Draws
from scaling4d.mp4 import encode_i420
from tests import shared_data
from tests.clip_sets import encode_coded_clip, to_i420
from tests.video_files import coded_frame, read_code

ALL = ClipSettings(frames=24, size=32, stride=1, crop="center")


def demuxed(data: bytes) -> list[tuple[int, bool, bytes]]:
    """(time stamp, whether it is a keyframe, coded bytes) of each frame, as FFmpeg's demuxer has them."""
    with av.open(io.BytesIO(data)) as container:
        packets = container.demux(container.streams.video[0])
        return [(packet.pts, packet.is_keyframe, bytes(packet)) for packet in packets if packet.pts is not None]


def remuxed(path_or_file, directory: pathlib.Path, format: str = "mp4", frames: int = 200, **options: str) -> bytes:
    """The first coded frames of a video, in another container."""
    target = directory / "remuxed"
    with av.open(path_or_file) as source, av.open(str(target), "w", format=format, options=options) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        packets = (packet for packet in source.demux(stream) if packet.dts is not None)
        for _, packet in zip(range(frames), packets, strict=False):
            packet.stream = copy
            container.mux(packet)
    return target.read_bytes()


def assert_agrees_with_ffmpeg(data: bytes) -> None:
    track, expected = read_track(data), demuxed(data)
    assert [data[begin:end] for begin, end in track.samples] == [coded for _, _, coded in expected]
    times = sorted(time for time, _, _ in expected)
    assert track.numbers == [times.index(time) for time, _, _ in expected]
    assert track.keys == [sample for sample, (_, key, _) in enumerate(expected) if key]


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}, {"movflags": "negative_cts_offsets"}])
@pytest.mark.parametrize("gop", [1, 7, 40])
def test_samples_numbers_and_keyframes_are_those_of_the_demuxer(gop, options, tmp_path):
    frames = [to_i420(coded_frame(number, 7, 48, 64)) for number in range(40)]
    data = remuxed(io.BytesIO(encode_i420(frames, Fraction(30000, 1001), crf=23, gop=gop)), tmp_path, **options)
    assert_agrees_with_ffmpeg(data)
    track = read_track(data)
    assert (track.width, track.height) == (64, 48) and len(track.keys) >= -(-40 // gop)


@pytest.mark.parametrize("name", ["sam2_dog.mp4", "vda_tokyo_walk.mp4", "decord_flipping_a_pancake.mkv"])
def test_real_videos_agree_with_the_demuxer(name, tmp_path):
    assert_agrees_with_ffmpeg(remuxed(str(shared_data.videos() / name), tmp_path))


def test_other_tracks_are_passed_over():
    """A second stream beside the video, before it."""
    target = io.BytesIO()
    sound = encode_coded_clip(24, source=3)
    with av.open(io.BytesIO(sound)) as source, av.open(target, "w", format="mp4") as container:
        other = container.add_stream("mpeg4", rate=24)
        other.width, other.height, other.pix_fmt = 64, 48, "yuv420p"
        copy = container.add_stream_from_template(source.streams.video[0])
        container.mux(other.encode(av.VideoFrame(64, 48, "yuv420p")))
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                container.mux(packet)
        container.mux(other.encode(None))
    video = decode_clip(target.getvalue(), 24, ALL, Draws(0, 0))
    assert np.array_equal(video, decode_clip(sound, 24, ALL, Draws(0, 0)))


def test_fragments_other_codecs_and_other_containers_are_refused(tmp_path):
    sound = encode_coded_clip(24, source=1)
    with pytest.raises(ValueError, match="0 frames"):
        read_track(remuxed(io.BytesIO(sound), tmp_path, movflags="frag_keyframe+empty_moov"))
    with pytest.raises(ValueError):
        read_track(remuxed(io.BytesIO(sound), tmp_path, format="matroska"))
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no H.264"):
        read_track(target.getvalue())


def test_damaged_boxes_raise_value_errors_only():
    """Whatever the tables say, nothing is read outside the file and no table is longer than the bound."""
    sound = encode_coded_clip(24, source=1)
    movie = sound.index(b"moov") - 4
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(3000):
        damaged = bytearray(sound)
        place = int(rng.integers(movie, len(sound) - 4))
        damaged[place : place + 4] = rng.bytes(4) if trial % 2 else [b"\0\0\0\0", b"\xff" * 4, b"\0\0\0\1"][trial % 3]
        if trial % 5 == 0:
            del damaged[int(rng.integers(len(sound))) :]
        try:
            track = read_track(bytes(damaged))
        except ValueError:
            refused += 1
        else:
            count = len(track.samples)
            assert 1 <= count <= mp4_track.MAX_SAMPLES
            assert all(0 <= begin <= end <= len(damaged) for begin, end in track.samples)
            assert sorted(track.numbers) == [*range(count)]
            assert track.keys == sorted(set(track.keys)) and all(0 <= key < count for key in track.keys)
    assert refused > 1000


def test_a_file_of_empty_boxes_is_left_soon():
    with pytest.raises(ValueError, match="boxes side by side"):
        read_track(struct.pack(">I4s", 8, b"free") * 100_000)


def test_the_coded_size_is_bounded_whatever_the_container_says(monkeypatch):
    """A container that says 16 x 16 of a larger video."""
    sound = encode_coded_clip(24, source=1)
    place = sound.index(b"avc1", sound.index(b"stsd")) + 4 + 24
    lying = sound[:place] + struct.pack(">HH", 16, 16) + sound[place + 4 :]
    assert (read_track(lying).width, read_track(lying).height) == (16, 16)
    assert decode_clip(lying, 24, ALL, Draws(0, 0)).shape == (24, 32, 32, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 64 * 64)
    with pytest.raises(BadClip):
        decode_clip(lying, 24, ALL, Draws(0, 0))


def test_frames_are_not_lost_where_the_stream_does_not_say_how_far_they_are_reordered():
    """Other encoders leave the reordering depth out of the parameter sets; FFmpeg alone then drops frames."""
    sound = encode_coded_clip(40, source=9)
    place = sound.index(b"avcC") + 4
    [length] = struct.unpack_from(">H", sound, place + 6)
    begin, end = place + 8, place + 8 + length
    bits = "".join(f"{byte:08b}" for byte in sound[begin:end])
    # At the end: the flag, one bit, two times Exp-Golomb 0, two vector ranges, depth, buffer size, stop bit, padding.
    golomb = r"(?:1|01.|001..|0001...)"
    found = re.search(f"1(111{golomb}{{4}})10*$", bits)
    assert found is not None
    bits = (bits[: found.start()] + "01").ljust(len(bits), "0")
    silent = sound[:begin] + int(bits, 2).to_bytes(length, "big") + sound[end:]
    frames = list(decode._decode_frames(silent, frozenset(range(40))))
    assert [number for number, _ in frames] == [*range(40)]
    assert all(read_code(frame.to_ndarray(format="rgb24")) == (number, 9) for number, frame in frames)
