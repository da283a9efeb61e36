"""Records as TensorFlow writes them, with JPEG frames that carry their number."""

import pathlib

import cv2
import numpy as np
import pytest

from scaling4d.data.clips import BAD_DECODE, GOOD, decode_fields, load_clip
from scaling4d.data.decode import BadClip, ClipSettings
from scaling4d.data.jpeg_clips import JpegClips, decode_jpeg_clip, jpeg_size, parse_jpeg_clip
from scaling4d.data.order import Draws
from scaling4d.data.records import BadRecord, decode_index, encode_index
from scaling4d.ingest.scan import scan_lengths
from tests.sequence_examples import jpeg, sequence_example, write_shard
from tests.video_files import coded_video, read_code

EVAL = ClipSettings(frames=4, size=96, stride=2, crop="center")


def opened(path: pathlib.Path) -> JpegClips:
    return JpegClips([(path, decode_index(encode_index(scan_lengths(path)), "index"))])


@pytest.fixture
def records(tmp_path) -> JpegClips:
    return opened(write_shard(tmp_path / "a.tfrecord", [sequence_example(12, number) for number in range(5)]))


def decoded(records, record: int, settings: ClipSettings, index: int = 0) -> np.ndarray:
    return decode_fields(records, records.read(record), settings, [Draws(0, index)])[0]


def test_fields_have_the_names_of_our_own_records(records):
    fields = records.read(3)
    assert len(records) == 5 and len(fields["video"]) == fields["frames"] == 12
    assert {name: fields[name] for name in ("source", "start_us", "fps", "width", "height")} == {
        "source": b"videos/3.mp4",
        "start_us": 3_000_000,
        "fps": 10.0,
        "width": 160,
        "height": 96,
    }
    assert fields["clip/label/text"] == b"jumping"


def test_the_frames_are_those_of_the_window_and_the_colors_right(records):
    square = ClipSettings(frames=4, size=96, stride=2, crop="random", scale=(1, 1), ratio=(160 / 96, 160 / 96))
    video = decoded(records, 2, square)
    starts = [read_code(frame)[0] for frame in video]
    assert starts == [starts[0] + 2 * step for step in range(4)]
    assert [read_code(frame)[1] for frame in video] == [2] * 4
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    fields = parse_jpeg_clip(sequence_example(pictures=[jpeg(red)] * 4))
    [out] = decode_jpeg_clip(fields, ClipSettings(frames=4, size=32, stride=1, crop="center"), [Draws(0, 0)])
    assert np.allclose(out.mean(axis=(0, 1, 2)), [200, 0, 0], atol=6)


def test_crop_and_window_are_those_of_our_own_clips(records, tmp_path):
    """The same source as mp4 and as JPEG gives nearly the same example for the same draws."""
    from tests.clip_sets import encode_coded_clip

    class Own:
        """A source of mp4 records."""

    settings = ClipSettings(frames=4, size=64, stride=2, scale=(0.3, 1.0))
    for index in range(6):
        own = {"video": encode_coded_clip(12, 4), "frames": 12}
        [mp4] = decode_fields(Own(), own, settings, [Draws(7, index)])
        [pictures] = decode_fields(records, records.read(4), settings, [Draws(7, index)])
        assert np.abs(mp4.astype(int) - pictures).mean() < 4


def test_one_record_gives_several_examples_in_one_pass(records):
    settings = ClipSettings(frames=4, size=48, stride=(1, 2))
    together = decode_fields(records, records.read(1), settings, [Draws(0, index) for index in range(3)])
    for index, video in enumerate(together):
        assert np.array_equal(video, decoded(records, 1, settings, index))


def test_bad_pictures_are_bad_clips(tmp_path):
    good = [jpeg(frame) for frame in coded_video(8)]
    wide = jpeg(coded_video(1, width=200)[0])
    cut = good[3][: good[3].index(b"\xff\xda")]
    for what, picture in (("no JPEG", b"nothing"), ("no JPEG", b""), ("size", wide), ("cannot be", cut)):
        pictures = [*good[:3], picture, *good[4:]]
        fields = parse_jpeg_clip(sequence_example(pictures=pictures))
        with pytest.raises(BadClip, match=what):
            decode_jpeg_clip(fields, ClipSettings(frames=8, size=32, stride=1, crop="center"), [Draws(0, 0)])
    huge = bytearray(good[0])
    place = huge.index(b"\xff\xc0") + 5
    huge[place : place + 4] = b"\xff\xff\xff\xff"
    with pytest.raises(BadClip, match="65535 x 65535"):
        decode_jpeg_clip({"video": [bytes(huge)]}, ClipSettings(frames=1, size=32, crop="center"), [Draws(0, 0)])


def test_a_bad_record_is_replaced_as_any_other(tmp_path):
    examples = [sequence_example(12, number) for number in range(6)]
    examples[2] = sequence_example(pictures=[b"no picture"] * 12)
    records = opened(write_shard(tmp_path / "a.tfrecord", examples))
    clips = [load_clip(records, index, seed=0, order="sequential", settings=EVAL) for index in range(6)]
    assert [clip.bad for clip in clips] == [GOOD, GOOD, BAD_DECODE, GOOD, GOOD, GOOD]
    assert all(clip.weight == 1 for clip in clips)


def test_records_that_are_no_such_clips_are_bad(tmp_path):
    path = write_shard(tmp_path / "a.tfrecord", [sequence_example(pictures=[]), b"\xff\xff\xff", sequence_example(3)])
    records = opened(path)
    for record, what in ((0, "no feature list 'image/encoded'"), (1, "not a tf.train.SequenceExample")):
        with pytest.raises(BadRecord, match=what):
            records.read(record)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadRecord, match="CRC of the data fails"):
        opened(path).read(2)


def test_pictures_are_not_turned_by_their_exif_data():
    frame = coded_video(1)[0]
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    data = jpeg(frame)
    turned = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (160, 96)
    assert jpeg_size(turned) == (96, 160)
    fields = parse_jpeg_clip(sequence_example(pictures=[turned]))
    whole = ClipSettings(frames=1, size=96, crop="random", scale=(1, 1), ratio=(160 / 96, 160 / 96))
    [video] = decode_jpeg_clip(fields, whole, [Draws(0, 0)])
    assert read_code(video[0]) == (0, 0)


def test_sizes_of_odd_files():
    assert jpeg_size(b"") is None and jpeg_size(b"\xff\xd8\xff") is None and jpeg_size(b"\xff\xd8" + b"\0" * 50) is None
    progressive = cv2.imencode(".jpg", np.zeros((30, 41, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    assert jpeg_size(progressive) == (30, 41)
