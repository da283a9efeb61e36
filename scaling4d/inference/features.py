"""Features of whole videos, as files.

Responsible for: what is computed and stored of every video, and pictures of it. Not responsible for: the folder
(``outputs.py``), windows (``windows.py``) or flags (``features_cli.py``).

Of every video two files are written:

    NAME.npz (or .safetensors)
        features  [frames, rows, columns, width]  a vector for every frame and patch, of the model's tap at ``depth``
        seconds   float64 [frames]                when the frames are shown
        metadata  JSON: the checkpoint, and with what settings the features were made
    NAME.mp4
        left the frames as the model sees them, right their features as colors (``principal.py``), a square a patch.
        What the model makes of a uniform gray clip is taken off first: else the colors tell the place of a patch, which
        in a trained model outweighs what is seen there
"""

import contextlib
import functools
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

import scaling4d
from scaling4d.errors import UserError
from scaling4d.inference import principal
from scaling4d.inference.array_files import write_arrays
from scaling4d.inference.movie import Movie
from scaling4d.inference.outputs import OutputFolder, targets, writing
from scaling4d.inference.progress import Progress
from scaling4d.inference.spool import Spool
from scaling4d.inference.windows import Interrupted, computed, open_batches
from scaling4d.ingest import media
from scaling4d.ingest.media import MediaError, MediaLimits
from scaling4d.ingest.sources import Source, printable
from scaling4d.ingest.timing import nominal_rate
from scaling4d.models.patches import Grid, block_grid
from scaling4d.models.released import leaves
from scaling4d.models.sizes import ModelSize

_FRAMES_DRAWN_AT_ONCE = 32


class FeatureModel(Protocol):
    """What is needed of a ``pretrained.backbone.PretrainedBackbone``."""

    @property
    def params(self) -> Mapping[str, Any]: ...

    @property
    def source(self) -> str: ...

    @property
    def step(self) -> int | None: ...

    @property
    def size(self) -> ModelSize: ...

    @property
    def clip(self) -> Grid: ...

    @property
    def patch(self) -> Grid: ...

    def features(self, video: Any, depth: float) -> Any: ...


@dataclass(frozen=True)
class FeatureSettings:
    """What the stored numbers depend on, beside the model.

    Attributes:
      depth: of the tap, as a share of the model; 0.95 is where the readouts of the paper look.
      fps: frames a second that videos are brought to; None keeps their own frames.
      precision: of the stored features, float32 or float16.
      dtype: that the model computes in.
      file_format: of the array files.
    """

    depth: float = 0.95
    fps: float | None = None
    precision: str = "float32"
    dtype: str = "float32"
    file_format: str = "npz"


class Skipped(NamedTuple):
    """A video that gave nothing: a reason of ``ingest/media.py`` and one line of detail."""

    name: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Summary:
    """What a run over many videos did.

    done: videos, with ``frames`` in all. kept: videos that were done before. left: videos not reached, after a stop.
    """

    done: int
    kept: int
    frames: int
    skipped: tuple[Skipped, ...]
    left: int


