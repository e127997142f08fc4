"""What machine code was made from, in words: the same words, the same code."""

import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from multiopt.rules import Rule
from multiopt.rules.arithmetic import clamp, clip_coefficient, rescaling
from multiopt_numpy.forms import number_fields, other_fields, reached, scalars_of

__all__ = ["class_numbers", "fingerprint", "norms_identity", "update_identity"]


def update_identity(rule: Rule, dtype: str) -> list[str]:
    """All that the kernel of a rule is made from, beside this file."""
    facts = (
        type(rule).__qualname__,
        number_fields(rule),
        sorted(other_fields(rule).items()),
        rule.slots,
        sorted(class_numbers(rule).items()),
        dtype,
    )
    return [repr(facts), *fingerprint(rule.update, scalars_of(rule), clamp)]


def norms_identity(dtype: str) -> list[str]:
    """Likewise for the kernels of norms."""
    return [dtype, *fingerprint(clip_coefficient, rescaling)]


def class_numbers(rule: Rule) -> dict[str, bool | int | float]:
    """The numbers of its class that ``scalars`` may ask for."""
    values = {
        name: getattr(type(rule), name, None)
        for name in inspect.unwrap(scalars_of(rule)).__code__.co_names
    }
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float)}


def fingerprint(*functions: Callable[..., Any]) -> Iterator[str]:
    """What the meaning of functions depends on: their code, and what it reaches by global names.

    Line numbers, file names and comments are no part of it.
    """
    seen: set[int] = set()
    waiting = [inspect.unwrap(function) for function in functions]
    while waiting:
        function = waiting.pop(0)
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield repr((function.__qualname__, function.__defaults__, _code(function.__code__)))
        for value in reached(function):
            if isinstance(value, FunctionType):
                waiting.append(inspect.unwrap(value))
            elif isinstance(value, type):
                yield repr((value.__qualname__, getattr(value, "_fields", None)))
            else:
                yield value.__name__ if isinstance(value, ModuleType) else repr(value)


def _code(code: CodeType) -> tuple[Any, ...]:
    constants = tuple(_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code.hex(), constants, code.co_names, code.co_varnames, code.co_freevars
