"""The clips that ``bench_data.py`` reads: records of 32 and of 64 frames, JPEG records of the former, and mp4 files.

Responsible for: making them once in a folder, from a folder of videos or from the procedural world. Not responsible
for: measuring. Runs in our environment: ``python sets.py WORK (--videos FOLDER | --count N)``.
"""

import argparse
import io
import pathlib
import subprocess
import sys

LENGTHS = (32, 64)
JPEG_QUALITY = 85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--videos", type=pathlib.Path, help="folder of videos; without it procedural ones are made")
    parser.add_argument("--count", type=int, help="how many of those")
    flags = parser.parse_args()
    videos = flags.videos
    if videos is None:
        videos = flags.work / "videos"
        scaling4d("synth", f"--output={videos}", f"--count={flags.count}", "--size=256", "--frames=64")
    for length in LENGTHS:
        # Whole clips only, so that every clip costs the full window.
        lengths = (f"--frames={length}", f"--min_frames={length}")
        output = flags.work / f"h264-{length}"
        scaling4d("ingest", f"--input={videos}", f"--output={output}", "--holdout=0", *lengths)
        write_files(output, flags.work / f"mp4-{length}")
    write_jpeg(flags.work / "h264-32", flags.work / "jpeg-32")
    scaling4d("ingest", f"--index={flags.work / 'jpeg-32'}")


def scaling4d(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "scaling4d.main", *arguments], check=True, stdout=sys.stderr)


def read(directory: pathlib.Path) -> list[dict]:
    from scaling4d.data.manifest import open_split, read_manifest

    records = open_split(directory, read_manifest(directory), "train")
    return [records.read(number) for number in range(len(records))]


def write_files(directory: pathlib.Path, output: pathlib.Path) -> None:
    """Each clip as a file, for loaders that know no records."""
    output.mkdir(exist_ok=True)
    for number, fields in enumerate(read(directory)):
        (output / f"{number:05d}.mp4").write_bytes(fields["video"])


def write_jpeg(directory: pathlib.Path, output: pathlib.Path) -> None:
    """The same clips with a JPEG picture for each frame, as DMVR writes them."""
    import av
    import cv2

    from scaling4d.data.tensorflow_setup import tf

    output.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(output / "train-00000.tfrecord")) as writer:
        for fields in read(directory):
            example = tf.train.SequenceExample()
            example.context.feature["video/filename"].bytes_list.value.append(fields["source"])
            pictures = example.feature_lists.feature_list["image/encoded"].feature
            with av.open(io.BytesIO(fields["video"])) as container:
                for frame in container.decode(video=0):
                    bgr = frame.to_ndarray(format="bgr24")
                    coded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
                    pictures.add().bytes_list.value.append(coded.tobytes())
            writer.write(example.SerializeToString())


if __name__ == "__main__":
    main()
