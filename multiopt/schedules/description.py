"""Schedules as plain data, for saved state."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

import numpy as np

from multiopt.reached import reached
from multiopt.schedules.base import Schedule
from multiopt.schedules.plateau import Plateau, has_observed, is_observed

__all__ = ["check_description", "described", "left_behind", "plain", "plateaus"]

#: How deep a description of a schedule may be nested. One of a rule in a file has at most 64.
DEEPEST = 56


def described(value: Any, depth: int = 0) -> Any:
    """A schedule as plain data: its class, its fields, and what it has seen.

    One that is no dataclass is its class alone; values that are no schedules are as ``plain``.

    Args:
        value: The schedule.
        depth: How deep it is nested in another one. What is nested too deep is None.

    >>> from multiopt.schedules import Linear, Shared
    >>> described(Shared(Linear(0.0, 1.0, 10)))["schedule"]
    {'name': 'Linear', 'initial': 0.0, 'final': 1.0, 'steps': 10}
    """
    if depth < DEEPEST and isinstance(value, tuple | list):
        return [described(part, depth + 1) for part in value]
    if depth == DEEPEST or not isinstance(value, Schedule):
        return plain(value, depth)
    words = {name: described(part, depth + 1) for name, part in _arguments(value).items()}
    state = {"state": value.state()} if isinstance(value, Plateau) else {}
    return {"name": type(value).__name__, **words, **state}


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it; what JSON has nothing like, or is nested too deep, is None.

    State must not be lost over the description of a rule or a schedule, whatever is in its fields.

    Args:
        value: The value.
        depth: How deep it is nested in another one.

    >>> from math import inf
    >>> plain((np.float32(0.5), inf, {"table": np.arange(3)}, {1, 2}, print))
    [0.5, 'inf', {'table': [0, 1, 2]}, None, None]
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if depth == DEEPEST:
        return None
    if isinstance(value, tuple | list):
        return [plain(part, depth + 1) for part in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, float) and not isfinite(value):
        return repr(float(value))
    return value if isinstance(value, bool | int | float | str) else None


def check_description(description: Any) -> None:
    """Refuse a description with a state that no ``Plateau`` could take.

    Raises:
        ValueError: It has one.
    """
    waiting = [description]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list | tuple):
            waiting += part
        elif isinstance(part, Mapping):
            waiting += part.values()
            state = part.get("state")
            # That of a subclass has another name, and perhaps more in its state.
            known = part.get("name") == "Plateau" or has_observed(state)
            if known and not is_observed(state):
                raise ValueError(f"expected the state of a Plateau; got {state!r}")


def plateaus(value: Any, description: Any) -> Iterator[tuple[Plateau, Mapping[str, Any]]]:
    """Each ``Plateau`` in a schedule, with the state that a description has in its place."""
    if isinstance(value, tuple | list) and isinstance(description, list | tuple):
        for part, words in zip(value, description, strict=False):
            yield from plateaus(part, words)
    elif (
        isinstance(value, Schedule)
        and isinstance(description, Mapping)
        and description.get("name") == type(value).__name__
    ):
        if isinstance(value, Plateau) and has_observed(description.get("state")):
            yield value, description["state"]
        for name, part in _arguments(value).items():
            yield from plateaus(part, description.get(name))


def left_behind(value: Any) -> list[Plateau]:
    """Each ``Plateau`` that a hyperparameter reaches, and no description of it has the state of.

    A description has those that are schedules, or parts of some; not those inside of a callable of
    the user's.

    >>> from multiopt.schedules import Shared
    >>> plateau = Plateau(0.1)
    >>> left_behind(Shared(plateau))
    []
    >>> left_behind(lambda step: plateau(step) / step) == [plateau]
    True
    """
    saved, others = list[Plateau](), list[Any]()
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        is_opaque = depth == DEEPEST or not isinstance(part, Schedule | tuple | list)
        if not is_opaque and isinstance(part, Plateau):
            saved.append(part)
        inside = _arguments(part).values() if isinstance(part, Schedule) else part
        if is_opaque:
            others.append(part)
        else:
            waiting += [(inner, depth + 1) for inner in inside]
            # A class of the user's may hold more than its fields.
            if (
                isinstance(part, Schedule)
                and type(part).__module__.rpartition(".")[0] != __package__
            ):
                others.append(type(part).__call__.__get__(part))
    # One of somebody else may have a state that cannot be loaded: then there is no description.
    if not all(is_observed(plateau.state()) for plateau in saved):
        return list(reached([*saved, *others], Plateau))
    known = {id(plateau) for plateau in saved}
    return [plateau for plateau in reached(others, Plateau) if id(plateau) not in known]


def _arguments(schedule: Any) -> dict[str, Any]:
    known = fields(schedule) if is_dataclass(schedule) else ()
    return {f.name: getattr(schedule, f.name) for f in known if f.init}
