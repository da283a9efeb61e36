"""A whole video through a masked auto-encoder: what it sees, what it paints, and how far off that is.

Responsible for: the model from a run's ``model.json`` alone, the metrics of a video's windows, and a film and a sheet
of its reconstruction. Not responsible for: windows (``inference/windows.py``), layout (``observe/previews.py``) or the
command (``cli.py``). Works with the base install, in memory that does not grow with the video.

Window n of the video is masked as example [0, n] of the run is, so that the same video gives the same masks. The last
window may end with repeats of the last frame: it is reconstructed as it is and counts by its share of real frames.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from scaling4d import model_json, partitioning
from scaling4d.inference import windows
from scaling4d.inference.movie import Movie
from scaling4d.inference.windows import Batch
from scaling4d.objectives.combine import combine
from scaling4d.objectives.simple_mae import EPSILON, SimpleMAE, simple_mae_from
from scaling4d.observe import previews
from scaling4d.partitioning import Partitioner
from scaling4d.pretrained.read_checkpoint import ReadCheckpoint, placed
from scaling4d.results_folder import ResultsFolder

WINDOWS_IN_SHEET = 4
_WINDOWS_ON_ACCELERATORS = 8  # a device, at a time


class Reconstructed(NamedTuple):
    """What was made of a video.

    metrics: those of the objective, over all windows; 'fvu' is the ratio of their means. windows, frames, seconds: how
    much of the video it is. more: the video goes on.
    """

    metrics: dict[str, float]
    windows: int
    frames: int
    seconds: float
    more: bool


class Reconstructor:
    """A pretrained masked auto-encoder, spread over all devices by the trainer's rules."""

    def __init__(self, arrays: ReadCheckpoint):
        """Raises UserError where the run is of another objective, or the checkpoint of another model."""
        source = str(arrays.run.file(model_json.NAME))
        self.objective: SimpleMAE = simple_mae_from(arrays.model, source)
        partitioner = Partitioner()
        self._rules = list(partitioner.logical_axis_rules)
        self._mesh = partitioner.mesh()
        self._rows = partitioner.batch_sharding(self._mesh)
        boxed = jax.eval_shape(self.objective.init, jax.random.key(0))["params"]
        shardings = partitioner.shardings(self._mesh, boxed)
        self._params = placed(arrays, partitioning.unboxed(boxed), shardings)
        per_device = 1 if self._mesh.devices.flat[0].platform == "cpu" else _WINDOWS_ON_ACCELERATORS
        self.batch = per_device * self._mesh.size
        """Windows that go through the model together."""
        whole = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._compiled = jax.jit(self._measure, in_shardings=(shardings, self._rows), out_shardings=whole)

    def _measure(self, params: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        _, metrics = self.objective.loss(params, batch, train=False)
        return metrics | {"weight": batch["weight"].sum()}, self.objective.previews(params, batch)

    def __call__(self, part: Batch, first: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Metrics of a batch of windows, the first of which is number ``first``, and its rows of pictures."""
        numbers = first + np.arange(len(part.video), dtype=np.uint32)
        host = {
            "video": part.video,
            "index": np.stack([np.zeros_like(numbers), numbers], axis=1),
            "weight": (part.counts / part.video.shape[1]).astype(np.float32),
        }
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._rules):
            return jax.device_get(self._compiled(self._params, jax.device_put(host, self._rows)))


def reconstruct(
    model: Reconstructor,
    path: str | os.PathLike,
    rate: float,
    folder: ResultsFolder,
    name: str,
    *,
    max_windows: int,
    on_windows: Callable[[int], None],
) -> Reconstructed:
    """Writes ``<name>.mp4``, every frame of the video in labeled rows, and ``<name>.png``, some of its windows.

    Args:
      path: the video, of unknown origin; its pictures are scaled to the model's size, their aspect is not kept.
      rate: frames a second that the film states; each frame is shown when the video shows it.
      folder: where the files go; it is there.
      max_windows: the rest of the video is not read.
      on_windows: told how many windows are done.

    Raises:
      MediaError: the video cannot be used; nothing is written then.
    """
    parts: list[dict[str, np.ndarray]] = []
    sheet = EvenlySpaced(WINDOWS_IN_SHEET)
    done = frames = 0
    seconds, more = 0.0, False
    on_windows(0)
    with contextlib.ExitStack() as stack:
        film = stack.enter_context(_film(folder, f"{name}.mp4", rate))
        batches = windows.open_batches(path, model.objective.model.clip, model.batch)
        for part in stack.enter_context(contextlib.closing(batches)):
            if more := done == max_windows:
                break
            part, more = _at_most(part, max_windows - done)
            metrics, rows = model(part, done)
            parts.append(metrics)
            times = iter(part.seconds)
            for window, count in enumerate(part.counts[part.counts > 0]):
                shown = {row: videos[window] for row, videos in rows.items()}
                sheet.add(shown)
                for picture in previews.film({row: video[None] for row, video in shown.items()})[:count]:
                    film.add(picture, next(times))
            done += int((part.counts > 0).sum())
            frames += len(part.seconds)
            seconds = float(part.seconds[-1])
            on_windows(done)
            if more:
                break
    pictures = sheet.chosen()
    together = {row: np.stack([shown[row] for shown in pictures]) for row in pictures[0]}
    folder.write_bytes(f"{name}.png", previews.encode_png(previews.sheet(together)))
    metrics = combine(parts)
    if "fvu" in metrics:
        metrics["fvu"] = metrics["mse"] / max(metrics["mse_mean_color"], EPSILON)
    return Reconstructed(metrics, done, frames, seconds, more)


def _at_most(part: Batch, count: int) -> tuple[Batch, bool]:
    """The first ``count`` windows of a batch, the others without real frames, and whether that left some out."""
    left_out = bool((part.counts[count:] > 0).any())
    counts = np.where(np.arange(len(part.counts)) < count, part.counts, 0)
    return Batch(part.video, counts, part.seconds[: counts.sum()]), left_out


class EvenlySpaced:
    """Some of a sequence of unknown length, evenly spaced, while at most twice as many are held."""

    def __init__(self, count: int):
        self._count, self._every, self._seen = count, 1, 0
        self._held: list[Any] = []

    def add(self, item: Any) -> None:
        if self._seen % self._every == 0:
            if len(self._held) == 2 * self._count:
                self._held, self._every = self._held[::2], 2 * self._every
            if self._seen % self._every == 0:
                self._held.append(item)
        self._seen += 1

    def chosen(self) -> list[Any]:
        """At most ``count`` of them, in order."""
        places = np.linspace(0, len(self._held) - 1, min(self._count, len(self._held)))
        return [self._held[place] for place in places.round().astype(int)]


class _Film:
    """A movie that begins with its first picture, whose size it takes."""

    def __init__(self, path: pathlib.Path, rate: float, stack: contextlib.ExitStack):
        self._path, self._rate, self._stack = path, rate, stack
        self._movie: Movie | None = None

    def add(self, picture: np.ndarray, seconds: float) -> None:
        if self._movie is None:
            self._movie = self._stack.enter_context(Movie(self._path, *picture.shape[:2], self._rate))
        self._movie.add(picture, seconds)


@contextlib.contextmanager
def _film(folder: ResultsFolder, name: str, rate: float) -> Iterator[_Film]:
    """A film that appears in the folder when the block ends well, and nowhere when it does not."""
    beside = None if folder.is_bucket else folder.path
    with tempfile.TemporaryDirectory(dir=beside, prefix=".aside-") as aside:
        path = pathlib.Path(aside) / "film.mp4"
        with contextlib.ExitStack() as stack:
            yield _Film(path, rate, stack)
        with folder.replacing(name) as target, open(path, "rb") as film:
            shutil.copyfileobj(film, target)
