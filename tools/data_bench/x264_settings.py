"""What other x264 settings would cost and give: ``python tools/data_bench/x264_settings.py SET [--every 7]``.

Responsible for: encoding clips of a data set again, each as ingest does but for one setting, and printing bytes, CPU
time of an example and distance from the pixels that were encoded. Not responsible for: what ingest does (``mp4.py``).
The clips were encoded once already, so distances are larger for fresh footage.
"""

import argparse
import io
import pathlib
import sys
import time
from fractions import Fraction
from unittest import mock

import av
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from scaling4d import mp4  # noqa: E402
from scaling4d.data.decode import ClipSettings, decode_clip  # noqa: E402
from scaling4d.data.manifest import open_split, read_manifest  # noqa: E402
from scaling4d.data.order import Draws  # noqa: E402

SETTINGS = {
    "as ingest": "",
    "CABAC": "cabac=1",
    "no deblocking": "no-deblock=1",
    "no deblocking, no weighted prediction": "no-deblock=1:weightb=0:weightp=0",
    "no references among B-frames": "b-pyramid=none",
    "every second frame a B-frame": "bframes=1:b-adapt=0",
    "no B-frames": "bframes=0",
    "one reference frame": "ref=1",
}
CRF, GOP = 23, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="folder of clip records")
    parser.add_argument("--every", type=int, default=7, help="take every n-th clip")
    parser.add_argument("--rounds", type=int, default=4)
    flags = parser.parse_args()
    records = open_split(flags.set, read_manifest(flags.set), "train")
    clips = [decoded(records.read(number)["video"]) for number in range(0, len(records), flags.every)]

    usual = [mp4.encode_i420(frames, rate, crf=CRF, gop=GOP) for frames, rate in clips]
    print("| x264 | bytes | CPU of an example | PSNR, dB |")
    print("|---|---|---|---|")
    for name, parameters in SETTINGS.items():
        videos = [encoded(frames, rate, parameters) for frames, rate in clips]
        spent = [0.0, 0.0]
        for turn in range(flags.rounds):
            for number, pair in enumerate(zip(usual, videos, strict=True)):
                for which, video in enumerate(pair):  # in turns, so that a busy machine slows both
                    began = time.thread_time()
                    decode_clip(video, len(clips[number][0]), ClipSettings(), Draws(turn, number))
                    spent[which] += time.thread_time() - began
        size = sum(map(len, videos)) / sum(map(len, usual))
        distance = np.mean([psnr(video, frames) for video, (frames, _) in zip(videos, clips, strict=True)])
        print(f"| {name} | {size:.2f} | {spent[1] / spent[0]:.2f} | {distance:.1f} |", flush=True)


def decoded(video: bytes) -> tuple[list[np.ndarray], Fraction]:
    """The I420 frames of a video and their rate."""
    with av.open(io.BytesIO(video)) as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
        return frames, container.streams.video[0].average_rate


def encoded(frames: list[np.ndarray], rate: Fraction, parameters: str) -> bytes:
    joined = ":".join(filter(None, (mp4._X264["x264-params"], parameters)))
    with mock.patch.dict(mp4._X264, {"x264-params": joined}):
        return mp4.encode_i420(frames, rate, crf=CRF, gop=GOP)


def psnr(video: bytes, frames: list[np.ndarray]) -> float:
    pairs = zip(decoded(video)[0], frames, strict=True)
    return 10 * np.log10(255**2 / np.mean([np.square(a.astype(np.float32) - b).mean() for a, b in pairs]))


if __name__ == "__main__":
    main()
