"""What may be bound: registered names, their parameters, and values checked against type annotations.

Responsible for: looking up what gin's registry holds, reading signatures, and refusing a value of another type. Not
responsible for: syntax (``syntax.py``) or order and macros (``__init__.py``).

Python's own rules are kept but two: an int is taken for a float (and becomes one), a bool is no int.
"""

import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from typing import Any

from gin import config as gin_config

from scaling4d.config.syntax import Macro, Reference, did_you_mean, format_value
from scaling4d.errors import UserError

MISSING = dataclasses.MISSING

# gin 0.5.0 is its last release; these two tables have no public reader.
_REGISTRY = gin_config._REGISTRY
_CONSTANTS = gin_config._CONSTANTS


class TypeMismatch(Exception):
    """A value does not fit; the message says what is wanted, without the value."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a registered function or class; ``default`` is MISSING where there is none to rely on."""

    name: str
    annotation: Any
    default: Any


@dataclasses.dataclass(frozen=True)
class Configurable:
    """A name in gin's registry.

    Attributes:
      selector: the full name, with its module.
      wrapped: the function or class itself.
      parameters: what may be bound, in the order of the signature.
      open: also takes parameters of any other name (``**kwargs``).
    """

    selector: str
    wrapped: Any
    parameters: dict[str, Parameter]
    open: bool

    @property
    def short_name(self) -> str:
        """The shortest unambiguous name."""
        return _REGISTRY.minimal_selector(self.selector)


def configurable(selector: str, place: str) -> Configurable:
    """Looks a name up; raises UserError with the nearest registered one."""
    matches = _REGISTRY.matching_selectors(selector)
    if len(matches) > 1 and selector not in matches:
        raise UserError(f"{place}: '{selector}' may mean {' or '.join(sorted(matches))}; write more of its name")
    if not matches:
        names = {name.rpartition(".")[2] for name, _ in _REGISTRY.items()} | {name for name, _ in _REGISTRY.items()}
        raise UserError(f"{place}: nothing is registered as '{selector}'{did_you_mean(selector, names)}")
    entry = _REGISTRY.get_match(selector)
    parameters, is_open = _parameters(entry.wrapped)
    allowed = set(entry.allowlist or parameters) - set(entry.denylist or ())
    kept = {name: parameter for name, parameter in parameters.items() if name in allowed}
    return Configurable(entry.selector, entry.wrapped, kept, is_open and not entry.allowlist)


def constant(name: str) -> str:
    """The full name of a constant registered with ``gin.constant``; empty when there is none."""
    matches = _CONSTANTS.matching_selectors(name)
    return matches[0] if len(matches) == 1 else ""


def same(a: Any, b: Any) -> bool:
    """Equal and of equal type all the way down (1, 1.0 and True are three values)."""
    return format_value(a) is not None and format_value(a) == format_value(b)


def fit(value: Any, parameter: Parameter) -> Any:
    """The value as the parameter takes it; raises TypeMismatch. A parameter's own default always fits."""
    return value if same(value, parameter.default) else _fit(value, parameter.annotation)


def is_loose(annotation: Any) -> bool:
    """True where an annotation refuses nothing."""
    return annotation in (Any, object, inspect.Parameter.empty) or isinstance(annotation, typing.TypeVar)


