"""Depth of a whole video, as a video to look at or as numbers.

Responsible for: running a depth model over a video and writing one file. Not responsible for: the model
(``pretrained/depth.py``), windows (``windows.py``) or flags (``depth_cli.py``).

The video is that of the released demo: left the frames as the model sees them, right their depth in gray, divided by
the largest depth of the whole video, so that white is far. Depth below 0, which a linear layer may give, is drawn
black. Windows do not know of each other: depth may jump from one to the next.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from scaling4d.errors import UserError
from scaling4d.inference.array_files import write_arrays
from scaling4d.inference.features import expected_frames
from scaling4d.inference.movie import Movie
from scaling4d.inference.outputs import writing
from scaling4d.inference.progress import Progress
from scaling4d.inference.spool import Spool
from scaling4d.inference.windows import Batch, Interrupted, computed, open_batches
from scaling4d.ingest import media
from scaling4d.ingest.media import MediaError, MediaLimits
from scaling4d.ingest.sources import Source, printable
from scaling4d.models.patches import Grid

DEMO_FPS = 20.0
_FRAMES_AT_ONCE = 32
_BINS = 1 << 16


class VideoDepthModel(Protocol):
    """What is needed of a ``pretrained.depth.DepthModel``."""

    @property
    def clip(self) -> Grid: ...

    @property
    def source(self) -> str: ...

    def __call__(self, video: Any) -> Any: ...


class DepthSummary(NamedTuple):
    """Frames of a video, and its least, median and largest depth in meters."""

    frames: int
    low: float
    median: float
    high: float


def write_depth(
    model: VideoDepthModel,
    video: Source,
    output: pathlib.Path,
    *,
    batch: int,
    fps: float | None = None,
    output_fps: float = DEMO_FPS,
    progress: Progress | None = None,
    limits: MediaLimits | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> DepthSummary:
    """Writes the depth of a video to ``output``, which appears when it is whole.

    Args:
      model: any depth model.
      video: of unknown origin.
      output: an mp4 to look at, or an npz with ``depth`` float32 [frames, height, width] in meters and ``seconds``
        float64 [frames], when each is shown.
      batch: windows that go through the model together.
      fps: drop or repeat frames to so many a second; None keeps the video's own.
      output_fps: frames a second of an mp4.
      progress: is told what happens.
      limits: of the video.
      stop: asked several times a second.

    Raises:
      UserError: the video cannot be used, the output not written, or the depth is not finite.
      Interrupted: soon after ``stop()`` became true; nothing was written.
    """
    is_movie, clip = output.suffix == ".mp4", model.clip
    progress = progress or Progress("depth", is_movie)
    progress.expect([video.size])
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with (
            Spool(output.parent, clip[1:], np.float32) as depth,
            Spool(output.parent, (*clip[1:], 3), np.uint8) as frames,
        ):
            try:
                progress.begin(video.size, expected_frames(media.probe(video.path, limits), fps))
                opened = open_batches(video.path, clip, batch, fps=fps, limits=limits, stop=stop)
                with contextlib.closing(opened) as parts:
                    times = _run(model, parts, depth, frames if is_movie else None, progress)
            except MediaError as error:
                if stop():  # Ctrl-C ends the child that decodes as well
                    raise Interrupted from error
                raise UserError(f"--video {video.path}: {error.reason}: {printable(error.detail)}") from error
            low, high = _extremes(depth.pieces())
            summary = DepthSummary(len(times), low, median(depth.pieces, low, high), high)
            with _replacing(output) as aside:
                if is_movie:
                    _draw(aside, depth, frames, high, output_fps, progress, stop)
                else:
                    note = {"video": printable(video.name), "checkpoint": model.source, "clip": model.clip, "fps": fps}
                    _write_arrays(aside, depth, times, note)
    progress.end()
    return summary


def _run(
    model: VideoDepthModel,
    parts: Iterable[Batch],
    depth: Spool,
    frames: Spool | None,
    progress: Progress,
) -> np.ndarray:
    """Fills the spools and returns when each frame is shown."""
    seconds = []
    for part, values in computed(model, parts):
        meters = part.real(values)[..., 0].astype(np.float32)
        if not np.isfinite(meters).all():
            raise UserError("the depth is not finite (NaN or infinity): the weights do not fit --dtype, or are broken")
        depth.append(meters)
        if frames is not None:
            frames.append(part.real(part.video))
        seconds.append(part.seconds)
        progress.advance(int(np.count_nonzero(part.counts)), len(part.seconds))
    return np.concatenate(seconds)


def _extremes(pieces: Iterable[np.ndarray]) -> tuple[float, float]:
    bounds = [(float(piece.min()), float(piece.max())) for piece in pieces]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def median(pieces: Callable[[], Iterable[np.ndarray]], low: float, high: float) -> float:
    """The median (of an even number, the lower of the middle two) of values in [low, high] that are read in pieces.

    Twice the values are counted in equal bins, the second time in the bin that holds the median: the result is within
    (high - low) / 2**32 of it, or a float32's own precision.
    """
    rank = (sum(piece.size for piece in pieces()) - 1) // 2
    for _ in range(2):
        counts, edges = np.zeros(_BINS, np.int64), np.linspace(low, high, _BINS + 1)
        below = 0
        for piece in pieces():
            below += int(np.count_nonzero(piece < low))
            counts += np.histogram(piece, edges)[0]
        place = int(np.searchsorted(below + np.cumsum(counts), rank + 1))
        low, high = float(edges[place]), float(edges[place + 1])
    return (low + high) / 2


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path whose file takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _draw(
    path: pathlib.Path,
    depth: Spool,
    frames: Spool,
    high: float,
    fps: float,
    progress: Progress,
    stop: Callable[[], bool],
) -> None:
    _, height, width = depth.shape
    with Movie(path, height, 2 * width, fps) as movie:
        for first in range(0, len(depth), _FRAMES_AT_ONCE):
            if stop():
                raise Interrupted
            some = slice(first, first + _FRAMES_AT_ONCE)
            pictures = np.concatenate([frames[some], gray(depth[some], high)], axis=2)
            for number, picture in enumerate(pictures, first):
                movie.add(picture, number / fps)
            progress.drew(len(pictures))


def gray(depth: np.ndarray, high: float) -> np.ndarray:
    """Depth [frames, height, width] as pictures uint8 [frames, height, width, 3]: 0 and less is black, high white."""
    levels = np.rint(np.clip(depth / high if high > 0 else depth * 0, 0, 1) * 255).astype(np.uint8)
    return levels[..., None].repeat(3, axis=-1)


def _write_arrays(path: pathlib.Path, depth: Spool, times: np.ndarray, note: Mapping[str, Any]) -> None:
    with open(path, "wb") as file:
        write_arrays(file, {"depth": depth, "seconds": times}, note, "npz")
        file.flush()
        os.fsync(file.fileno())
