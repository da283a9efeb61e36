"""Files in the released layout that tests write, with random weights in which nothing is trivial.

Responsible for: names and values of such files; the shapes come from ``models/`` (which other tests hold against the
published inventory). Scales are around 1, biases and tables away from 0, kernels such that activations keep their size.
"""

import pathlib
from collections.abc import Mapping

import numpy as np

from scaling4d.models import readouts, released
from scaling4d.models.patches import Grid, block_grid
from scaling4d.models.sizes import ModelSize

SMALL = ModelSize("custom", width=24, layers=4, mlp=40, heads=4)
CLIP = (8, 32, 48)


def backbone_values(
    size: ModelSize = SMALL, clip: Grid = CLIP, patch: Grid = (2, 16, 16), qk_norm: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """A backbone's arrays by canonical name, float32."""
    shapes = released.backbone_shapes(released.Architecture(size, clip, patch, qk_norm))
    return _random(shapes, seed)


def readout_values(
    size: ModelSize = SMALL, clip: Grid = CLIP, width: int = 32, heads: int = 4, seed: int = 1
) -> dict[str, np.ndarray]:
    """The arrays of a depth readout for that backbone by canonical name, float32."""
    queries = int(np.prod(block_grid(clip, readouts.DEPTH_BLOCK)))
    outputs = int(np.prod(readouts.DEPTH_BLOCK))
    found = readouts.ReadoutArchitecture(size.width, clip[0], width, heads, queries, outputs)
    return _random(found.shapes(), seed)


def write_backbone(path: pathlib.Path, values: Mapping[str, np.ndarray]) -> pathlib.Path:
    """The backbone-only form; arrays in the order of their names, ``layers_10`` before ``layers_2``."""
    np.savez(path, **{f"params/{name}": values[name] for name in sorted(values)})
    return path


def write_depth(
    path: pathlib.Path, backbone: Mapping[str, np.ndarray], readout: Mapping[str, np.ndarray]
) -> pathlib.Path:
    """The form with a readout: the backbone under layers_0, the readout under layers_2."""
    keys = {f"params/layers_0/{name}": array for name, array in backbone.items()}
    keys |= {f"params/layers_2/{name.removeprefix(readouts.PREFIX)}": array for name, array in readout.items()}
    np.savez(path, **{key: keys[key] for key in sorted(keys)})
    return path


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("scale"):
            return 1 + 0.3 * values
        if name.endswith("kernel"):
            contracted = shape[:-2] if len(shape) == 3 and not name.endswith("out/kernel") else shape[:-1]
            return values / np.float32(np.sqrt(np.prod(contracted)))
        return 0.3 * values

    return {name: one(name, shape) for name, shape in shapes.items()}
