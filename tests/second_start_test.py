"""What one start compiled, later starts of the same run take from the user's cache folder, without any setting."""

import pathlib
import re
import shutil

import pytest

from tests.conftest import SMALL_RUN, Scaling4d

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def compiled(home: pathlib.Path) -> set[str]:
    return {path.name for path in (home / "scaling4d" / "compiled").glob("*/*-cache")}


def seconds(output: str) -> float:
    return float(re.search(r"compiled the step in ([\d.]+) s", output)[1])


def test_later_starts_compile_nothing_anew(tmp_path, clips):
    home = tmp_path / "home"
    scaling4d = Scaling4d(home)
    del scaling4d.environment["JAX_COMPILATION_CACHE_DIR"]
    scaling4d.environment["XDG_CACHE_HOME"] = str(home)
    flags = [*SMALL_RUN, f"--gin.DATA_DIR={clips}", "--gin.TRAIN_STEPS=4", "--gin.SaveCheckpointConfig.period=2"]
    cold = scaling4d.run("train", *flags, f"--model_dir={tmp_path / 'first'}")
    programs = compiled(home)
    assert {name.partition("-")[0] for name in programs} >= {"jit_train_step", "jit_eval_step"}

    warm = scaling4d.run("train", *flags, f"--model_dir={tmp_path / 'second'}")
    assert compiled(home) == programs
    assert seconds(warm) < 0.7 * seconds(cold)

    # As after a kill between the saves at 2 and 4.
    shutil.rmtree(tmp_path / "first" / "checkpoints" / "4")
    (tmp_path / "first" / "DONE").unlink()
    resumed = scaling4d.run("train", *flags, f"--model_dir={tmp_path / 'first'}")
    assert "from step 2 in" in resumed and "done: step 4" in resumed
    assert compiled(home) == programs
