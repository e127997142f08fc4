"""What a callable of the caller's reaches when it is called, as far as its code says.

>>> class Counter: ...
>>> counter = Counter()
>>> [found is counter for found in reached(lambda step: counter.next(step), Counter)]
[True]
"""

import functools
import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, TypeAlias, TypeVar

__all__ = ["reached"]

Kind = TypeVar("Kind")

#: What code names: globals, attributes, and strings that may be either.
Names: TypeAlias = frozenset[str]

#: How many objects are looked at. What is further away is not found.
MOST = 2000

#: What holds nothing.
PLAIN = (str, bytes, int, float, complex, type(None))


def reached(value: Any, kind: type[Kind]) -> Iterator[Kind]:
    """Objects of a kind that a callable, or what is in a container, reaches; each once.

    Followed are closures, defaults, the globals and attributes that code names, bound methods,
    partials, wrapped functions, callable objects and containers. Nothing is called.

    Args:
        value: The callable.
        kind: The kind.
    """
    waiting: deque[tuple[Any, Names]] = deque([(value, frozenset())])
    # By identity, and by what is looked for there. They are held, so that identities stay theirs.
    seen: dict[tuple[int, Names], Any] = {}
    told: set[int] = set()
    while waiting and len(seen) < MOST:
        one, names = waiting.popleft()
        if (id(one), names) in seen:
            continue
        seen[id(one), names] = one
        # Types are asked, not objects, which may answer ``isinstance`` themselves.
        if issubclass(type(one), kind) and id(one) not in told:
            told.add(id(one))
            yield one
        waiting.extend(islice(_next(one, names), MOST))


def _next(one: Any, names: Names) -> Iterator[tuple[Any, Names]]:
    """What is one step away from an object, with what is named by the code that has it.

    Args:
        one: The object.
        names: What is named by the code that has this one.
    """
    kind = type(one)
    if issubclass(kind, PLAIN):
        return
    if issubclass(kind, FunctionType):
        own = _names(one.__code__)
        yield from ((part, own) for part in _held(one, own))
    elif issubclass(kind, MethodType):
        yield one.__func__, names
        yield one.__self__, names | _names_of(one.__func__)
    elif issubclass(kind, functools.partial):
        names |= _names_of(one.func)
        yield from ((part, names) for part in (one.func, *one.args, *one.keywords.values()))
    elif issubclass(kind, BuiltinMethodType):
        yield one.__self__, names
    elif issubclass(kind, dict | MappingProxyType):
        yield from ((part, names) for part in one.values())
    elif issubclass(kind, list | tuple | set | frozenset):
        yield from ((part, names) for part in one)
    elif not issubclass(kind, type | ModuleType):
        call = inspect.getattr_static(kind, "__call__", None)
        if isinstance(call, FunctionType):
            yield MethodType(call, one), names
    for name in (*names, "__wrapped__"):
        yield from ((part, names) for part in _attribute(one, name))


def _held(function: FunctionType, names: Names) -> Iterator[Any]:
    """What a function has at hand: its closure, its defaults, and the globals that it names."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (function.__globals__[name] for name in names & function.__globals__.keys())


def _attribute(one: Any, name: str) -> Iterator[Any]:
    """An attribute of an object, without asking the object."""
    found = inspect.getattr_static(one, name, None)
    kind, is_instance = type(found), not issubclass(type(one), type | ModuleType)
    if issubclass(kind, MemberDescriptorType):
        with suppress(AttributeError):  # an empty slot
            if is_instance:
                yield found.__get__(one)
        return
    if issubclass(kind, staticmethod | classmethod):
        found = found.__func__
    elif issubclass(kind, property):
        found = found.fget
    elif issubclass(kind, functools.cached_property):
        found = found.func
    has_self = is_instance and issubclass(type(found), FunctionType)
    yield MethodType(found, one) if has_self else found


def _names_of(function: Any) -> Names:
    return _names(function.__code__) if isinstance(function, FunctionType) else frozenset()


@functools.lru_cache(1000)
def _names(code: CodeType) -> Names:
    """What code names, that of the functions in it included."""
    names = {*code.co_names}
    for part in code.co_consts:
        if isinstance(part, CodeType):
            names |= _names(part)
        elif isinstance(part, str) and part.isidentifier():
            names.add(part)
    return frozenset(names)
