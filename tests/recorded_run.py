"""``scaling4d`` as it is, except that each training batch is also written down: python recorded_run.py DIR ARGUMENTS.

Not a test: ``processes.py`` starts it.
"""

import json
import os
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from scaling4d.data.stream import ClipStream  # noqa: E402
from scaling4d.main import main  # noqa: E402
from scaling4d.train import Run  # noqa: E402
from tests.processes import digest  # noqa: E402

train, next_batch = Run._train, ClipStream.__next__


def training(run, trainer, *others):
    def recording(stream):
        batch = next_batch(stream)
        if stream.fingerprint["split"] == "train":
            with jax.transfer_guard("allow"):
                masks = np.asarray(trainer.objective.visible(batch["index"]))
            for id_, video, weight, mask in zip(batch["index"], batch["video"], batch["weight"], masks, strict=True):
                example = (int(id_[0]) << 32) + int(id_[1])
                what = {"example": example, "pixels": digest(video), "weight": float(weight), "mask": digest(mask)}
                lines.write(json.dumps(what) + "\n")
        return batch

    ClipStream.__next__ = recording
    return train(run, trainer, *others)


if __name__ == "__main__":  # processes that decode import this file again
    lines = open(os.path.join(sys.argv[1], f"{os.getpid()}.jsonl"), "a", buffering=1)
    Run._train = training
    sys.exit(main(sys.argv[2:]))
