"""``scaling4d export`` on a run that was trained, in processes of their own."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import scaling4d as library
from scaling4d import main
from tests.trained_run import snapshot, trained_run

NOT_LOADED = """
import sys
from scaling4d import main
code = main.main(sys.argv[1:])
print(sorted({"tensorflow", "seqio", "clu", "gin", "cv2"} & set(sys.modules)))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, clips, scaling4d):
    return trained_run(tmp_path_factory, clips, scaling4d)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory, scaling4d):
    """The moving average, as training exports it, by a process that may not load the training stack."""
    before, output = snapshot(run), tmp_path_factory.mktemp("exported") / "backbone.npz"
    command = [sys.executable, "-c", NOT_LOADED, "export", f"--checkpoint={run}", f"--output={output}", "--ema"]
    done = subprocess.run(command, env=scaling4d.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    # Nothing but progress, and that only where the machine is slow.
    assert all(re.fullmatch(r"export: \d+ of \d+ MB(, .*)?", line) for line in done.stderr.splitlines()), done.stderr
    assert "99 arrays" in done.stdout and f"scaling4d features --checkpoint={output}" in done.stdout
    assert snapshot(run) == before
    return output


def test_the_file_is_the_one_that_training_wrote(run, exported):
    assert exported.read_bytes() == (run / "exports" / "backbone-4.npz").read_bytes()
    ours, trained = (json.loads((file.parent / "model.json").read_text()) for file in (exported, run / "exports" / "x"))
    assert (ours["file"], ours["step"], ours["ema"]) == ("backbone.npz", 4, True)
    described = json.loads((run / "model.json").read_text())
    assert {key: ours[key] for key in described} == described
    assert ours.keys() == trained.keys()
    programs = ("file", "commit", "exporter")  # another commit may be made while tests run
    assert [key for key in ours if ours[key] != trained[key] and key not in programs] == []


def test_features_are_those_of_the_run_itself_bitwise(run, exported, tmp_path):
    assert main.main(["export", f"--checkpoint={run / 'checkpoints' / '2'}", f"--output={tmp_path / 'two.npz'}"]) == 0
    video = np.random.default_rng(0).integers(0, 256, (1, 8, 32, 32, 3), np.uint8)
    pairs = [(exported, {"ema": True}), (tmp_path / "two.npz", {"step": 2})]
    seen = []
    for file, which in pairs:
        ours, theirs = library.load_backbone(file), library.load_backbone(run, **which)
        seen.append(np.asarray(ours.features(video)))
        np.testing.assert_array_equal(seen[-1], np.asarray(theirs.features(video)))
    assert not np.array_equal(*seen)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--checkpoint=RUN/exports/backbone-4.npz", "--output=OUT/a.npz"], ["npz file already", "MODEL_DIR"]),
        (["--checkpoint=RUN/nothing", "--output=OUT/a.npz"], ["no checkpoints at", "MODEL_DIR/checkpoints/STEP"]),
        (["--checkpoint=RUN", "--output=OUT/a.npz", "--step=3"], ["no checkpoint of step 3", "2, 4"]),
        (["--checkpoint=RUN", "--output=OUT/a"], [".npz"]),
        (["--checkpoint=RUN", "--output=/proc/out/a.npz"], ["/proc/out", "--output"]),
        (["--checkpoint=RUN", "--output=RUN/exports/backbone-4.npz"], ["is there already", "--overwrite"]),
        (["--checkpoint=RUN", "--output=RUN/exports/a.npz"], ["ema is True there, False here", "--overwrite"]),
    ],
)
def test_mistakes_end_in_one_line(run, tmp_path, capsys, flags, words):
    before = snapshot(run)
    assert main.main(["export", *(flag.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for flag in flags)]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1 and error.startswith("scaling4d: error")
    assert snapshot(run) == before and list(tmp_path.iterdir()) == []
