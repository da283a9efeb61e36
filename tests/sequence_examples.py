"""Shards of SequenceExamples with JPEG frames, written by TensorFlow: what other programs make."""

import pathlib
from collections.abc import Sequence

import cv2
import numpy as np

from scaling4d.data.tensorflow_setup import tf
from tests.video_files import coded_video


def jpeg(frame: np.ndarray) -> bytes:
    """RGB uint8 [height, width, 3] as a JPEG file."""
    return cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()


def sequence_example(frames: int = 8, source: int = 0, *, pictures: Sequence[bytes] | None = None) -> bytes:
    """A record of frames that carry (number, source), 10 a second, beginning at second ``source`` of its video."""
    if pictures is None:
        pictures = [jpeg(frame) for frame in coded_video(frames, source)]
    example = tf.train.SequenceExample()
    for picture in pictures:
        example.feature_lists.feature_list["image/encoded"].feature.add().bytes_list.value.append(picture)
    context = example.context.feature
    context["video/filename"].bytes_list.value.append(b"videos/%d.mp4" % source)
    context["clip/start/timestamp"].int64_list.value.append(source * 1_000_000)
    context["clip/end/timestamp"].int64_list.value.append(source * 1_000_000 + len(pictures) * 100_000)
    context["clip/label/text"].bytes_list.value.append(b"jumping")
    context["clip/label/index"].int64_list.value.append(7)
    return example.SerializeToString()


def write_shard(path: pathlib.Path, examples: Sequence[bytes]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            writer.write(example)
    return path
