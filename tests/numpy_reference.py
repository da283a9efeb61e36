"""The video MAE in plain NumPy float64, written from the description of the released network and sharing no code.

Responsible for: an independent answer that tests compare the model with. Takes trees of arrays as they are in the
model's parameters, the stacks of blocks with their leading axis.
"""

import numpy as np


def layer_norm(x, params):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def attention(x, params):
    out = np.zeros_like(x)
    heads = params["query"]["kernel"].shape[1]
    for head in range(heads):
        query, key, value = (
            x @ params[name]["kernel"][:, head] + params[name]["bias"][head] for name in ("query", "key", "value")
        )
        logits = query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        out = out + weights @ value @ params["out"]["kernel"][head]
    return out + params["out"]["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def block(x, params):
    x = x + attention(layer_norm(x, params["attention_norm"]), params["attention"])
    hidden = layer_norm(x, params["mlp_norm"]) @ params["mlp"]["dense_in"]["kernel"] + params["mlp"]["dense_in"]["bias"]
    return x + gelu(hidden) @ params["mlp"]["dense_out"]["kernel"] + params["mlp"]["dense_out"]["bias"]


def unstack(stack, layer):
    return {k: unstack(v, layer) if isinstance(v, dict) else v[layer] for k, v in stack.items()}


def layers(stack):
    return len(stack["attention_norm"]["scale"])


def embed(video, params):
    """All tokens of clips in [0, 1], by the definition of a convolution whose stride is its kernel."""
    kernel, bias = params["patch_embedding"]["Conv_0"]["kernel"], params["patch_embedding"]["Conv_0"]["bias"]
    table = params["posenc"]["embeddings"]
    (t, h, w), (nt, nh, nw) = kernel.shape[:3], table.shape[:3]
    tokens = []
    for i in range(nt):
        for j in range(nh):
            for k in range(nw):
                patch = video[:, i * t : (i + 1) * t, j * h : (j + 1) * h, k * w : (k + 1) * w]
                tokens.append(np.tensordot(patch, kernel, axes=4) + bias + table[i, j, k])
    return np.stack(tokens, axis=1)


def video_mae(video, visible, params):
    """Pixels of every coarse block; ``video`` float64 in [0, 1], ``visible`` [batch, kept]."""
    tokens = embed(video, params["encoder"])
    x = np.stack([example[chosen] for example, chosen in zip(tokens, visible, strict=True)])
    for layer in range(layers(params["processor"]["trunk"])):
        x = block(x, unstack(params["processor"]["trunk"], layer))
    coarse = params["decoder"]["coarse_tokens"]
    x = np.concatenate([x, np.broadcast_to(coarse, (len(x), *coarse.shape))], axis=1)
    for layer in range(layers(params["processor"]["joint"])):
        x = block(x, unstack(params["processor"]["joint"], layer))
    return x[:, -len(coarse) :] @ params["decoder"]["to_pixels"]["kernel"] + params["decoder"]["to_pixels"]["bias"]


def backbone_taps(video, params):
    """[tokens, input of block 0, ..., input of the last block]."""
    x = embed(video, params["encoder"])
    taps = [x]
    for layer in range(layers(params["processor"]["trunk"])):
        taps.append(x)
        x = block(x, unstack(params["processor"]["trunk"], layer))
    return taps
