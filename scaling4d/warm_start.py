"""The parameters of a new run, taken from weights that exist.

Responsible for: which array of a released file, an export or another run's checkpoint becomes which parameter of this
run, what is resized, what stays fresh, and a report of it. Step, optimizer state and position in the stream start anew.
Not responsible for: taking over another run's whole state (``checkpoints.restore_initial``) or reading weights
(``pretrained/``).

Names are the released ones, which count every block by itself: ``encoder/posenc/embeddings``,
``processor/layers_3/mlp/dense_in/kernel``, ``decoder/coarse_tokens``. Two arrays belong to a size of clip and are
resized where it differs: the position table and the coarse tokens.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from scaling4d.checkpoints import RestoreCheckpointConfig
from scaling4d.errors import UserError
from scaling4d.models import position, released
from scaling4d.models.released import NamedArrays, Shape
from scaling4d.pretrained.weights import open_weights
from scaling4d.trainer import Trainer, TrainState

MOST_LINES = 8
"""Fresh arrays that a report names one by one."""

POSITIONS, COARSE, PIXELS = "encoder/posenc/embeddings", "decoder/coarse_tokens", "decoder/to_pixels/"


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where one parameter's first value comes from.

    Attributes:
      name: this run's array, canonical.
      shape: of it.
      source: the array it is taken from; None leaves it fresh.
      resize: turns the source's array into this one; None takes it as it is.
      note: why it is fresh, or what is resized.
    """

    name: str
    shape: Shape
    source: str | None
    resize: Callable[[np.ndarray], np.ndarray] | None = None
    note: str = ""


class WarmStart:
    """Parameters for ``trainer`` from the weights that ``config.path`` names; nothing but names is read at first.

    Raises:
      UserError: there are no such weights, or they do not fit under the rules of ``config``.
    """

    def __init__(self, config: RestoreCheckpointConfig, trainer: Trainer):
        try:
            self._arrays = open_weights(config.path)
        except UserError as error:
            raise UserError(f"{error}; change --gin.INITIAL_CHECKPOINT_PATH") from None
        self._trainer = trainer
        self._leaves = released.tree_leaves(trainer.abstract_state.params)
        grids = _coarse_grids(self._arrays, trainer)
        self.assignments = assign(_shapes(trainer, self._leaves), self._arrays, config, grids)

    def state(self) -> TrainState:
        """A fresh state with these parameters; their moving average, where the run keeps one, starts from them."""
        state = self._trainer.init_state()
        by_name = {one.name: one for one in self.assignments}
        fresh = dict(released.leaves(state.params))
        shardings = dict(released.leaves(self._trainer.state_shardings.params))
        params = {}
        for name, leaf in self._leaves.items():
            parts = [by_name[part] for part in leaf.names]
            params[name] = self._placed(parts, leaf.stacked, fresh.pop(name), shardings[name])
        params = released.nested(params)
        ema = None if state.ema is None else jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))(params)
        return state.replace(params=params, ema=ema)

    def _placed(self, parts: list[Assignment], stacked: bool, fresh: jax.Array, sharding: Any) -> jax.Array:
        """One parameter on its devices; the host holds no more than this one."""
        taken = np.array([part.source is not None for part in parts])
        if not taken.any():
            return fresh
        host = np.zeros(fresh.shape, fresh.dtype)
        for index, part in enumerate(parts):
            if part.source is not None:
                array = self._arrays.read(part.source)
                host[index if stacked else ...] = part.resize(array) if part.resize else array
        value = jax.make_array_from_callback(host.shape, sharding, lambda piece: host[piece])
        if taken.all():
            return value
        # A stack of which some layers are fresh: these may lie on other hosts, so they are chosen on the devices.
        wanted = taken.reshape(-1, *[1] * (host.ndim - 1))
        return jax.jit(lambda new, old: jax.numpy.where(wanted, new, old), out_shardings=sharding)(value, fresh)

    def report(self) -> list[str]:
        """What was loaded, resized, left fresh and not used, a line each."""
        loaded = [one for one in self.assignments if one.source and not one.resize]
        resized = [one for one in self.assignments if one.resize]
        fresh = [one for one in self.assignments if one.source is None]
        unused = sorted(self._arrays.shapes.keys() - {one.source for one in self.assignments})
        lines = [f"parameters from {self._arrays.source}:"]
        values = sum(int(np.prod(one.shape)) for one in loaded)
        lines += [f"  loaded    {len(loaded)} arrays, {values:,} values"]
        lines += [f"  resized   {one.name}: {one.note}" for one in resized]
        lines += [f"  fresh     {one.name} {one.shape}: {one.note}" for one in fresh[:MOST_LINES]]
        if len(fresh) > MOST_LINES:
            lines += [f"  fresh     and {len(fresh) - MOST_LINES} more"]
        if unused:
            lines += [f"  not used  {len(unused)} arrays of the source, such as {unused[0]}"]
        return lines


