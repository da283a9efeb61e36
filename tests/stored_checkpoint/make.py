"""Makes a stored checkpoint: python -m tests.stored_checkpoint.make tests/stored_checkpoint/v2

Writes ``clips-v2``, a data set, ``run``, the folder of a run of two steps on it, and ``digests.json``, of every array
of the run's checkpoint. The folder must not be there: what is stored is never made anew, a new one comes beside it.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

from tests.clip_sets import write_clip_set
from tests.run_ends import final_arrays

RECIPE = pathlib.Path(__file__).with_name("small.gin")
STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"{folder} is there already")
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:  # Orbax writes where it saved into its files
        make(pathlib.Path(scratch), f"clips-{folder.name}")
        shutil.copytree(scratch, folder)


def make(folder: pathlib.Path, clips: str) -> None:
    write_clip_set(folder / clips, train=8, validation=2, frames=16, shard_clips=4)
    run = folder / "run"
    where = [f"--gin_file={RECIPE}", f"--model_dir={run}", f"--gin.DATA_DIR={folder / clips}"]
    subprocess.run([sys.executable, "-m", "scaling4d.main", "train", *where, f"--gin.TRAIN_STEPS={STEPS}"], check=True)
    for name in ("exports", "lease", "goodput.jsonl"):  # nothing of these is needed to go on
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    arrays, _ = final_arrays(run, STEPS)
    (folder / "digests.json").write_text(json.dumps(digests(arrays), indent=1, sort_keys=True) + "\n")


def digests(arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """Of each array's type, shape and bits."""
    return {name: digest(array) for name, array in arrays.items()}


def digest(array: np.ndarray) -> str:
    text = f"{array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes()
    return hashlib.sha256(text).hexdigest()[:16]


if __name__ == "__main__":
    main()
