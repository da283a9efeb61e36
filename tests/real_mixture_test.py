"""A run on a mixture of real videos and the procedural world: killed, and in another number of processes."""

import pathlib
import random
import time

import numpy as np
import pytest

from scaling4d.ingest import cli as ingest_cli
from tests.conftest import SMALL_RUN
from tests.processes import Processes, recorded_batches
from tests.run_ends import final_arrays, losses

VIDEOS = pathlib.Path(__file__).parents[2] / "shared" / "data" / "videos"
STEPS, BATCH = 12, 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not VIDEOS.is_dir(), reason="the folder of real videos is not there (../shared/data/videos)"),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, clips) -> list[str]:
    """Of a run on both data sets; ``--model_dir`` is missing."""
    real = tmp_path_factory.mktemp("real") / "clips"
    arguments = [f"--input={VIDEOS}", f"--output={real}", "--workers=2", "--short_side=64", "--clips_per_file=2"]
    assert ingest_cli.main(arguments) == 0
    folders = {"real_videos": (str(real), 0.75), "world": (str(clips), 0.25)}
    period = ["--gin.SaveCheckpointConfig.period=3", "--gin.EVAL_PERIOD=0", f"--gin.TRAIN_STEPS={STEPS}"]
    return [*SMALL_RUN, f"--gin.BATCH_SIZE={BATCH}", f"--gin.DATA_DIR={folders!r}", "--lease_stale_s=30", *period]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, flags, scaling4d) -> pathlib.Path:
    """In one process with four devices."""
    root = tmp_path_factory.mktemp("undisturbed")
    with Processes(1, 4, [*flags, f"--model_dir={root / 'run'}"], scaling4d.environment, root, root / "seen") as run:
        assert run.wait() == [0], run.output()
    return root


def test_killed_and_started_again_it_ends_with_the_same_bits(undisturbed, flags, scaling4d, tmp_path):
    generator = random.Random(5)
    arguments = [*flags, f"--model_dir={tmp_path / 'run'}"]
    for step in sorted(generator.sample(range(2, STEPS), 2)):
        with Processes(1, 4, arguments, scaling4d.environment, tmp_path, tmp_path / "seen") as run:
            deadline = time.monotonic() + 250
            while max(losses(tmp_path / "run"), default=0) < step and run.running():
                assert time.monotonic() < deadline, run.output()
                time.sleep(0.02)
            run.kill()
    with Processes(1, 4, arguments, scaling4d.environment, tmp_path, tmp_path / "seen") as run:
        assert run.wait() == [0], run.output()
    ours, position = final_arrays(tmp_path / "run", STEPS)
    theirs, expected = final_arrays(undisturbed / "run", STEPS)
    assert position == expected and position["next_example"] == STEPS * BATCH
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert losses(tmp_path / "run") == losses(undisturbed / "run")
    # Prefetched batches may reach past the end.
    assert trained_on(tmp_path) == trained_on(undisturbed)


@pytest.mark.thrice
@pytest.mark.parametrize("processes", [2, 4])
def test_other_processes_see_the_same_batches_ids_and_masks(undisturbed, flags, scaling4d, tmp_path, processes):
    arguments = [*flags, f"--model_dir={tmp_path / 'run'}"]
    with Processes(processes, 4 // processes, arguments, scaling4d.environment, tmp_path, tmp_path / "seen") as run:
        assert run.wait(timeout_s=800) == [0] * processes, run.output()
    assert len(list((tmp_path / "seen").iterdir())) == processes
    assert trained_on(tmp_path) == trained_on(undisturbed)
    ours, theirs = losses(tmp_path / "run"), losses(undisturbed / "run")
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def trained_on(root: pathlib.Path) -> dict:
    seen = recorded_batches(root / "seen")
    examples = {example: what for example, what in seen.items() if example < STEPS * BATCH}
    assert len(examples) == STEPS * BATCH
    assert len({what["pixels"] for what in examples.values()}) > BATCH
    return examples
