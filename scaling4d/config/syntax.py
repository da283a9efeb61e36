"""gin text: from files and command-line bindings to statements, and values back to text.

Responsible for: finding gin files (in the package, in search paths, as paths), includes, syntax errors with file and
line, and bare strings on the command line. Not responsible for: what the names mean (``types.py``) or for
putting anything into force (``__init__.py``). Text is only ever parsed: no value is evaluated, no module imported.
"""

import dataclasses
import difflib
import importlib.resources
import io
import math
import os
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from etils import epath
from gin import config_parser

from scaling4d.errors import UserError


@dataclasses.dataclass(frozen=True)
class Reference:
    """``@scope/name`` (the configurable itself) or ``@scope/name()`` (what it returns)."""

    name: str
    call: bool

    @property
    def selector(self) -> str:
        return self.name.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Macro:
    """``%NAME``: the value that ``NAME = ...`` set, or a constant that Python registered with gin."""

    name: str


REQUIRED = Macro("gin.REQUIRED")


@dataclasses.dataclass(frozen=True)
class Binding:
    """``scope/selector.parameter = value``, or a macro's ``NAME = value`` where ``parameter`` is empty.

    Attributes:
      place: ``file:line`` or the flag, for messages.
      text: what stood on the command line; None for a file's binding.
      bare: the command line's text is no gin value and was taken for a string.
    """

    scope: str
    selector: str
    parameter: str
    value: Any
    place: str
    text: str | None = None
    bare: bool = False

    @property
    def name(self) -> str:
        return binding_name(self.scope, self.selector, self.parameter)


@dataclasses.dataclass(frozen=True)
class Import:
    module: str
    place: str


@dataclasses.dataclass
class Source:
    """All statements of some gin files in their order, and the files (with the included ones) they came from."""

    imports: list[Import] = dataclasses.field(default_factory=list)
    bindings: list[Binding] = dataclasses.field(default_factory=list)
    used: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Selector and place of ``name:`` block headers, which must exist even if the block were empty."""
    files: list[str] = dataclasses.field(default_factory=list)


def binding_name(scope: str, selector: str, parameter: str) -> str:
    """The text left of the equals sign."""
    return f"{scope}/" * bool(scope) + selector + f".{parameter}" * bool(parameter)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the nearest known name (case and underscores count little), or nothing."""
    plain: dict[str, str] = {}
    for candidate in sorted(known):
        plain.setdefault(candidate.lower().replace("_", ""), candidate)
    near = difflib.get_close_matches(name.lower().replace("_", ""), plain, n=1, cutoff=0.6)
    return f"; did you mean '{plain[near[0]]}'?" if near else ""


def read_files(gin_files: Sequence[str], search_paths: Sequence[str] = ()) -> Source:
    """Reads gin files and what they include.

    A file is looked for as a path, then in the search paths, then in the package; an included file beside the file that
    includes it, then in the search paths and the package, so that recipes work from any current directory.
    """
    source = Source()
    for name in gin_files:
        _read_file(find_file(name, "", search_paths), search_paths, source, ())
    return source


def read_text(text: str, name: str) -> Source:
    """Statements of a text that includes nothing, such as a resolved configuration."""
    source = Source()
    for statement in _statements(text, name):
        if isinstance(statement, config_parser.IncludeStatement):
            raise UserError(f"{name}:{statement.location.line_num}: a resolved configuration includes no files")
        _add(statement, name, source)
    return source


def find_file(name: str, beside: str, search_paths: Sequence[str]) -> epath.Path:
    """The first existing file of that name; raises UserError with the nearest ones when there is none."""
    package = epath.Path(str(importlib.resources.files("scaling4d.gin_configs")))
    roots = [epath.Path(beside), *map(epath.Path, search_paths), package]
    path = epath.Path(name).expanduser()
    for candidate in [path] if path.is_absolute() or "://" in name else [root / path for root in roots]:
        if candidate.exists() and not candidate.is_dir():
            return candidate
    known = []
    for root in roots[not beside :]:  # the current directory may hold anything
        for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir())) if root.is_dir() else ():
            known += [os.path.relpath(file, root) for file in folder.glob("*.gin")]
    hint = did_you_mean(name, known)
    if not hint and known:
        hint = f"; there are {', '.join(sorted(known))}"
    raise UserError(f"no gin file '{name}'{hint} (--gin_search_paths adds folders)")


def flag_binding(text: str) -> Binding:
    """The binding of ``NAME=value`` or ``scope/configurable.parameter=value`` as it stood after ``--gin.``.

    A value that is not gin syntax is a bare string (``/tmp/run``), unless it starts like a gin value that went wrong.
    """
    key, equals, given = text.partition("=")
    key, given = key.strip(), given.strip()
    place = f"--gin.{key}"
    if not equals or not given:
        raise UserError(f"{place} has no value; write {place}=VALUE")
    scope, selector, parameter = _split_key(key, place)
    value, bare = given, False
    try:
        value = parse_value(given)
    except SyntaxError as error:
        if given[0] in "@%\"'([{":
            raise UserError(f"{place}={given}: not a gin value ({_last_line(error.msg)})") from error
        bare = True
    return Binding(scope, selector, parameter, value, place, text=given, bare=bare)


