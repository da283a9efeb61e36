"""Data sets of clips that tests write without ingesting videos."""

import pathlib
from fractions import Fraction

import numpy as np

from scaling4d.data.manifest import MANIFEST_NAME, Manifest, Split
from scaling4d.ingest.clips import EncodedClip
from scaling4d.ingest.shards import SpoolWriter, plan_shards, write_shard
from scaling4d.mp4 import encode_i420
from tests.video_files import coded_frame


def to_i420(rgb: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3] as I420 uint8 [height * 3 / 2, width] (BT.601, limited range)."""
    import cv2

    return cv2.cvtColor(rgb, cv2.COLOR_RGB2YUV_I420)


def encode_coded_clip(frames: int, source: int, *, height: int = 96, width: int = 160, first: int = 0) -> bytes:
    """The mp4 of a clip whose frames carry (number, source); see ``video_files.coded_frame``."""
    pixels = [to_i420(coded_frame(first + number, source, height, width)) for number in range(frames)]
    return encode_i420(pixels, Fraction(24), crf=23, gop=16)


def write_clip_set(
    directory: pathlib.Path, *, train: int = 20, validation: int = 6, frames: int = 40, shard_clips: int = 8
) -> Manifest:
    """Writes a data set in which clip ``i`` of a split carries source number ``i`` (validation: 100 + i)."""
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count, offset in (("train", train, 0), ("validation", validation, 100)):
        spools = []
        for number in range(count):
            writer = SpoolWriter(directory / f"spool-{split}-{number}", f"{split}/{number:03d}.mp4")
            video = encode_coded_clip(frames, offset + number)
            writer.add(EncodedClip(0, 0, 24.0, frames, 160, 96, video))
            spools.append(writer.finish())
        shards = tuple(write_shard(directory, plan) for plan in plan_shards(split, enumerate(spools), shard_clips))
        seconds = round(sum(spool.seconds for spool in spools), 3)
        splits[split] = Split(count, count * frames, count, seconds, shards)
        for spool in spools:
            spool.path.unlink()
    manifest = Manifest({}, {}, train + validation, "", splits=splits)
    (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
