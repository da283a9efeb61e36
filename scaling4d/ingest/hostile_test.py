"""Files made to use up a machine: none takes more than the memory and the time that a worker has."""

import pathlib
import struct
import threading
import time

import av
import pytest

from scaling4d.ingest import media
from scaling4d.ingest.clips import encode_file
from scaling4d.ingest.media import MediaError, MediaLimits
from scaling4d.ingest.sandbox import Limits
from scaling4d.ingest.settings import IngestSettings
from tests.video_files import coded_frame, coded_video, write_video

HEIGHT, WIDTH, FRAMES = 1152, 2048, 6_000


@pytest.fixture(scope="module")
def bomb(tmp_path_factory) -> pathlib.Path:
    """A WebM of half a megabyte that decodes to 21 GB: one still picture, then "nothing changed", again and again."""
    folder = tmp_path_factory.mktemp("bomb")
    still = [coded_frame(1, 1, HEIGHT, WIDTH)] * 2
    options = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "error-resilient": "1"}
    write_video(folder / "two.webm", still, codec="libvpx-vp9", options=options)
    with av.open(str(folder / "two.webm")) as two:
        key, same = (bytes(packet) for packet in two.demux(video=0) if packet.size)
        with av.open(str(folder / "bomb.webm"), "w") as container:
            stream = container.add_stream_from_template(two.streams.video[0])
            for number in range(FRAMES):
                packet = av.Packet(same if number else key)
                packet.stream, packet.time_base = stream, two.streams.video[0].time_base
                packet.pts = packet.dts = number * 40
                packet.is_keyframe = not number
                container.mux(packet)
    return folder / "bomb.webm"


def reason(items) -> str:
    with pytest.raises(MediaError) as error:
        for _ in items:
            pass
    return error.value.reason


def test_a_tiny_file_of_very_many_frames_is_ended_in_time(bomb):
    assert bomb.stat().st_size < 1 << 20
    began = time.monotonic()
    limits = MediaLimits(process=Limits(seconds=1))
    assert reason(encode_file(bomb, IngestSettings(), limits)) == "timeout"
    assert time.monotonic() - began < 20


def test_a_device_that_never_ends_is_no_file(tmp_path):
    (tmp_path / "zeros.mp4").symlink_to("/dev/zero")
    assert reason(media.frames(tmp_path / "zeros.mp4")) == "unreadable"


def test_very_many_frames_are_ended_by_their_number(bomb, tmp_path):
    assert reason(media.frames(bomb, short_side=16, limits=MediaLimits(frames=50))) == "too_large"
    slow = write_video(tmp_path / "slow.mkv", coded_video(2), fps=1, times=[0, 3])
    assert len(list(media.frames(slow))) == 2
    # Repeated to reach a frame rate, they count too.
    assert reason(media.frames(slow, fps=240, limits=MediaLimits(frames=50))) == "too_large"


def test_clips_that_do_not_fit_into_memory_end_the_file(bomb):
    limits = MediaLimits(process=Limits(memory_bytes=400 << 20))
    settings = IngestSettings(short_side=HEIGHT, frames=1024, cut_threshold=None)
    assert reason(encode_file(bomb, settings, limits)) == "memory"


@pytest.mark.parametrize("count", [2**20, 2**28, 2**31 - 1])
def test_a_table_that_promises_very_many_frames_costs_no_more_than_the_limits(tmp_path, count):
    data = bytearray(write_video(tmp_path / "a.mp4", coded_video(3)).read_bytes())
    place = data.index(b"stsz") + 8  # after its version: the size of all samples, and how many there are
    struct.pack_into(">II", data, place, 1, count)
    place = data.index(b"stts") + 8  # how many runs, then of each its samples and the time of one
    struct.pack_into(">I", data, place + 4, count)
    place = data.index(b"stsc") + 8  # of each run of chunks the first, and its samples
    struct.pack_into(">I", data, place + 8, count)
    (tmp_path / "b.mp4").write_bytes(data)
    began = time.monotonic()
    limits = MediaLimits(process=Limits(memory_bytes=600 << 20, seconds=5))
    assert reason(media.frames(tmp_path / "b.mp4", limits=limits)) in ("memory", "corrupt", "no_frames")
    assert time.monotonic() - began < 60


def test_a_file_that_grows_while_it_is_read_ends(tmp_path):
    """An endless stream under the name of a file, as a recorder or a hostile program writes it."""
    once = write_video(tmp_path / "once.mpg", coded_video(24), codec="mpeg1video").read_bytes()
    (tmp_path / "grows.mp4").write_bytes(once * 4)
    done = threading.Event()

    def grow() -> None:
        with open(tmp_path / "grows.mp4", "ab") as file:
            while not done.wait(0.001):
                file.write(once)
                file.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        found = reason(media.frames(tmp_path / "grows.mp4", limits=MediaLimits(frames=400, process=Limits(seconds=1))))
    finally:
        done.set()
        writer.join()
    assert found in ("timeout", "too_large")
