"""A released file run in plain NumPy float64 from its own keys, written from their description, sharing no code.

Responsible for: an independent answer to what a file's backbone and depth readout compute, in both layouts of keys,
also for clips of another size than the file's. Everything about the network is read from the file's arrays.
"""

import pathlib

import numpy as np

from tests import numpy_readouts

Arrays = dict[str, np.ndarray]


def load(path: pathlib.Path) -> Arrays:
    """Every array under its key without ``params/``; those of a backbone without ``layers_0/`` as well."""
    with np.load(path) as file:
        arrays = {key.split("/", 1)[1]: file[key].astype(np.float64) for key in file.files}
    return {key[9:] if key[:9] == "layers_0/" else key: array for key, array in arrays.items()}


def _norm(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * arrays[f"{name}/scale"] + arrays.get(
        f"{name}/bias", 0.0
    )


def _dense(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    """The last axes of x that the kernel's first axes are."""
    kernel, bias = arrays[f"{name}/kernel"], arrays[f"{name}/bias"]
    return np.tensordot(x, kernel, axes=kernel.ndim - bias.ndim) + bias


def _block(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    y = _norm(x, arrays, f"{name}/attention_norm")
    query, key, value = (_dense(y, arrays, f"{name}/attention/{part}") for part in ("query", "key", "value"))
    if f"{name}/attention/query_norm/scale" in arrays:
        query = _norm(query, arrays, f"{name}/attention/query_norm")
        key = _norm(key, arrays, f"{name}/attention/key_norm")
    logits = np.einsum("bqhc,bkhc->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + _dense(np.einsum("bhqk,bkhc->bqhc", weights, value), arrays, f"{name}/attention/out")
    hidden = _dense(_norm(x, arrays, f"{name}/mlp_norm"), arrays, f"{name}/mlp/dense_in")
    return x + _dense(numpy_readouts.gelu(hidden), arrays, f"{name}/mlp/dense_out")


def _resized(table: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Cubic, one axis after the other; numbers of cells as in ``grid``."""
    for axis, cells in enumerate(grid):
        if table.shape[axis] != cells:
            matrix = numpy_readouts.time_matrix(table.shape[axis], cells)
            table = np.moveaxis(np.tensordot(matrix, table, axes=(1, axis)), 0, axis)
    return table


def taps(arrays: Arrays, video: np.ndarray) -> list[np.ndarray]:
    """[tokens, input of block 0, ..., input of the last block], each [batch, tokens, width]; bytes are divided by 255.

    The table of positions is resized where the video has another size than the clips it was made for.
    """
    video = video / 255 if video.dtype == np.uint8 else video.astype(np.float64)
    kernel = arrays["encoder/patch_embedding/Conv_0/kernel"]
    t, h, w = kernel.shape[:3]
    grid = (video.shape[1] // t, video.shape[2] // h, video.shape[3] // w)
    table = _resized(arrays["encoder/posenc/embeddings"], grid)
    tokens = np.zeros((len(video), *grid, kernel.shape[-1]))
    for i, j, k in np.ndindex(*grid):
        patch = video[:, i * t : i * t + t, j * h : j * h + h, k * w : k * w + w]
        tokens[:, i, j, k] = np.tensordot(patch, kernel, axes=4) + table[i, j, k]
    x = tokens.reshape(len(video), -1, kernel.shape[-1]) + arrays["encoder/patch_embedding/Conv_0/bias"]
    layers = len({key.split("/")[1] for key in arrays if key.startswith("processor/")})
    inputs = [x]
    for layer in range(layers):
        inputs.append(x)
        x = _block(x, arrays, f"processor/layers_{layer}")
    return inputs


def features(arrays: Arrays, video: np.ndarray, depth: float) -> np.ndarray:
    """[batch, frames, patches of a frame, width] of the tap at ``depth`` of the model."""
    every = taps(arrays, video)
    tap = every[int(len(every) * depth) - 1]
    frames = video.shape[1] // arrays["encoder/patch_embedding/Conv_0/kernel"].shape[0]
    return numpy_readouts.resize_time(tap.reshape(len(video), frames, -1, tap.shape[-1]), video.shape[1])


def depth(arrays: Arrays, video: np.ndarray, trained: tuple[int, int, int]) -> np.ndarray:
    """[batch, time, height, width, 1] from a file with a depth readout for clips of ``trained`` size."""
    readout: dict = {}
    for key, array in arrays.items():
        if key.startswith("layers_2/"):
            *folders, last = key.split("/")[1:]
            place = readout
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = array
    old, new = ([size[0] // 2, size[1] // 8, size[2] // 8] for size in (trained, video.shape[1:4]))
    heads = readout["query"].shape[1:]
    readout["query"] = _resized(readout["query"].reshape(*old, *heads), tuple(new)).reshape(-1, *heads)
    table = readout["temporal_posenc"]["embeddings"]
    readout["temporal_posenc"]["embeddings"] = _resized(table, (video.shape[1],))
    return numpy_readouts.depth(features(arrays, video, 0.95), readout, new)
