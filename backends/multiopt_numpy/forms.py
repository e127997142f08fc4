"""What the engines must know of a rule: its numbers, its choices, and whether it can be theirs."""

import copy
import dis
import inspect
import math
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from multiopt.engine import number_fields, other_fields
from multiopt.rules import Rule

__all__ = [
    "NotCompilable",
    "are_uniform",
    "check_scalars",
    "global_names",
    "number_fields",
    "other_fields",
    "reached",
    "sample_scalars",
    "scalars_of",
]


class NotCompilable(Exception):  # noqa: N818 -- an answer, to which the caller has another way
    """A rule that Numba cannot compile, or would compile into other numbers."""


def sample_scalars(rule: Rule, dtype: str) -> Any:
    """Coefficients of a rule, for what they are and not for their values. Asks no schedule."""
    sample = copy.copy(rule)
    for name in rule.ranges:
        value = getattr(rule, name)
        if isinstance(value, tuple):
            numbers: Any = tuple(0.5 if callable(part) else part for part in value)
        else:
            numbers = 0.5 if callable(value) else value
        object.__setattr__(sample, name, numbers)
    return sample.coefficients(1, dtype)


def scalars_of(rule: Rule) -> FunctionType:
    """The function that computes the coefficients of a rule."""
    function: FunctionType = type(rule).scalars.__func__  # type: ignore[attr-defined]
    return function


def are_uniform(rule: Rule) -> bool:
    """Whether the coefficients are the same numbers in compiled code, and for arrays of steps."""
    try:
        check_scalars(rule)
    except NotCompilable:
        return False
    return True


def check_scalars(rule: Rule) -> None:
    """Refuse coefficients that would be other numbers in a kernel, or for arrays of steps.

    Raises:
        NotCompilable: They are computed with ``**`` or with functions of ``math``, whose results
            differ in the last bit between Python, NumPy and compiled code.
    """
    seen: set[int] = set()
    waiting = [inspect.unwrap(scalars_of(rule))]
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        for instruction in dis.get_instructions(function.__code__):
            if instruction.argrepr in ("**", "**="):
                raise NotCompilable(f"{function.__qualname__} uses **; there is power()")
        for value in reached(function):
            if value is math or getattr(value, "__module__", None) == "math":
                raise NotCompilable(f"{function.__qualname__} uses math; there is np.sqrt")
            if isinstance(value, FunctionType):
                waiting.append(inspect.unwrap(value))


def reached(function: Callable[..., Any]) -> list[Any]:
    """What the code of a function refers to by the names of globals and of enclosing scopes."""
    globals_, cells = function.__globals__, function.__closure__ or ()
    by_name = [globals_.get(name) for name in global_names(function.__code__)]
    return by_name + [cell.cell_contents for cell in cells]


def global_names(code: CodeType) -> list[str]:
    """The names of globals and of attributes in some code."""
    inner = [name for c in code.co_consts if isinstance(c, CodeType) for name in global_names(c)]
    return [*code.co_names, *inner]
