"""SimpleMAE: predict all pixels of a clip from 5% of its patches (arXiv 2412.15212).

Responsible for: masks, targets, the loss, its baselines, pictures, and what a run has to say of itself. Not
responsible for: the network (``models/video_mae.py``) or how it is optimized and placed on devices.

Clips arrive as bytes and stay bytes until they are needed: visible patches are cut out of the bytes, and the target
is folded as bytes, so that the float32 clip never has to exist in memory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from scaling4d.errors import UserError
from scaling4d.models import patches
from scaling4d.models.backbone import CHANNELS
from scaling4d.models.sizes import ModelSize
from scaling4d.models.video_mae import VideoMAE
from scaling4d.objectives import baselines, masking
from scaling4d.objectives.objective import Batch, Params

LOSS_ON = ("all", "masked")
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class SimpleMAE:
    """The objective; see ``objective.Objective`` for its methods.

    Attributes:
      model: the network, with its clip and patch sizes.
      seed: of the masks.
      mask_ratio: the share of patches that is dropped.
      masking: 'random' or 'tube', see ``masking.visible_tokens``.
      loss_on: 'all' pixels of the clip, or those of 'masked' patches only.
      normalize_targets: predict each coarse block's pixels with mean 0 and deviation 1 in each channel, as VideoMAE
        does for its patches (arXiv 2203.12602), instead of pixels in [0, 1]. There is then no reconstruction in
        pixels without the true statistics: metrics in pixel space are left out and previews borrow them.
    """

    model: VideoMAE
    seed: int = 0
    mask_ratio: float = 0.95
    masking: str = "random"
    loss_on: str = "all"
    normalize_targets: bool = False
    name: str = dataclasses.field(default="simple_mae", init=False)

    def __post_init__(self) -> None:
        self.model.check()
        masking.visible_count(self.model.patch_grid, self.mask_ratio, self.masking)
        if self.loss_on not in LOSS_ON:
            raise UserError(f"loss_on {self.loss_on!r} is not known: it is one of {', '.join(LOSS_ON)}")

    @property
    def visible_count(self) -> int:
        """Visible tokens of a clip."""
        return masking.visible_count(self.model.patch_grid, self.mask_ratio, self.masking)

    def visible(self, index: jax.Array) -> jax.Array:
        """Visible tokens, int32 ``[batch, visible_count]``, of the examples ``index`` (uint32 ``[batch, 2]``)."""
        return masking.visible_tokens(self.seed, index, self.model.patch_grid, self.mask_ratio, self.masking)

    def init(self, rng: jax.Array) -> dict[str, Params]:
        """Boxed initial parameters; jit it to skip the forward pass that flax traces for the shapes."""
        video = jnp.zeros((1, *self.model.clip, CHANNELS), jnp.uint8)
        return self.model.init(rng, video, jnp.zeros((1, self.visible_count), jnp.int32))

    def loss(self, params: Params, batch: Batch, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See ``Objective.loss``; training and evaluation differ in nothing (no dropout, masks by index).

        Metrics: 'loss'; 'max_logit', the largest attention logit; and, unless targets are normalized, errors over
        the whole clip in [0, 1] units squared: 'mse' of the prediction, 'mse_mean_color' and 'mse_nearest_visible'
        of the baselines, and 'fvu' = mse / mse_mean_color, the fraction of the clips' own color variance that is left
        unexplained (a ratio of means over the batch).
        """
        del train
        video = batch["video"]
        visible = self.visible(batch["index"])
        predicted, sown = self.model.apply({"params": params}, video, visible, mutable=["intermediates"])
        target = self._target(video)
        errors = jnp.square(predicted - (self._normalize(target) if self.normalize_targets else target))
        weight = batch.get("weight", jnp.ones(video.shape[0], jnp.float32))

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), EPSILON)

        clip_errors = errors.mean(axis=(1, 2))
        loss = mean(self._masked_mean(errors, visible) if self.loss_on == "masked" else clip_errors)
        logits = jnp.concatenate(jax.tree.leaves(sown))  # [layer, example]
        largest = jnp.max(jnp.where(weight > 0, logits, -jnp.inf))
        metrics = {"loss": loss, "max_logit": jnp.where(jnp.any(weight > 0), largest, 0.0)}
        if not self.normalize_targets:
            means, deviations = baselines.patch_colors(video, self.model.patch)
            nearest = baselines.nearest_visible_error(means, deviations, visible, self.model.patch_grid)
            metrics["mse"] = mean(clip_errors)
            metrics["mse_mean_color"] = mean(baselines.mean_color_error(means, deviations))
            metrics["mse_nearest_visible"] = mean(nearest)
            metrics["fvu"] = metrics["mse"] / jnp.maximum(metrics["mse_mean_color"], EPSILON)
        return loss, metrics

    def _target(self, video: jax.Array) -> jax.Array:
        """float32 ``[batch, coarse tokens, values]`` in [0, 1]."""
        target = patches.unit_range(patches.fold(video, self.model.coarse_block))
        return nn.with_logical_constraint(target, ("batch", "length", "pixels"))

    def _statistics(self, target: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and deviation (unbiased, as VideoMAE's) of each channel of each block, repeated for its pixels."""
        pixels = target.reshape(*target.shape[:2], -1, CHANNELS)

        def repeat(values: jax.Array) -> jax.Array:
            return jnp.broadcast_to(values, pixels.shape).reshape(target.shape)

        deviation = pixels.std(axis=2, ddof=1, keepdims=True)
        return repeat(pixels.mean(axis=2, keepdims=True)), repeat(deviation + EPSILON)

    def _normalize(self, target: jax.Array) -> jax.Array:
        mean, deviation = self._statistics(target)
        return (target - mean) / deviation

    def _visible_pixels(self, visible: jax.Array) -> jax.Array:
        """bool ``[batch, time, height, width, 1]``: the pixels of visible patches."""
        time, height, width = self.model.patch_grid
        shown = jnp.zeros((len(visible), time * height * width), bool)
        shown = jax.vmap(lambda row, tokens: row.at[tokens].set(True))(shown, visible)
        shown = shown.reshape(-1, time, height, width, 1)
        for axis, size in enumerate(self.model.patch, start=1):
            shown = jnp.repeat(shown, size, axis=axis)
        return shown

    def _masked_mean(self, errors: jax.Array, visible: jax.Array) -> jax.Array:
        """Mean of squared errors over the pixels of masked patches, float32 ``[batch]``."""
        hidden = patches.fold(~self._visible_pixels(visible), self.model.coarse_block)
        errors = errors.reshape(*hidden.shape, CHANNELS).mean(axis=-1)
        return (errors * hidden).sum(axis=(1, 2)) / jnp.maximum(hidden.sum(axis=(1, 2)), 1)

    def previews(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """'input', 'masked' (hidden patches gray), 'reconstruction' (the prediction of every pixel, clipped).

        With normalized targets the prediction is scaled back with the true mean and deviation of each block, which
        flatters it.
        """
        video = batch["video"]
        visible = self.visible(batch["index"])
        predicted = self.model.apply({"params": params}, video, visible)
        if self.normalize_targets:
            mean, deviation = self._statistics(self._target(video))
            predicted = predicted * deviation + mean
        blocks = jnp.round(jnp.clip(predicted, 0, 1) * 255).astype(jnp.uint8)
        return {
            "input": video,
            "masked": jnp.where(self._visible_pixels(visible), video, jnp.uint8(128)),
            "reconstruction": patches.unfold(blocks, self.model.decoder_grid, self.model.coarse_block),
        }

    def outlined(self, batch: Batch) -> np.ndarray:
        """See ``Objective.outlined``: a line around every visible patch."""
        from scaling4d.observe import previews

        return np.asarray(previews.outline_visible(batch["video"], self.visible(batch["index"]), self.model.patch))

    def flops_per_example(self) -> float:
        """Three times the forward pass; products only (a multiply-add is 2), no recomputation counted.

        A block on n tokens costs 2n (4 D^2 + 2 D M) for its weights and 4 n^2 D for attention.
        """
        size, (pt, ph, pw), (bt, bh, bw) = self.model.size, self.model.patch, self.model.coarse_block
        seen, coarse = self.visible_count, int(np.prod(self.model.decoder_grid))

        def block(tokens: int) -> int:
            return 2 * tokens * (4 * size.width**2 + 2 * size.width * size.mlp) + 4 * tokens**2 * size.width

        forward = (size.layers - self.model.joint_layers) * block(seen) + self.model.joint_layers * block(seen + coarse)
        forward += 2 * seen * pt * ph * pw * CHANNELS * size.width + 2 * coarse * bt * bh * bw * CHANNELS * size.width
        return 3.0 * forward

    def model_description(self) -> dict[str, Any]:
        """JSON values that say what the model is and how it was trained to reconstruct."""
        model, size = self.model, self.model.size
        return {
            "objective": self.name,
            "size": size.name, "width": size.width, "layers": size.layers, "mlp": size.mlp, "heads": size.heads,
            "clip": list(model.clip), "patch": list(model.patch), "coarse_grid": list(model.decoder_grid),
            "position_init": model.position_init, "position_amplitude": model.amplitude,
            "joint_layers": model.joint_layers, "qk_norm": model.qk_norm,
            "normalization": "[0,1]",
            "mask_ratio": self.mask_ratio, "masking": self.masking, "mask_seed": self.seed,
            "loss_on": self.loss_on, "normalize_targets": self.normalize_targets,
        }


def simple_mae_from(description: Mapping[str, Any], source: str) -> SimpleMAE:
    """The objective that ``SimpleMAE.model_description`` described, such as in a run's ``model.json``.

    The model computes in float32: what a run computed in is no part of its description.

    Args:
      description: JSON values; keys of others are passed over.
      source: where they are from, for messages.

    Raises:
      UserError: they describe another objective, or not all of this one.
    """
    said = description.get("objective")
    if said != SimpleMAE.name:
        raise UserError(f"{source} describes the objective {said!r}; {SimpleMAE.name!r} is the one that is known here")
    try:
        width, layers, mlp, heads, joint_layers = (
            _positive(description[key]) for key in ("width", "layers", "mlp", "heads", "joint_layers")
        )
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        size = ModelSize(str(description["size"]), width, layers, mlp, heads)
        clip, patch, coarse_grid = (
            tuple(map(_positive, description[key])) for key in ("clip", "patch", "coarse_grid")
        )
        positions = (description["position_init"], description["position_amplitude"])
        model = VideoMAE(size, clip, patch, coarse_grid, *positions, joint_layers, description["qk_norm"])
        settings = {key: description[key] for key in ("mask_ratio", "masking", "loss_on", "normalize_targets")}
        objective = SimpleMAE(model, seed=description["mask_seed"], **settings)
        wrong = [key for key, value in objective.model_description().items() if description.get(key) != value]
    except KeyError as error:
        raise UserError(f"{source} does not say {error}: it is not the model.json that a run wrote") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{source} holds values that describe no model ({error}); restore it from the run") from error
    if wrong:
        raise UserError(f"{source}: {wrong[0]} is {description.get(wrong[0])!r}, which this version cannot build")
    return objective


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no positive number")
    return value
