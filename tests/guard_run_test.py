"""Runs with a clip that is never a number: skipped, rewound, ended; in one process and in two."""

import json
import pathlib

import numpy as np
import pytest

from tests.conftest import SMALL_RUN
from tests.processes import Processes
from tests.run_ends import final_arrays, losses

STEPS, POISONED_STEP = 10, 6

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def flags(clips, tmp_path_factory) -> list[str]:
    recipe = tmp_path_factory.mktemp("recipe") / "poisoned.gin"
    recipe.write_text(
        f"import tests.poisoned\ntrain.objective = @PoisonedMAE()\nPoisonedMAE.model = @VideoMAE()\n"
        f"PoisonedMAE.mask_ratio = 0.5\nPoisonedMAE.example = {(POISONED_STEP - 1) * 8 + 3}\n"
    )
    small = [SMALL_RUN[0], f"--gin_file={recipe}", *SMALL_RUN[1:]]
    period = ["--gin.SaveCheckpointConfig.period=2", "--gin.EVAL_PERIOD=0", f"--gin.TRAIN_STEPS={STEPS}"]
    return [*small, f"--gin.DATA_DIR={clips}", *period]


def run(processes, tmp_path, flags, scaling4d, *more, code=0) -> tuple[pathlib.Path, str]:
    environment = scaling4d.environment | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    arguments = [*flags, f"--model_dir={tmp_path / 'run'}", *more]
    with Processes(processes, 2 // processes, arguments, environment, tmp_path / "logs") as started:
        codes = started.wait(500)
        assert codes == [code] * processes, started.output()
        return tmp_path / "run", started.output()


def last_counts(model_dir: pathlib.Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (model_dir / "train" / "metrics.jsonl").read_text().splitlines()]
    [row] = [row for row in rows if row["step"] == STEPS and "guard/rewinds" in row]
    return {name.removeprefix("guard/"): value for name, value in row.items() if name.startswith("guard/")}


def updates(model_dir: pathlib.Path) -> int:
    """Of the optimizer, as it counts them itself."""
    arrays, _ = final_arrays(model_dir, STEPS)
    [count] = {int(value) for name, value in arrays.items() if name.endswith("count']") or name.endswith(".count")}
    assert all(np.isfinite(value).all() for value in arrays.values())
    return count


def test_skipping(tmp_path, flags, scaling4d):
    model_dir, _ = run(1, tmp_path, flags, scaling4d)
    assert last_counts(model_dir) == {"not_finite": 1, "spikes": 0, "rewinds": 0}
    assert updates(model_dir) == STEPS - 1
    assert [step for step, loss in losses(model_dir).items() if np.isnan(loss)] == [POISONED_STEP]


@pytest.mark.thrice
@pytest.mark.parametrize("processes", [1, 2])
def test_rewinding(tmp_path, flags, scaling4d, processes):
    model_dir, output = run(processes, tmp_path, flags, scaling4d, "--gin.Guard.on_nonfinite=rewind")
    assert last_counts(model_dir) == {"not_finite": 1, "spikes": 0, "rewinds": 1}
    assert f"step {POISONED_STEP} was refused: went on at step 6 with the parameters of 4" in output
    assert updates(model_dir) == 4 + STEPS - POISONED_STEP
    assert list(losses(model_dir)) == list(range(1, STEPS + 1))
    assert not (model_dir / "bad").exists() or 6 not in {int(path.name) for path in (model_dir / "bad").iterdir()}


def test_ending(tmp_path, flags, scaling4d):
    _, output = run(1, tmp_path, flags, scaling4d, "--gin.Guard.on_nonfinite=stop", code=1)
    assert f"step {POISONED_STEP} has loss or gradients that are no numbers" in output and "Traceback" not in output
