"""Folders of procedural videos: mp4 files with their ground truth beside them.

Responsible for: many scenes into one folder, over several processes, restartable. Not responsible for: what is in a
scene (``world.py``) or how it is drawn (``render.py``).

    scaling4d synth --output videos --count 48 --seed 0

writes ``videos/scene-00000.mp4`` ... and ``videos/ground_truth/scene-00000.npz`` ... (see ``load_ground_truth``).
"""

import concurrent.futures.process
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import signal
import time
from collections.abc import Iterator, Sequence

import numpy as np

from scaling4d.errors import UserError
from scaling4d.mp4 import encode_mp4
from scaling4d.status_line import StatusLine, format_duration
from scaling4d.synth4d.render import Rendering, render
from scaling4d.synth4d.world import scene_from_seed

_DEPTH_UNIT = 0.00025  # meters; 16 bits then reach 16 m, more than any room's diagonal
_CRF = 18
_SETTINGS = "settings.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class WriteSettings:
    """What a folder of videos holds; two folders of equal settings hold equal videos."""

    seed: int = 0
    frames: int = 64
    size: int = 128
    fps: float = 24.0

    def __post_init__(self):
        if self.frames < 1:
            raise UserError(f"frames is {self.frames}; it must be at least 1 (--frames)")
        if self.size < 16 or self.size % 2:
            raise UserError(f"size is {self.size}; it must be even and at least 16 pixels (--size)")
        if not 0 < self.fps <= 1000:
            raise UserError(f"fps is {self.fps}; it must be above 0 and at most 1000 (--fps)")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must not be negative (--seed)")


def write_videos(
    directory: str | os.PathLike,
    count: int,
    seed: int = 0,
    *,
    frames: int = 64,
    size: int = 128,
    fps: float = 24.0,
    workers: int | None = None,
    progress: bool = True,
) -> list[pathlib.Path]:
    """Write videos of scenes ``(seed, 0)`` to ``(seed, count - 1)``; those already there are kept.

    Args:
      directory: where; made if absent. A folder written with other settings is refused.
      count: number of videos.
      seed: of the whole folder.
      frames, size, fps: length, side in pixels and frame rate of each video.
      workers: processes; by default one a core. One means: in this process.
      progress: print a line with the time left.

    Returns:
      The mp4 files, in order.

    Raises:
      UserError: for impossible settings or a folder of other settings.
    """
    if count < 1:
        raise UserError(f"count is {count}; it must be at least 1 (--count)")
    settings = WriteSettings(seed, frames, size, fps)
    folder = pathlib.Path(directory)
    _claim(folder, settings)
    paths = [folder / f"scene-{index:05d}.mp4" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    workers = min(workers or os.cpu_count() or 1, max(len(missing), 1))
    started = time.monotonic()
    line = StatusLine()

    def text() -> str:
        left_s = (time.monotonic() - started) / done * (len(missing) - done)
        return f"rendering videos: {count - len(missing) + done}/{count}, {format_duration(left_s)} left"

    for done, _ in enumerate(_run(folder, settings, missing, workers), start=1):
        if progress:
            line.show(text, now=done == len(missing))
    line.close()
    return paths


def load_ground_truth(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read what is known about a video.

    Args:
      path: a ``ground_truth/scene-*.npz``.

    Returns:
      Arrays for ``T`` frames, ``P`` tracks: ``depth`` float32 [T, H, W] (z, meters, rounded to 0.25 mm), ``object_id``
      uint8 and ``dynamic_mask`` bool of the same shape, ``object_moves`` bool [objects + 1], ``intrinsics`` float32
      [T, 3, 3], ``world_to_camera`` float32 [T, 3, 4], ``tracks_3d`` float32 [P, T, 3] (world), ``tracks_2d`` float32
      [P, T, 2] (pixels from the outer corner), ``tracks_visible`` bool [P, T], ``query`` float32 [P, 3] (frame, x, y),
      ``tracks_object_id`` uint8 [P], the scalar ``fps`` and ``scene_seed`` uint64 [2].
    """
    with np.load(path, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["depth"] = arrays.pop("depth_quarter_mm").astype(np.float32) * np.float32(_DEPTH_UNIT)
    shape = arrays["depth"].shape
    bits = arrays.pop("dynamic_mask_bits")
    arrays["dynamic_mask"] = np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
    return arrays


def _ground_truth_bytes(rendering: Rendering, settings: WriteSettings, index: int) -> bytes:
    buffer = io.BytesIO()
    tracks = rendering.tracks
    np.savez_compressed(
        buffer,
        depth_quarter_mm=np.rint(rendering.depth / _DEPTH_UNIT).astype(np.uint16),
        object_id=rendering.object_id,
        dynamic_mask_bits=np.packbits(rendering.dynamic_mask),
        object_moves=rendering.object_moves,
        intrinsics=rendering.intrinsics,
        world_to_camera=rendering.world_to_camera,
        tracks_3d=tracks.points_3d.astype(np.float32),
        tracks_2d=tracks.points_2d.astype(np.float32),
        tracks_visible=tracks.visible,
        query=tracks.query.astype(np.float32),
        tracks_object_id=tracks.object_id,
        fps=np.float64(settings.fps),
        scene_seed=np.array([settings.seed, index], np.uint64),
    )
    return buffer.getvalue()


def _claim(folder: pathlib.Path, settings: WriteSettings) -> None:
    """Make the folder, or check that it holds the same kind of videos."""
    wanted = {"format": _FORMAT, **dataclasses.asdict(settings)}
    note = folder / "ground_truth" / _SETTINGS
    if note.exists():
        found = json.loads(note.read_text())
        if found != wanted:
            changed = [f"{key} {found.get(key)} (now {wanted[key]})" for key in wanted if found.get(key) != wanted[key]]
            raise UserError(
                f"{folder} already holds videos of other settings: {', '.join(changed)}; name another folder (--output)"
            )
        return
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} cannot be made a folder of videos: {error.strerror} (--output)") from error
    _put(note, (json.dumps(wanted, indent=1) + "\n").encode())


def _run(folder: pathlib.Path, settings: WriteSettings, missing: Sequence[int], workers: int) -> Iterator[int]:
    """Write the missing videos, yielding each index when its files are complete."""
    if workers <= 1:
        for index in missing:
            yield _write_one(folder, settings, index)
        return
    spawn = multiprocessing.get_context("spawn")
    with (
        _one_thread_each(),
        concurrent.futures.ProcessPoolExecutor(workers, spawn, _leave_interrupts_to_parent) as pool,
    ):
        tasks = [pool.submit(_write_one, folder, settings, index) for index in missing]
        try:
            for task in concurrent.futures.as_completed(tasks):
                yield task.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(f"a rendering process was killed; use fewer than {workers} (--workers)") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep the workers' linear algebra to one thread: they already use every core."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_one(folder: pathlib.Path, settings: WriteSettings, index: int) -> int:
    scene = scene_from_seed((settings.seed, index))
    rendering = render(scene, settings.frames, settings.size, settings.size, settings.fps)
    # The video comes last: where it is, its ground truth is too.
    _put(folder / "ground_truth" / f"scene-{index:05d}.npz", _ground_truth_bytes(rendering, settings, index))
    _put(folder / f"scene-{index:05d}.mp4", encode_mp4(rendering.video, settings.fps, _CRF))
    return index


def _put(path: pathlib.Path, content: bytes) -> None:
    """Write aside, then rename, so that a file of this name is always whole."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; name another folder (--output)") from error
