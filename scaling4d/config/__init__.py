"""gin at the edge, strict: what a run is configured with is known to be right before anything runs.

Responsible for: putting gin files and ``--gin.`` flags into force, and the resolved text that reproduces a run. Not
responsible for: syntax and files (``syntax.py``), what is refused (``check.py``, ``types.py``) or
what may change at a resume (``changes.py``).

Strict means: every macro is used by a binding, every binding names a parameter of a registered name and has its type,
whether or not this command calls it. gin itself accepts misspelt macros and values of any type, so it only sees
bindings that passed, with macros replaced by their values.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from gin import config as gin_config

from scaling4d.config import syntax, types
from scaling4d.config.changes import Change as Change
from scaling4d.config.changes import diff as diff
from scaling4d.config.check import Check
from scaling4d.config.syntax import Binding, Macro, Reference, did_you_mean, format_value
from scaling4d.errors import UserError


class Flags(NamedTuple):
    """A command line, divided: ``rest`` holds what is not about gin, in its order."""

    gin_files: list[str]
    bindings: list[str]
    search_paths: list[str]
    rest: list[str]


def parse_flags(argv: Sequence[str]) -> Flags:
    """Takes ``--gin_file=F`` (any number), ``--gin.NAME=VALUE``, ``--gin_search_paths=A,B`` out of a command line."""
    flags = Flags([], [], [], [])
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--gin_file", "--gin_search_paths"):
            value = value if equals else next(words, "")
            if not value:
                raise UserError(f"{name} has no value; write {name}=PATH")
            if name == "--gin_file":
                flags.gin_files.append(value)
            else:
                flags.search_paths.extend(path for path in value.split(",") if path)
        elif name.startswith("--gin."):
            flags.bindings.append(word.removeprefix("--gin."))
        else:
            flags.rest.append(word)
    return flags


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration in force.

    Attributes:
      files: the gin files that were read, included ones too.
      imports: modules that gin files import.
      macros: every macro with its value.
      bindings: ``{(scope, full selector, parameter): value}``; values hold References, no macros.
    """

    files: tuple[str, ...]
    imports: tuple[str, ...]
    macros: dict[str, Any]
    bindings: dict[tuple[str, str, str], Any]
    roots: tuple[str, ...]


_in_force: list[Config] = []


def parse(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    roots: Sequence[str] = (),
) -> Config:
    """Checks a configuration and puts it into force in place of the one before.

    Args:
      gin_files: paths, or names in ``search_paths`` or the package (``pretrain/tiny.gin``); later ones win.
      bindings: ``NAME=value`` as after ``--gin.``; they win over files, later ones over earlier ones.
      search_paths: more folders to find gin files in.
      roots: names the command calls without arguments; all they need must be bound.

    Raises:
      UserError: one line about the first thing that is wrong, with the nearest valid name.
    """
    if not gin_files:
        raise UserError("there is no configuration: give --gin_file=pretrain/tiny.gin, another recipe or a path")
    source = syntax.read_files(gin_files, search_paths)
    return _enforce(source, [syntax.flag_binding(text) for text in bindings], roots)


def parse_text(text: str, name: str, roots: Sequence[str] = ()) -> Config:
    """As ``parse``, for the text of one resolved configuration; ``name`` is what messages call it."""
    return _enforce(syntax.read_text(text, name), [], roots)


def value(name: str) -> Any:
    """What ``configurable.parameter`` is bound to, or its default; references are given as Reference."""
    selector, _, parameter = name.rpartition(".")
    found = types.configurable(selector, name)
    bound = _current().bindings
    if ("", found.selector, parameter) in bound:
        return bound["", found.selector, parameter]
    if parameter not in found.parameters:
        raise UserError(f"'{selector}' has no parameter '{parameter}'{did_you_mean(parameter, found.parameters)}")
    return found.parameters[parameter].default


def resolved_config() -> str:
    """gin text that reproduces the configuration in force: imports, then one line a parameter, without macros.

    Holds every name that is bound, referred to or was called, each with all its parameters, defaults too. Sorted by
    name, so that two texts can be compared line by line, and loading the text gives the same text again.
    """
    config = _current()
    lines = [f"import {module}" for module in config.imports]
    for scope, found in _shown(config):
        title = syntax.binding_name(scope, found.short_name, "")
        section = []
        bound = {parameter: v for (s, f, parameter), v in config.bindings.items() if (s, f) == (scope, found.selector)}
        for parameter in [*found.parameters, *sorted(set(bound) - set(found.parameters))]:
            if parameter in bound:
                section.append(f"{title}.{parameter} = {format_value(bound[parameter])}")
            elif not scope and found.parameters[parameter].default is not types.MISSING:
                default = found.parameters[parameter].default
                text = format_value(default)
                unwritable = f"# {title}.{parameter} keeps its default, of type {type(default).__name__}"
                section.append(unwritable if text is None else f"{title}.{parameter} = {text}")
        if section:
            lines += ["", f"# {title}", *section] if lines else [f"# {title}", *section]
    return "\n".join(lines) + "\n"


def _current() -> Config:
    if not _in_force:
        raise RuntimeError("no configuration is in force: config.parse comes first")
    return _in_force[-1]


def _shown(config: Config) -> list[tuple[str, types.Configurable]]:
    """(scope, configurable) of every section of the resolved text, in its order."""
    keys = {(scope, selector) for scope, selector, _ in config.bindings}
    names = {selector for _, selector in keys} | set(config.roots)
    names |= {reference.selector for v in config.bindings.values() for reference in syntax.references(v)}
    names |= {selector for _, selector in gin_config._OPERATIVE_CONFIG}  # what was called
    found = [types.configurable(name, name) for name in names]
    by_selector = {one.selector: one for one in found if not one.selector.startswith("gin.")}
    keys |= {("", selector) for selector in by_selector}
    sections = [(scope, by_selector[selector]) for scope, selector in keys if selector in by_selector]
    return sorted(sections, key=lambda section: (section[1].short_name.lower(), section[1].selector, section[0]))


def _enforce(source: syntax.Source, flags: Sequence[Binding], roots: Sequence[str]) -> Config:
    for statement in source.imports:
        _import(statement)
    check = Check([*source.bindings, *flags])
    for selector, place in source.used:
        types.configurable(selector, place)
    bindings = check.run(roots)
    macros = {name: check.expand(binding.value) for name, binding in check.macros.items()}
    imports = tuple(sorted({statement.module for statement in source.imports}))
    config = Config(tuple(source.files), imports, macros, bindings, tuple(roots))
    gin_config.clear_config()
    for key, v in bindings.items():
        gin_config.bind_parameter(key, syntax.map_value(_for_gin, v))
    _in_force[:] = [config]
    return config


def _for_gin(leaf: Any) -> Any:
    if isinstance(leaf, Reference):
        return gin_config.ConfigurableReference(leaf.name, leaf.call)
    if isinstance(leaf, Macro):
        return gin_config.ConfigurableReference(f"{types.constant(leaf.name)}/gin.constant", True)
    return leaf


def _import(statement: syntax.Import) -> None:
    try:
        importlib.import_module(statement.module)
    except ImportError as error:
        raise UserError(
            f"{statement.place}: import {statement.module} failed: {error}; install it or add its folder to PYTHONPATH"
        ) from error