def extract(
    model: FeatureModel,
    sources: Sequence[Source],
    folder: OutputFolder,
    settings: FeatureSettings,
    *,
    batch: int,
    movies: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    limits: MediaLimits | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Writes the features of every video that is not done yet.

    A video that cannot be used, or breaks in the middle, is skipped and listed in ``errors.tsv``.

    Args:
      model: any frozen backbone.
      sources: the videos.
      folder: where to; its files are all of this model and these settings.
      settings: what is stored.
      batch: windows that go through the model together; each batch has this size, so that it is compiled once.
      movies: write the pictures too.
      overwrite: replace what the folder holds of another model or other settings.
      progress: is told what happens.
      limits: of the videos.
      stop: asked several times a second; once true, the video worked on is given up.

    Raises:
      UserError: the folder belongs to other settings or cannot be written, or the features are not finite numbers.
    """
    names = targets(sources, folder.path)
    checkpoint = {"source": model.source, "step": model.step, "parameters": fingerprint(model.params)}
    made = {"clip": model.clip, "patch": model.patch, **asdict(settings)}
    with writing(folder.path):
        wanted = {"parameters": checkpoint["parameters"], **made}
        folder.claim(wanted, {"checkpoint": checkpoint, "scaling4d": scaling4d.__version__}, overwrite)
    todo = [source for source in sources if not folder.is_done(source, names[source], movies)]
    progress = progress or Progress("features", movies)
    progress.expect([source.size for source in todo])
    places = gray_features(model, settings.depth, batch) if movies and todo else None
    worker = _Worker(model, folder, settings, batch, places, progress, limits, stop)
    skipped: list[Skipped] = []
    done = frames = 0
    for source in todo:
        if stop():
            break
        try:
            with writing(folder.path):
                note = {**folder.note(source), "checkpoint": checkpoint, **made}
                frames += worker.extract(source, names[source], note)
            done += 1
        except MediaError as error:
            if not stop():  # Ctrl-C ends the child that decodes as well, which then looks like a broken video
                skipped.append(Skipped(source.name, error.reason, error.detail))
        except Interrupted:
            pass
        progress.end()
    with writing(folder.path):
        folder.write_errors(skipped)
    return Summary(done, len(sources) - len(todo), frames, tuple(skipped), len(todo) - done - len(skipped))


@dataclass(frozen=True)
class _Worker:
    model: FeatureModel
    folder: OutputFolder
    settings: FeatureSettings
    batch: int
    places: np.ndarray | None  # ``gray_features``, where pictures are wanted
    progress: Progress
    limits: MediaLimits | None
    stop: Callable[[], bool]

    def extract(self, source: Source, target: str, note: Mapping[str, Any]) -> int:
        """Writes a video's files and returns how many frames it has; raises MediaError, Interrupted and OSError."""
        fps, clip, work = self.settings.fps, self.model.clip, self.folder.work
        info = media.probe(source.path, self.limits)
        self.progress.begin(source.size, expected_frames(info, fps))
        vectors = (*block_grid(clip, self.model.patch)[1:], self.model.size.width)
        with Spool(work, vectors, self.settings.precision) as features, Spool(work, (*clip[1:], 3), np.uint8) as frames:
            function = functools.partial(self.model.features, depth=self.settings.depth)
            opened = open_batches(source.path, clip, self.batch, fps=fps, limits=self.limits, stop=self.stop)
            seconds = []
            with contextlib.closing(opened) as parts:
                for part, values in computed(function, parts):
                    features.append(self._stored(part.real(values).reshape(-1, *vectors), source))
                    if self.places is not None:
                        frames.append(part.real(part.video))
                    seconds.append(part.seconds)
                    self.progress.advance(int(np.count_nonzero(part.counts)), len(part.seconds))
            times = np.concatenate(seconds)
            movie = None
            if self.places is not None:
                movie = work / "movie"
                self._draw(movie, self.places, features, frames, times, fps or nominal_rate(info.fps))
            arrays = work / "arrays"
            with open(arrays, "wb") as file:
                write_arrays(file, {"features": features, "seconds": times}, note, self.settings.file_format)
                file.flush()
                os.fsync(file.fileno())
        self.folder.put(target, arrays, movie)
        return len(times)

    def _stored(self, values: np.ndarray, source: Source) -> np.ndarray:
        """The features in the dtype that is stored; raises UserError where that cannot hold them."""
        with np.errstate(over="ignore"):
            stored = values.astype(self.settings.precision)
        if not np.isfinite(stored).all():
            broken = not np.isfinite(values.astype(np.float32)).all()
            where = f"the features of {printable(source.name)}"
            if broken:
                raise UserError(f"{where} are not finite (NaN or infinity): the weights do not fit --dtype "
                                f"{self.settings.dtype}, or are broken")  # fmt: skip
            raise UserError(f"{where} are too large for {self.settings.precision}; use --precision float32")
        return stored

    def _draw(
        self, path: pathlib.Path, places: np.ndarray, features: Spool, frames: Spool, times: np.ndarray, rate: float
    ) -> None:
        """Writes the frames with their features as colors beside them."""
        _, height, width, _ = frames.shape
        tokens = principal.sample_rows(math.prod(features.shape[:-1]))
        at_place = places.reshape(-1, places.shape[-1])
        colors = principal.fit(features.vectors(tokens) - at_place[tokens % len(at_place)])
        with Movie(path, height, 2 * width, rate) as movie:
            for first in range(0, len(times), _FRAMES_DRAWN_AT_ONCE):
                if self.stop():
                    raise Interrupted
                some = slice(first, first + _FRAMES_DRAWN_AT_ONCE)
                values = features[some]
                values = values - places[np.arange(first, first + len(values)) % len(places)]
                squares = enlarged(colors(values), height, width)
                for picture, seconds in zip(np.concatenate([frames[some], squares], 2), times[some], strict=True):
                    movie.add(picture, seconds)
                self.progress.drew(len(times[some]))


def gray_features(model: FeatureModel, depth: float, batch: int) -> np.ndarray:
    """What the model makes of a clip without content, float32 [frames of a clip, rows, columns, width]."""
    frames, height, width = model.clip
    gray = np.full((batch, frames, height, width, 3), 128, np.uint8)  # of the batch's size: nothing is compiled for it
    grid = block_grid(model.clip, model.patch)
    features = np.asarray(model.features(gray, depth=depth)[0], np.float32)
    return features.reshape(frames, *grid[1:], model.size.width)


def enlarged(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pictures [frames, rows, columns, ...] with every cell repeated to ``height`` x ``width`` pixels."""
    return cells.repeat(height // cells.shape[1], axis=1).repeat(width // cells.shape[2], axis=2)


def expected_frames(info: media.VideoInfo, fps: float | None) -> int:
    """How many frames a file will give by what it says of itself; 0 if it says nothing."""
    rate = nominal_rate(info.fps)
    if fps:
        return round((info.seconds or info.frames / rate) * fps)
    return info.frames or round(info.seconds * rate)


def fingerprint(params: Mapping[str, Any]) -> str:
    """Names a set of parameters by the first few numbers of each array: training changes all of them.

    Not by all numbers, because those may lie on many devices, and be many gigabytes.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves(params)):
        corner = np.asarray(leaf[tuple(slice(0, 4) for _ in leaf.shape)])
        digest.update(f"{name} {leaf.shape} {leaf.dtype};".encode() + corner.tobytes())
    return digest.hexdigest()[:16]