def _shapes(trainer: Trainer, leaves: Mapping[str, released.Leaf]) -> dict[str, Shape]:
    """Shapes of the run's parameters by canonical name, in the order in which they are best read."""
    given = dict(released.leaves(trainer.abstract_state.params))
    return {
        part: given[name].shape[1:] if leaf.stacked else given[name].shape
        for name, leaf in leaves.items()
        for part in leaf.names
    }


def _coarse_grids(arrays: NamedArrays, trainer: Trainer) -> tuple[Any, Any]:
    """The coarse token grids (time, height, width) of the source, where it says so, and of the run."""
    theirs = getattr(arrays, "model", {}).get("coarse_grid")
    ours = trainer.objective.model_description().get("coarse_grid")
    return (tuple(theirs) if theirs else None), (tuple(ours) if ours else None)


def assign(
    shapes: Mapping[str, Shape], arrays: NamedArrays, config: RestoreCheckpointConfig, coarse_grids: tuple[Any, Any]
) -> list[Assignment]:
    """Where each of the arrays ``shapes`` comes from; see ``RestoreCheckpointConfig`` for the rules."""
    rules = [(_compiled(pattern), target) for pattern, target in config.assignment_map]
    used_rules: set[int] = set()
    has_decoder = any(name.startswith("decoder/") for name in arrays.shapes)
    found, problems = [], []
    for name, shape in shapes.items():
        number, match = next(((i, m) for i, (rule, _) in enumerate(rules) if (m := rule.fullmatch(name))), (-1, None))
        used_rules.add(number)
        if match and rules[number][1] is None:
            found.append(Assignment(name, shape, None, note="as assignment_map says"))
            continue
        source = _expanded(match, rules[number]) if match else name
        if source not in arrays.shapes:
            is_backbone_alone = name.startswith("decoder/") and not has_decoder and not match
            if not is_backbone_alone:
                problems.append(f"no array '{source}' for '{name}'")
            found.append(Assignment(name, shape, None, note="the source has none"))
            continue
        one = _fitted(name, shape, source, arrays.shapes[source], coarse_grids)
        if one.source is None and not name.startswith(PIXELS):
            problems.append(f"'{source}' has shape {arrays.shapes[source]}, '{name}' here is {shape}")
        found.append(one)
    problems += [f"no array here matches '{rules[i][0].pattern}'" for i in range(len(rules)) if i not in used_rules]
    taken = {one.source for one in found}
    refused = {one.name for one in found if one.source is None}  # its own source is left out on purpose, or named above
    left = [name for name in arrays.shapes.keys() - taken - refused if name.startswith(("encoder/", "processor/"))]
    problems += [f"'{name}' has no place in this model" for name in sorted(left)]
    if problems and config.strict:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        setting = "--gin.RestoreCheckpointConfig"
        raise UserError(f"{arrays.source} does not fit this model: {problems[0]}{more}; map names or leave arrays "
                        f"fresh with {setting}.assignment_map, or take what fits with {setting}.strict=False")
    if not taken - {None}:
        raise UserError(f"{arrays.source}: not one array of it fits this model; change --gin.INITIAL_CHECKPOINT_PATH")
    return found


def _fitted(name: str, shape: Shape, source: str, given: Shape, coarse_grids: tuple[Any, Any]) -> Assignment:
    """The assignment of one array to another: as it is, resized, or fresh where shapes cannot be brought together."""
    if name == POSITIONS and len(given) == 4 and given != shape and given[-1] == shape[-1]:
        note = f"{_text(given[:3])} -> {_text(shape[:3])} cells"
        return Assignment(name, shape, source, lambda table: np.asarray(position.resize_table(table, shape[:3])), note)
    theirs, ours = coarse_grids
    if name == COARSE and theirs and ours and theirs != ours and given == (int(np.prod(theirs)), shape[-1]):

        def resize(tokens: np.ndarray) -> np.ndarray:
            return np.asarray(position.resize_table(tokens.reshape(*theirs, -1), ours)).reshape(shape)

        return Assignment(name, shape, source, resize, f"{_text(theirs)} -> {_text(ours)} cells")
    if given != shape:
        return Assignment(name, shape, None, note=f"the source's is {given}")
    return Assignment(name, shape, source)


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"RestoreCheckpointConfig.assignment_map: '{pattern}' is no regular expression ({error})"
        ) from None


def _expanded(match: re.Match, rule: tuple[re.Pattern, str]) -> str:
    try:
        return match.expand(rule[1])
    except (re.error, IndexError) as error:
        raise UserError(
            f"RestoreCheckpointConfig.assignment_map: '{rule[1]}' does not go with '{rule[0].pattern}' ({error})"
        ) from None


def _text(grid: Shape) -> str:
    return "x".join(map(str, grid))