def parse_value(text: str) -> Any:
    """One gin value; raises SyntaxError when the text is anything else (also a value with a comment after it)."""
    try:
        if any(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline)):
            raise SyntaxError("unexpected '#'")
        parser = config_parser.ConfigParser(text, _Delegate())
        value = parser.parse_value()
        rest = parser.current_token
        if rest.type not in (tokenize.NEWLINE, tokenize.ENDMARKER) or rest.string.strip():
            raise SyntaxError(f"unexpected '{rest.string}'")
        return value
    except tokenize.TokenError as error:
        raise SyntaxError(str(error.args[0])) from error
    except UnicodeDecodeError as error:  # Python 3.12 and later, of a letter behind a carriage return
        raise SyntaxError("a character cannot be read here") from error


def format_value(value: Any) -> str | None:
    """The gin text that parses back to ``value``; None where gin has none (objects, NaN)."""
    if isinstance(value, Reference):
        return f"@{value.name}" + "()" * value.call
    if isinstance(value, Macro):
        return f"%{value.name}"
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    if type(value) is float:
        if math.isinf(value):
            return "1e999" if value > 0 else "-1e999"  # gin has no name for infinity; this overflows to it
        return None if math.isnan(value) else repr(value)
    if type(value) in (tuple, list):
        items = [text for item in value if (text := format_value(item)) is not None]
        if len(items) < len(value):
            return None
        inside = ", ".join(items)
        return f"[{inside}]" if type(value) is list else f"({inside}{',' * (len(items) == 1)})"
    if type(value) is dict:
        pairs = [(format_value(key), format_value(item)) for key, item in value.items()]
        if any(None in pair for pair in pairs):
            return None
        return "{" + ", ".join(f"{key}: {item}" for key, item in pairs) + "}"
    return None


def map_value(function: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to everything inside tuples, lists and dicts that is none of these."""
    if type(value) in (tuple, list):
        return type(value)(map_value(function, item) for item in value)
    if type(value) is dict:
        return {map_value(function, key): map_value(function, item) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """Everything inside tuples, lists and dicts that is none of these."""
    if type(value) in (tuple, list):
        for item in value:
            yield from leaves(item)
    elif type(value) is dict:
        for pair in value.items():
            yield from leaves(pair)
    else:
        yield value


def references(value: Any) -> Iterator[Reference]:
    return (leaf for leaf in leaves(value) if isinstance(leaf, Reference))


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name):
        return Macro(macro_name)


class _NamedText(io.StringIO):
    """Text that gin's parser can name in the location of a statement."""

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name


def _statements(text: str, name: str) -> Iterator[Any]:
    try:
        yield from config_parser.ConfigParser(_NamedText(text, name), _Delegate())
    except SyntaxError as error:
        line = getattr(error, "lineno", None)
        content = (error.text or "").strip()
        raise UserError(f"{name}:{line}: gin syntax error: {_last_line(error.msg)} in '{content}'") from error
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise UserError(f"{name}:{line}: gin syntax error: {message}") from error


def _last_line(message: str) -> str:
    """gin puts what went wrong inside Python first and what it was doing last."""
    return message.strip().splitlines()[-1].strip()


def _read_file(path: epath.Path, search_paths: Sequence[str], source: Source, parents: tuple[str, ...]) -> None:
    name = os.fspath(path)
    if name in parents:
        raise UserError(f"gin files include each other in a circle: {' -> '.join((*parents, name))}")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read gin file {name}: {error}") from error
    source.files.append(name)
    for statement in _statements(text, name):
        if isinstance(statement, config_parser.IncludeStatement):
            try:
                included = find_file(statement.filename, os.path.dirname(name), search_paths)
            except UserError as error:
                raise UserError(f"{name}:{statement.location.line_num}: {error}") from error
            _read_file(included, search_paths, source, (*parents, name))
        else:
            _add(statement, name, source)


def _add(statement: Any, name: str, source: Source) -> None:
    place = f"{name}:{statement.location.line_num}"
    if isinstance(statement, config_parser.ImportStatement):
        if statement.module.startswith("__gin__"):
            raise UserError(f"{place}: '{statement.format()}' is not supported; use gin.register in Python")
        source.imports.append(Import(statement.module, place))
    elif isinstance(statement, config_parser.BlockDeclaration):
        source.used.append((statement.selector, place))
    else:
        scope, selector, parameter = statement.scope, statement.selector, statement.arg_name
        if not parameter:  # a macro; its scopes are a part of its name
            scope, selector = "", binding_name(scope, selector, "")
        source.bindings.append(Binding(scope, selector, parameter, statement.value, place))


def _split_key(key: str, place: str) -> tuple[str, str, str]:
    scope, selector, parameter = config_parser.parse_binding_key(key) if key and key[0] != "%" else ("", "", "")
    parts = [*(scope.split("/") if scope else []), *selector.split("."), *([parameter] if parameter else [])]
    is_whole = binding_name(scope, selector, parameter) == key
    if not is_whole or not all(config_parser.IDENTIFIER_RE.match(part) for part in parts):
        raise UserError(f"{place}: not a name; write --gin.NAME=VALUE or --gin.CONFIGURABLE.PARAMETER=VALUE")
    return (scope, selector, parameter) if parameter else ("", binding_name(scope, selector, ""), "")
