"""What the strict configuration refuses.

Responsible for: macros that nothing uses or nobody set, unknown names, values of a wrong type, required values that are
missing, and the choice between a number and a string for what stands bare on the command line. Not responsible for:
looking up names and judging one value (``types.py``) or for putting the result into force (``__init__.py``).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from scaling4d.config import types
from scaling4d.config.syntax import (
    REQUIRED,
    Binding,
    Macro,
    binding_name,
    did_you_mean,
    format_value,
    leaves,
    map_value,
    references,
)
from scaling4d.errors import UserError

Key = tuple[str, str, str]
"""(scope, full selector, parameter)."""


class Check:
    """Checks a list of bindings in which later ones win."""

    def __init__(self, statements: Sequence[Binding]):
        self._statements = statements
        self.macros = {b.selector: b for b in statements if not b.parameter}
        self._winners: dict[Key, Binding] = {}
        self._parameters: dict[Key, types.Parameter] = {}

    def run(self, roots: Sequence[str]) -> dict[Key, Any]:
        """The values of the bindings that win, macros replaced; raises UserError about the first wrong thing."""
        for statement in self._statements:
            for reference in references(statement.value):
                types.configurable(reference.selector, statement.place)
            if statement.parameter:
                key, parameter = _target(statement)
                self._winners[key], self._parameters[key] = statement, parameter
        self._check_macros()
        self._choose_texts()
        values = {key: self._fit(key) for key in self._winners}
        _check_complete(values, roots)
        return values

    def expand(self, value: Any) -> Any:
        """The value with macros replaced by theirs, all the way down."""

        def replace(leaf: Any) -> Any:
            return self.expand(self.macros[leaf.name].value) if _is_macro(leaf) else leaf

        return map_value(replace, value)

    def _check_macros(self) -> None:
        for statement in self._statements:
            for name in _macros_in(statement.value):
                if name not in self.macros:
                    hint = did_you_mean(name, self.macros)
                    raise UserError(f"{statement.place}: the macro '%{name}' is never set{hint}")
        for name, binding in self.macros.items():
            if name in self._reach([binding.value]):
                raise UserError(f"{binding.place}: the macro '{name}' is made of itself")
        used = self._reach(b.value for b in self._statements if b.parameter)
        in_force = self._reach(b.value for b in self._winners.values())
        for name, binding in self.macros.items():
            if name not in used:
                raise UserError(f"{binding.place}: no binding uses the macro '{name}'{did_you_mean(name, used)}")
            if binding.text is not None and name not in in_force:
                raise UserError(f"{binding.place}: overridden wherever '{name}' is used; leave out one of the flags")
        for binding in [*self._winners.values(), *self.macros.values()]:
            counts = binding.parameter or binding.selector in in_force
            if counts and REQUIRED in leaves(binding.value):
                raise UserError(f"{binding.name} is required; set --gin.{binding.name}=VALUE")

    def _reach(self, values: Iterable[Any]) -> set[str]:
        """Names of the macros that the values are made of, also through other macros."""
        found: set[str] = set()
        pending = [name for value in values for name in _macros_in(value)]
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += _macros_in(self.macros[name].value)
        return found

    def _choose_texts(self) -> None:
        """What stands bare on the command line is a string where only a string fits (``--gin.MODEL_DIR=7``)."""
        for binding in [*self.macros.values(), *self._winners.values()]:
            if binding.text is None:
                continue
            if binding.bare:
                self._check_bare(binding)
            elif type(binding.value) in (int, float) and not self._fits(binding):
                as_text = dataclasses.replace(binding, value=binding.text)
                self._put(binding, as_text)
                if not self._fits(as_text):
                    self._put(as_text, binding)

    def _check_bare(self, binding: Binding) -> None:
        """Where annotations leave the type open, a bare string must not replace a value that is no string."""
        if all(types.is_loose(self._parameters[key].annotation) for key in self._users(binding)):
            for other in self._statements:
                is_string = other.value is None or isinstance(other.value, str | Macro)
                if other.name == binding.name and not is_string:
                    was = f"'{binding.name}' is {format_value(other.value)} at {other.place}"
                    raise UserError(f"{binding.place}={binding.text} is a string, but {was}")

    def _users(self, binding: Binding) -> list[Key]:
        """The bindings in force that the binding is, or is a part of."""
        if binding.parameter:
            return [key for key, winner in self._winners.items() if winner is binding]
        return [key for key, winner in self._winners.items() if binding.selector in self._reach([winner.value])]

    def _fits(self, binding: Binding) -> bool:
        try:
            for key in self._users(binding):
                types.fit(self.expand(self._winners[key].value), self._parameters[key])
        except types.TypeMismatch:
            return False
        return True

    def _put(self, old: Binding, new: Binding) -> None:
        table: dict[Any, Binding] = self._winners if old.parameter else self.macros
        for key in [key for key, binding in table.items() if binding is old]:
            table[key] = new

    def _fit(self, key: Key) -> Any:
        binding = self._winners[key]
        value = self.expand(binding.value)
        try:
            return types.fit(value, self._parameters[key])
        except types.TypeMismatch as error:
            blamed = binding  # the statement to change: the last in a row of macros
            while _is_macro(blamed.value):
                blamed = self.macros[blamed.value.name]
            through = f" (set by '{blamed.name}')" if blamed is not binding else ""
            given = format_value(value)
            raise UserError(f"{blamed.place}: {binding.name}{through} is {given}, it must be {error}") from error


def _is_macro(leaf: Any) -> bool:
    """True for a macro, False for a constant that Python registered with gin."""
    return isinstance(leaf, Macro) and not types.constant(leaf.name)


def _macros_in(value: Any) -> list[str]:
    return [leaf.name for leaf in leaves(value) if _is_macro(leaf)]


def _target(statement: Binding) -> tuple[Key, types.Parameter]:
    found = types.configurable(statement.selector, statement.place)
    name = statement.parameter
    if name not in found.parameters and not found.open:
        hint = did_you_mean(name, found.parameters)
        raise UserError(f"{statement.place}: '{statement.selector}' has no parameter '{name}'{hint}")
    parameter = found.parameters.get(name, types.Parameter(name, Any, types.MISSING))
    return (statement.scope, found.selector, name), parameter


def _check_complete(values: dict[Key, Any], roots: Sequence[str]) -> None:
    """What the run will call without arguments finds every parameter bound that has no default."""
    bound = {(selector, parameter) for _, selector, parameter in values}
    called = {name: "the command" for name in roots}
    for (scope, selector, parameter), value in values.items():
        user = binding_name(scope, types.configurable(selector, selector).short_name, parameter)
        called |= {reference.selector: user for reference in references(value) if reference.call}
    for name, user in called.items():
        found = types.configurable(name, user)
        for needed in found.parameters.values():
            if needed.default is types.MISSING and (found.selector, needed.name) not in bound:
                missing = f"{found.short_name}.{needed.name}"
                raise UserError(f"{missing} is not set, and {user} needs it; set --gin.{missing}=VALUE")
