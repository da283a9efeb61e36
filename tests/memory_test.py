"""How much memory of the host it takes to load weights, in processes of their own.

Size e has 3.8 billion parameters: a loader that holds the file beside the model does not fit where the model does.
"""

import os
import subprocess
import sys

import numpy as np
import pytest

from scaling4d.models import released
from scaling4d.models.sizes import SIZES, ModelSize

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is Linux's")

LOAD = """
import sys
import jax
from scaling4d.pretrained.backbone import load_backbone
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
jax.block_until_ready(jax.numpy.zeros(3) + 1)
before = kilobytes("VmRSS")
backbone = load_backbone(sys.argv[1], dtype=sys.argv[2])
print(1000 * (kilobytes("VmHWM") - before), sum(leaf.nbytes for leaf in jax.tree.leaves(backbone.params)))
"""


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_loading_takes_the_model_and_one_stack(dtype, width, tmp_path):
    """A model of 1 GB, with as many blocks as e and a quarter of its width."""
    e = SIZES["e"]
    size = ModelSize("custom", e.width // 4, e.layers, e.mlp // 4, e.heads)
    shapes = released.backbone_shapes(released.Architecture(size, (16, 224, 224), (2, 16, 16), qk_norm=False))
    path = tmp_path / "e.npz"
    try:
        # Views of one value: this process holds no model.
        np.savez(path, **{f"params/{name}": np.broadcast_to(np.float32(0.01), shape) for name, shape in shapes.items()})
        peak, model = measured([sys.executable, "-c", LOAD, str(path), dtype])
    finally:
        path.unlink()
    assert model == width * sum(int(np.prod(shape)) for shape in shapes.values())
    stack = width * size.layers * size.width * size.mlp
    # JAX itself needs some for what it traces, whatever the model's size.
    assert 0.9 * model < peak < 1.05 * model + stack + 4e7, f"{peak / model:.2f} times the model"


def measured(command: list[str]) -> list[int]:
    result = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    return [int(number) for number in result.stdout.split()]
