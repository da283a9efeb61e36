"""Clips and commands that the integration tests share."""

import os
import pathlib
import subprocess
import sys

import pytest

from scaling4d.ingest import cli as ingest_cli
from scaling4d.synth4d import cli as synth_cli

SMALL_RUN = (
    "--gin_file=pretrain/tiny.gin",
    "--gin.CLIP_SIZE=32",
    "--gin.CLIP_FRAMES=8",
    "--gin.BATCH_SIZE=8",
    "--gin.WARMUP_STEPS=0",
    "--gin.MASK_RATIO=0.5",
    "--gin.train.log_period=1",
    "--gin.train.eval_examples=4",
    "--gin.train.preview_examples=2",
)
"""The tiny model on clips of 8 x 32 x 32: a step takes milliseconds."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of several processes meet in another order each time: those marked ``thrice`` run three times in a row."""
    if metafunc.definition.get_closest_marker("thrice"):
        metafunc.fixturenames.append("turn")
        metafunc.parametrize("turn", (1, 2, 3))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small data set of the procedural world: 6 videos, one held out."""
    folder = tmp_path_factory.mktemp("world")
    world = ["--count=6", "--frames=40", "--size=48", "--workers=1"]
    assert synth_cli.main([f"--output={folder / 'videos'}", *world]) == 0
    assert ingest_cli.main([f"--input={folder / 'videos'}", f"--output={folder / 'clips'}", "--workers=1"]) == 0
    return folder / "clips"


class Scaling4d:
    """The installed command in a process of its own."""

    def __init__(self, cache: pathlib.Path):
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Compiled once, used by every process of the session.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "scaling4d.main", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment, **(pipes | options))

    def run(self, *arguments: str, code: int = 0) -> str:
        """Output of a command that must end with ``code``."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == code, output
        return output


@pytest.fixture(scope="session")
def scaling4d(tmp_path_factory: pytest.TempPathFactory) -> Scaling4d:
    return Scaling4d(tmp_path_factory.mktemp("compiled"))
