"""What may change when a run is resumed.

Responsible for: the difference of two resolved configurations and the one table of what leaves the run the same run.
Not responsible for: writing or checking configurations (``__init__.py``).
"""

import dataclasses
import fnmatch
from collections.abc import Iterable

from scaling4d.config import syntax, types
from scaling4d.config.syntax import format_value, references
from scaling4d.errors import UserError

MAY_CHANGE: tuple[str, ...] = (
    # where the run is, how long it is, and how many clips a step takes
    "train.model_dir",
    "train.total_steps",
    "train.batch_size",
    "train.microbatches",
    # what is looked at and kept on the way
    "train.*_period",
    "train.eval_examples",
    "train.preview_examples",
    "train.writers",
    "*Writer.*",
    "SaveCheckpointConfig.*",
    # how the work is laid out on devices and threads
    "Partitioner.*",
    # what happens when a step is no good
    "Guard.on_*",
    "Guard.in_a_row",
    "Guard.max_rewinds",
    "train.stall_*",
    "train.profile_steps",
    "VideoMAE.remat",
    # where the clips lie; that they are the same clips, at the same rates, is checked by the plan in the checkpoint
    "ClipData.task",
    "ClipData.directory",
    # clips that are not used, and how many bad ones are borne
    "ClipData.blocked",
    "ClipData.max_bad_share",
    "ClipData.threads",
    "ClipData.workers",
    "ClipData.prefetch",
)
"""Patterns of ``configurable.parameter``. A name that is used through such parameters alone may change with them."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One parameter that differs; ``old`` or ``new`` is None on the side that does not have it."""

    name: str
    old: str | None
    new: str | None
    allowed: bool


def diff(old_text: str, new_text: str) -> list[Change]:
    """The changes from one resolved configuration to another, sorted by name; comments and order do not count.

    A parameter that only the new text has may appear with its default: the version that wrote the old text had none.
    """
    old, new = _Bindings(old_text, "the run's configuration"), _Bindings(new_text, "the new configuration")
    changes = []
    for name in sorted(old.texts.keys() | new.texts.keys()):
        was, now = old.texts.get(name), new.texts.get(name)
        if was != now:
            incidental = old.incidental(name) and new.incidental(name)
            is_new_default = was is None and now == _default(name)
            changes.append(Change(name, was, now, _listed(name) or incidental or is_new_default))
    return changes


def _listed(name: str) -> bool:
    """True if the table lists the parameter, whatever its scope and module."""
    short = ".".join(name.rpartition("/")[2].split(".")[-2:])
    return any(fnmatch.fnmatchcase(short, pattern) for pattern in MAY_CHANGE)


def _default(name: str) -> str | None:
    """The default of a parameter: a later version that adds one goes on as before with it."""
    selector, _, parameter = name.rpartition("/")[2].rpartition(".")
    try:
        found = types.configurable(selector, name)
    except UserError:  # of a package that is not there any more
        return None
    return format_value(found.parameters[parameter].default) if parameter in found.parameters else None


def _owner(name: str) -> str:
    """The configurable of a binding or of a reference, without scope and module."""
    return name.rpartition("/")[2].split(".")[-1]


class _Bindings:
    """The bindings of one text and who refers to whom."""

    def __init__(self, text: str, title: str):
        bindings = syntax.read_text(text, title).bindings
        self.texts = {b.name: format_value(b.value) for b in bindings if b.parameter}
        uses = [(b, _owner(reference.name)) for b in bindings for reference in references(b.value)]
        self._referred = {used for _, used in uses}
        self._essential = self._reachable((_owner(b.selector), used) for b, used in uses if not _listed(b.name))

    def incidental(self, name: str) -> bool:
        """True if the name's configurable is absent here, or used only through parameters that may change."""
        owner = _owner(name.rpartition(".")[0])
        present = any(_owner(other.rpartition(".")[0]) == owner for other in self.texts)
        return not present or (owner in self._referred and owner not in self._essential)

    def _reachable(self, edges: Iterable[tuple[str, str]]) -> set[str]:
        """Configurables that a root (one nobody refers to) reaches over the edges."""
        edges = list(edges)
        reached = {user for user, _ in edges if user not in self._referred}
        while more := {used for user, used in edges if user in reached} - reached:
            reached |= more
        return reached
