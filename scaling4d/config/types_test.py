"""Values against annotations: what fits, what it becomes, what is refused."""

import dataclasses
import enum
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Protocol, TypeVar, Union

import gin
import pytest

from scaling4d.config import types
from scaling4d.config.syntax import Macro, Reference
from scaling4d.config.types import MISSING, Parameter, TypeMismatch, fit

if TYPE_CHECKING:
    from somewhere import NotThere

T = TypeVar("T")
Seconds = typing.NewType("Seconds", float)


class Shape:
    pass


class Paints(Protocol):
    def paint(self) -> None: ...


class Color(enum.Enum):
    RED = 1


@gin.register(module="types_test")
class Square(Shape):
    def __init__(self, side: int = 1):
        self.side = side


@gin.register(module="types_test")
def make_square(side: int = 1) -> Square:
    return Square(side)


@gin.register(module="types_test")
def make_something(side=1):
    return side


gin.constant("types_test.UNIT", Square(1))
SQUARE, THE_SQUARE = Reference("Square", False), Reference("Square", True)
MADE, MAKER = Reference("make_square", True), Reference("make_square", False)
SOMETHING = Reference("make_something", True)
UNIT = Macro("types_test.UNIT")


FITS = [
    (1, int), (-1, int), (True, bool), (1.5, float), ("a", str), (None, None), (1, Any), ([1], object), (1, T),
    (1, int | None), (1, Optional[int]), ("a", Union[int, str]), ("a", str | os.PathLike),  # noqa: UP007, UP045
    ("a", Literal["a", "b"]), (2, Literal[1, 2]), (None, Literal["a"] | None), (1, Annotated[int, "count"]),
    ((1, 2), tuple), ((1, 2), tuple[int, int]), ((), tuple[int, ...]), ((1, 2, 3), tuple[int, ...]), ([1], list),
    ([1], list[int]), ([1], Sequence[int]), ((1,), Sequence[int]), ([1, 2], Iterable[int]), (1.0, Seconds),
    ([(1, "a")], list[tuple[int, str]]), (((1, None),), tuple[tuple[int, int | None], ...]),
    ({"a": 1}, dict[str, int]), ({"a": 1}, Mapping[str, int]),
    (THE_SQUARE, Square), (THE_SQUARE, Shape), (THE_SQUARE, Shape | None), (THE_SQUARE, Paints), (THE_SQUARE, Any),
    (MADE, Shape), (SOMETHING, int), (SOMETHING, Shape), (SOMETHING, Callable), (SOMETHING, Literal["a"]),
    (SQUARE, type), (SQUARE, type[Shape]), (SQUARE, Any), (SQUARE, Callable[..., Shape]), (MAKER, typing.Callable),
    ([SQUARE], Sequence[Callable[[int], Shape]]), (UNIT, Square), (UNIT, Shape | None),
]  # fmt: skip

REFUSED = [
    (True, int), (1, bool), (1.0, int), ("1", int), (1, str), (True, float), ("1.0", float), (None, int), (0, None),
    ("c", Literal["a", "b"]), (True, Literal[1, 2]), (1.0, Literal[1, 2]), (1, Literal["1"]), ("RED", Color),
    ([1, 2], tuple[int, int]), ((1,), list[int]), ((1, 2, 3), tuple[int, int]), ((1, "a"), tuple[int, ...]),
    ((1, 2.0), tuple[int, int]), ("ab", Sequence[str]), ("ab", list[str]), (1, list[int]), ({}, list), ((1,), str),
    ({"a": "b"}, dict[str, int]), ({1: 1}, dict[str, int]), ([1], dict), ([1], int | None), (1, Shape),
    ("x", Paints), ((1,), Paints), ("x", Callable), ("x", os.PathLike), ("x", type),
    (SQUARE, Square), (SQUARE, int), (SQUARE, Shape | None), (SQUARE, Paints), (MAKER, Square),
    (THE_SQUARE, int), (THE_SQUARE, bool), (THE_SQUARE, str | None), (THE_SQUARE, Color), (THE_SQUARE, Callable),
    (THE_SQUARE, Literal["a"]), ([THE_SQUARE], list[Callable]), (MADE, Color), (MADE, tuple[int, ...]),
    (UNIT, int), (UNIT, Color | None),
]  # fmt: skip


