"""A run that several test modules look at, trained once a session in a process of its own.

Responsible for: a small finished run with evaluations at steps 2 and 4, both with a checkpoint, and a moving average.
Three held-out clips in batches of two, so that the last batch is not full. Tests must not write into it.
"""

import pathlib

import pytest

from scaling4d.ingest import cli as ingest_cli
from tests.conftest import SMALL_RUN, Scaling4d

_trained: dict[pathlib.Path, pathlib.Path] = {}


def trained_run(factory: pytest.TempPathFactory, clips: pathlib.Path, scaling4d: Scaling4d) -> pathlib.Path:
    """The run folder; ``clips`` beside it is its data set."""
    base = factory.getbasetemp()
    if base not in _trained:
        folder = factory.mktemp("trained")
        data = [f"--input={clips.parent / 'videos'}", f"--output={folder / 'clips'}", "--holdout=0.5", "--workers=1"]
        assert ingest_cli.main(data) == 0
        flags = ["--gin.TRAIN_STEPS=4", "--gin.EVAL_PERIOD=2", "--gin.SaveCheckpointConfig.period=2"]
        flags += ["--gin.BATCH_SIZE=2", "--gin.train.ema_decay=0.5"]
        where = [f"--model_dir={folder / 'run'}", f"--gin.DATA_DIR={folder / 'clips'}"]
        scaling4d.run("train", *SMALL_RUN, *where, *flags)
        _trained[base] = folder / "run"
    return _trained[base]


def snapshot(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