def describe(annotation: Any) -> str:
    """An annotation as a person would write it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None) or annotation is None:
        return "None"
    if annotation is Ellipsis:
        return "..."
    if isinstance(annotation, list):
        return f"[{', '.join(map(describe, annotation))}]"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is typing.Annotated:
        return describe(arguments[0])
    name = getattr(origin or annotation, "__name__", None) or str(annotation)
    return f"{name}[{', '.join(map(describe, arguments))}]" if arguments else name


def _fit(value: Any, annotation: Any) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if is_loose(annotation):
        return value
    if origin is typing.Annotated:
        return _fit(value, arguments[0])
    if isinstance(annotation, typing.NewType):
        return _fit(value, annotation.__supertype__)
    if type(annotation).__name__ == "TypeAliasType":  # ``type Name = ...`` of Python 3.12
        return _fit(value, annotation.__value__)
    if origin in (typing.Union, types.UnionType):
        return _fit_union(value, arguments, annotation)
    if isinstance(value, Reference):
        return _fit_reference(value, annotation)
    if isinstance(value, Macro):  # a constant, which is an object of Python
        _fit(_CONSTANTS[constant(value.name)], annotation)
        return value
    if annotation is None or annotation is type(None):
        return _only(value is None, value, annotation)
    if origin is typing.Literal:
        if any(same(value, choice) for choice in arguments):
            return value
        choices = [choice for choice in arguments if isinstance(choice, str)]
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise TypeMismatch(describe(annotation) + hint)
    if annotation is float and type(value) is int:
        return float(value)
    if annotation is int and type(value) is float and value.is_integer():
        raise TypeMismatch(f"int; write {int(value)}")
    if annotation in (int, float):
        return _only(type(value) is annotation, value, annotation)
    kind = origin or annotation
    if kind is collections.abc.Callable:
        return _only(callable(value), value, annotation)
    if not isinstance(kind, type):  # something newer than this code: refuses nothing
        return value
    if getattr(kind, "_is_protocol", False):
        raise TypeMismatch(describe(annotation))
    if type(value) in (tuple, list, dict):
        return _fit_container(value, kind, arguments, annotation)
    return _only(kind is str if type(value) is str else isinstance(value, kind), value, annotation)


def _only(fits: bool, value: Any, annotation: Any) -> Any:
    if not fits:
        raise TypeMismatch(describe(annotation))
    return value


def _fit_union(value: Any, members: tuple, annotation: Any) -> Any:
    fitted = []
    for member in members:
        try:
            fitted.append(_fit(value, member))
        except TypeMismatch:
            continue
    if not fitted:
        raise TypeMismatch(describe(annotation))
    return next((one for one in fitted if same(one, value)), fitted[0])


def _fit_container(value: Any, kind: type, arguments: tuple, annotation: Any) -> Any:
    """A tuple, list or dict against the class and its element types; gin knows no sets and no named tuples."""
    if not issubclass(type(value), kind):
        other = {tuple: "tuple, written (1, 2)", list: "list, written [1, 2]"}
        raise TypeMismatch(describe(annotation) + (f" (a {other[kind]})" if kind in other else ""))
    if not arguments:
        return value
    if type(value) is dict:
        key_type, item_type = (*arguments, Any)[:2]
        return {_fit(key, key_type): _fit(item, item_type) for key, item in value.items()}
    if kind is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise TypeMismatch(f"{describe(annotation)}, so {len(arguments)} values")
        return tuple(map(_fit, value, arguments))
    return type(value)(_fit(item, arguments[0]) for item in value)


def _fit_reference(reference: Reference, annotation: Any) -> Any:
    target = configurable(reference.selector, f"@{reference.name}").wrapped
    kind = typing.get_origin(annotation) or annotation
    if not reference.call:
        if kind not in (collections.abc.Callable, type) and "__call__" not in getattr(kind, "__dict__", {}):
            is_container = kind in (tuple, list, dict) or kind in vars(collections.abc).values()
            hint = "" if is_container else f"; write @{reference.name}() to pass what it returns"
            raise TypeMismatch(describe(annotation) + hint)
        return reference
    result = target if inspect.isclass(target) else _returned_class(target)
    if kind is collections.abc.Callable:
        if result is not None and not any("__call__" in vars(base) for base in result.__mro__):
            raise TypeMismatch(f"{describe(annotation)}; write @{reference.name} without brackets")
        return reference
    kinds = tuple(map(type, typing.get_args(annotation))) if kind is typing.Literal else (kind,)
    is_known = all(isinstance(one, type) and not getattr(one, "_is_protocol", False) for one in kinds)
    if result is not None and is_known and not issubclass(result, kinds) and (result, kind) != (int, float):
        raise TypeMismatch(f"{describe(annotation)}; @{reference.name}() is {result.__name__}")
    return reference


def _returned_class(function: Any) -> type | None:
    annotation = _resolve(getattr(function, "__annotations__", {}).get("return"), _globals(function), {})
    kind = typing.get_origin(annotation) or annotation
    return kind if isinstance(kind, type) and not is_loose(kind) and not getattr(kind, "_is_protocol", False) else None


def _parameters(wrapped: Any) -> tuple[dict[str, Parameter], bool]:
    found, is_open = {}, False
    fields = {field.name: field for field in dataclasses.fields(wrapped)} if _is_dataclass_type(wrapped) else {}
    for name, parameter in inspect.signature(wrapped).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            default = MISSING if parameter.default is parameter.empty else parameter.default
            factory: Any = fields[name].default_factory if name in fields else MISSING
            if factory is not MISSING:
                default = factory()
            if default is gin_config.REQUIRED:
                default = MISSING
            found[name] = Parameter(name, _annotation(wrapped, name, parameter.annotation), default)
    return found, is_open


def _annotation(wrapped: Any, name: str, given: Any) -> Any:
    """The annotation as an object; a string that names something only type checkers can see refuses nothing."""
    if inspect.isclass(wrapped):
        for base in wrapped.__mro__:
            own = base.__dict__.get("__annotations__", {})
            if name in own:
                return _resolve(own[name], vars(sys.modules[base.__module__]), dict(vars(base)))
        return _resolve(given, _globals(wrapped.__init__), {})
    return _resolve(given, _globals(wrapped), {})


def _resolve(annotation: Any, global_names: dict, local_names: dict) -> Any:
    if annotation is None or annotation is inspect.Parameter.empty:
        return Any
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(holder, global_names, local_names, include_extras=True)["it"]
    except (NameError, AttributeError, TypeError):
        return Any


def _globals(function: Any) -> dict:
    return getattr(inspect.unwrap(function), "__globals__", {})


def _is_dataclass_type(wrapped: Any) -> bool:
    return inspect.isclass(wrapped) and dataclasses.is_dataclass(wrapped)