@pytest.mark.parametrize(("value", "annotation"), FITS)
def test_fits(value, annotation):
    assert fit(value, Parameter("x", annotation, MISSING)) == value


@pytest.mark.parametrize(("value", "annotation"), REFUSED)
def test_refused(value, annotation):
    with pytest.raises(TypeMismatch):
        fit(value, Parameter("x", annotation, MISSING))


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        (1, float, 1.0),
        ((1, 2.5), tuple[float, ...], (1.0, 2.5)),
        ([1], list[float], [1.0]),
        (1, float | None, 1.0),
        (1, float | int, 1),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        (2, Seconds, 2.0),
    ],
)
def test_an_int_becomes_the_float_that_is_wanted(value, annotation, result):
    fitted = fit(value, Parameter("x", annotation, MISSING))
    assert fitted == result
    assert repr(fitted) == repr(result)


def test_a_default_fits_even_against_its_annotation():
    assert fit(None, Parameter("x", int, None)) is None
    with pytest.raises(TypeMismatch):
        fit(True, Parameter("x", int, 1))
    assert math.isnan(fit(math.nan, Parameter("x", float, math.nan)))


def test_messages():
    def message(value, annotation):
        with pytest.raises(TypeMismatch) as caught:
            fit(value, Parameter("x", annotation, MISSING))
        return str(caught.value)

    assert message(1.5, int | None) == "int or None"
    assert message("radnom", Literal["random", "tube"]) == "'random' or 'tube'; did you mean 'random'?"
    assert message(1, tuple[int, ...]) == "tuple[int, ...]"
    assert message([1], tuple[int, ...]) == "tuple[int, ...] (a tuple, written (1, 2))"
    assert message((1,), list[str]) == "list[str] (a list, written [1, 2])"
    assert message(1, Callable[[int], str]) == "Callable[[int], str]"
    assert message(THE_SQUARE, int) == "int; @Square() is Square"
    assert message(SQUARE, Shape) == "Shape; write @Square() to pass what it returns"
    assert message(THE_SQUARE, Callable) == "Callable; write @Square without brackets"


@dataclasses.dataclass
class Parent:
    first: "int"
    mutable: list[int] = dataclasses.field(default_factory=lambda: [1, 2])


@gin.register(module="types_test", denylist=["hidden"])
@dataclasses.dataclass
class Child(Parent):
    second: "tuple[float, ...] | None" = None
    unseen: "NotThere | None" = None
    required: str = gin.REQUIRED
    hidden: int = 3
    made: int = dataclasses.field(init=False, default=0)


@gin.register(module="types_test")
class WithInit:
    def __init__(self, a: "int", *rest: int, b: "Shape | None" = None, **more: str):
        pass


@gin.configurable(module="types_test", allowlist=["b"])
def decorated(a, b: "Shape | int" = 1):
    return a, b


def parameters(name: str):
    return types.configurable(name, "here").parameters


def test_parameters_of_a_dataclass():
    found = parameters("Child")
    assert list(found) == ["first", "mutable", "second", "unseen", "required"]
    assert found["first"] == Parameter("first", int, MISSING)
    assert found["mutable"] == Parameter("mutable", list[int], [1, 2])
    assert found["second"].annotation == tuple[float, ...] | None
    assert found["unseen"].annotation is Any
    assert found["required"].default is MISSING


def test_parameters_of_a_class_and_a_function():
    found = types.configurable("WithInit", "here")
    assert list(found.parameters) == ["a", "b"] and found.open
    assert found.parameters["a"].annotation is int and found.parameters["b"].annotation == Shape | None
    wrapped = types.configurable("decorated", "here")
    assert list(wrapped.parameters) == ["b"] and not wrapped.open
    assert wrapped.parameters["b"].annotation == Shape | int


def test_an_ambiguous_name():
    for module in ("one", "two"):
        gin.register("Twice", module=module)(type("Twice", (), {}))
    with pytest.raises(types.UserError, match="'Twice' may mean one.Twice or two.Twice"):
        types.configurable("Twice", "here")
    assert types.configurable("two.Twice", "here").selector == "two.Twice"
