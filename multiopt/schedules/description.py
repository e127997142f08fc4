"""Schedules as plain data, for saved state."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

import numpy as np

from multiopt.reached import reached
from multiopt.schedules.base import Schedule
from multiopt.schedules.plateau import Plateau, has_observed, is_observed

__all__ = ["described", "left_behind", "observers", "plain", "separated"]

#: How deep a description of a schedule may be nested. One of a rule in a file has at most 64.
DEEPEST = 56


def described(value: Any, depth: int = 0) -> Any:
    """A schedule as plain data: its class and its fields.

    A schedule that is not a dataclass becomes its class alone; other values become what ``plain``
    makes of them.

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
    return {"name": type(value).__name__, **words}


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


def observers(value: Any, place: str, depth: int = 0) -> Iterator[tuple[str, Plateau]]:
    """Each ``Plateau`` in a schedule, with its place: the classes and fields on the way to it.

    Args:
        value: The schedule.
        place: Where it stands.
        depth: How deep it is nested in another one. What is nested too deep is not found.

    >>> from multiopt.schedules import Linear, Join
    >>> lr = Join([Linear(0.0, 0.1, 10), Plateau(0.1)], [10])
    >>> [place for place, _ in observers(lr, "lr")]
    ['lr=Join.schedules[1]=Plateau']
    """
    if depth == DEEPEST:
        return
    if isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from observers(part, f"{place}[{i}]", depth + 1)
    elif isinstance(value, Schedule):
        place = f"{place}={type(value).__name__}"
        if isinstance(value, Plateau):
            yield place, value
        for name, part in _arguments(value).items():
            yield from observers(part, f"{place}.{name}", depth + 1)


def separated(description: Any, place: str) -> tuple[Any, dict[str, Mapping[str, Any]]]:
    """A description of versions 1 and 2, which had the states of each ``Plateau`` inside.

    Args:
        description: The description of a schedule.
        place: Where the schedule stands.

    Returns:
        The description without them, and they by their places, as ``observers`` has them.

    Raises:
        ValueError: One is a state that no ``Plateau`` could take.
    """
    if isinstance(description, list | tuple):
        parts = [separated(part, f"{place}[{i}]") for i, part in enumerate(description)]
        return [part for part, _ in parts], {k: x for _, more in parts for k, x in more.items()}
    if not isinstance(description, Mapping):
        return description, {}
    place, words = f"{place}={description.get('name')}", dict[Any, Any]()
    found: dict[str, Mapping[str, Any]] = {}
    state = description.get("state")
    # That of a subclass has another name, and perhaps more in its state.
    if description.get("name") == "Plateau" or has_observed(state):
        if not is_observed(state):
            raise ValueError(f"expected the state of a Plateau; got {state!r}")
        found[place] = dict(state or {})
    for name, part in description.items():
        if not (name == "state" and place in found):
            words[name], more = separated(part, f"{place}.{name}")
            found |= more
    return words, found


def left_behind(value: Any) -> list[Plateau]:
    """Each ``Plateau`` that a hyperparameter reaches, and of which no state is saved.

    That of those is saved that are schedules, or parts of some; not of those inside of a callable
    of the user's.

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
    # One of somebody else may have a state that cannot be loaded.
    known = {id(plateau) for plateau in saved if is_observed(plateau.state())}
    odd = [plateau for plateau in saved if id(plateau) not in known]
    return [plateau for plateau in reached([*odd, *others], Plateau) if id(plateau) not in known]


def _arguments(schedule: Any) -> dict[str, Any]:
    known = fields(schedule) if is_dataclass(schedule) else ()
    return {f.name: getattr(schedule, f.name) for f in known if f.init}
