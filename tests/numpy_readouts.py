"""The attention readout and the resize in time in plain NumPy float64, written from their description, sharing no code.

Responsible for: an independent answer that tests compare ``models/readouts.py`` with. Takes trees of arrays with the
released names.
"""

import math

import numpy as np


def keys(distance):
    """The cubic kernel of Keys with a = -0.5."""
    d = abs(distance)
    if d <= 1:
        return 1.5 * d**3 - 2.5 * d**2 + 1
    if d < 2:
        return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return 0.0


def time_matrix(source, target):
    """[target, source] weights; where target < source the kernel is stretched over the moments it replaces."""
    stretch = max(source / target, 1.0)
    matrix = np.zeros((target, source))
    for row in range(target):
        center = (row + 0.5) * source / target - 0.5
        for column in range(source):
            matrix[row, column] = keys((column - center) / stretch)
        matrix[row] = matrix[row] / sum(matrix[row])
    return matrix


def resize_time(features, frames):
    matrix = time_matrix(features.shape[1], frames)
    out = np.zeros((features.shape[0], frames, *features.shape[2:]))
    for row in range(frames):
        for column in range(features.shape[1]):
            out[:, row] += matrix[row, column] * features[:, column]
    return out


def norm(x, params):
    x = x - x.mean(axis=-1)[..., None]
    return x / np.sqrt((x**2).mean(axis=-1) + 1e-6)[..., None] * params["scale"] + params["bias"]


def dense(x, params):
    return x @ params["kernel"] + params["bias"]


def gelu(x):
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def attention_readout(features, params):
    """[batch, frames, cells, features] -> [batch, queries, outputs], one example, head and query block at a time."""
    queries, heads, channels = params["query"].shape
    answers = []
    for example in features:
        x = norm(example, params["LayerNorm_0"]) + params["temporal_posenc"]["embeddings"]
        x = np.concatenate(list(x))  # frame after frame
        attended = []
        for head in range(heads):
            key, value = (
                x @ params[name]["kernel"][:, head, :] + params[name]["bias"][head]
                for name in ("key_embedding", "value_embedding")
            )
            logits = params["query"][:, head] @ key.T / math.sqrt(channels)
            weights = np.exp(logits - logits.max(axis=1)[:, None])
            attended.append(weights / weights.sum(axis=1)[:, None] @ value)
        z = params["query"].reshape(queries, -1) + dense(np.concatenate(attended, axis=1), params["Dense_0"])
        hidden = gelu(dense(norm(z, params["LayerNorm_1"]), params["MLP_0"]["Dense_0"]))
        z = z + dense(hidden, params["MLP_0"]["Dense_1"])
        answers.append(dense(z, params["Dense_1"]))
    return np.stack(answers)


def depth(features, params, grid):
    """[batch, time, height, width, 1] from queries on a (t, h, w) grid, each a block of 2 x 8 x 8 pixels."""
    answers = attention_readout(features, params)
    video = np.zeros((len(features), 2 * grid[0], 8 * grid[1], 8 * grid[2], 1))
    number = 0
    for t in range(grid[0]):
        for h in range(grid[1]):
            for w in range(grid[2]):
                block = answers[:, number].reshape(-1, 2, 8, 8, 1)
                video[:, 2 * t : 2 * t + 2, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8] = block
                number += 1
    return video
