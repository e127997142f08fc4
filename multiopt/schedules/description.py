"""Descriptions: schedules as plain data, for saved state.

A description records which schedule was in use: its class and its fields. The state of a
``Plateau`` is saved apart from it, under the path to the ``Plateau`` in the schedule. So the
functions here also find each ``Plateau`` that a hyperparameter uses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

import numpy as np

from multiopt.errors import brief
from multiopt.reached import reached
from multiopt.schedules import combined, curves
from multiopt.schedules.base import Schedule
from multiopt.schedules.plateau import Plateau, has_observed, is_observed

__all__ = [
    "described",
    "left_behind",
    "observers",
    "plain",
    "recorded",
    "revived",
    "separated",
    "unworded",
]

#: The schedules that ``revived`` can make.
SCHEDULES: Mapping[Any, Any] = {
    **{name: getattr(curves, name) for name in curves.__all__},
    **{cls.__name__: cls for cls in (combined.Join, combined.Shared, Plateau)},
}

#: How deep the description of a schedule may be nested. Files allow a rule 64 levels.
DEEPEST = 56


def described(value: Any, depth: int = 0) -> Any:
    """Describe a schedule by its class and its fields.

    A schedule that is not a dataclass is described by its class alone. A value that is not a
    schedule is converted by ``plain``.

    Args:
        value: The schedule, or the value of one of its fields.
        depth: How deep it is nested in another schedule. What is nested too deep becomes None.

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
    """Convert a value to data that JSON can represent.

    Anything else, and anything nested too deep, becomes None: saving must not fail because of what
    the fields of a rule or a schedule contain.

    Args:
        value: The value.
        depth: How deep it is nested in another value.

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


def recorded(schedule: Any) -> dict[str, Any]:
    """A schedule of this package as plain data, from which ``revived`` makes an equal one.

    Raises:
        ValueError: It is not of this package, or has something inside that is not.
    """
    module = type(schedule).__module__.rpartition(".")[0]
    if module != __package__ or not isinstance(schedule, Schedule):
        raise ValueError(f"{brief(schedule)} is not a schedule of multiopt.schedules")
    return {
        "name": type(schedule).__name__,
        **{name: _recorded(part) for name, part in _arguments(schedule).items()},
    }


def _recorded(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_recorded(part) for part in value]
    return recorded(value) if callable(value) else plain(value)


def revived(description: Any) -> Schedule:
    """Make a schedule like the one that ``recorded`` described; a ``Plateau`` has seen nothing.

    Raises:
        TypeError: The description has other arguments than the schedule.
        ValueError: It is not the description of a schedule of this package, or an argument is out
            of range.

    >>> from multiopt.schedules import Cosine, Join, Linear
    >>> lr = Join([Linear(0.0, 0.5, 2), Cosine(0.5, 4)], [2])
    >>> revived(recorded(lr)) == lr
    True
    """
    name = description.get("name") if isinstance(description, Mapping) else None
    if name not in SCHEDULES:
        raise ValueError(f"expected a schedule of multiopt.schedules; got {brief(description)}")
    arguments = {key: _revived(part) for key, part in description.items() if key != "name"}
    schedule: Schedule = SCHEDULES[name](**arguments)
    return schedule


def _revived(value: Any) -> Any:
    if isinstance(value, Mapping):
        return revived(value)
    if isinstance(value, tuple | list):
        return tuple(map(_revived, value))
    return unworded(value)


def unworded(value: Any) -> Any:
    """A number for the word with which ``plain`` replaced it; other values as they are."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def observers(value: Any, place: str, depth: int = 0) -> Iterator[tuple[str, Plateau]]:
    """Find each ``Plateau`` in a schedule.

    Args:
        value: The schedule.
        place: The path to the schedule, such as the name of its hyperparameter.
        depth: How deep it is nested in another schedule. What is nested too deep is not found.

    Yields:
        The path to each ``Plateau``, which lists the fields and classes on the way, and the
        ``Plateau``.

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
    """Separate the states from a description of versions 1 and 2, which contained them.

    Args:
        description: The description of a schedule.
        place: The path to the schedule.

    Returns:
        The description without the states, and the state of each ``Plateau`` under its path, as
        ``observers`` yields it.

    Raises:
        ValueError: A state is not one that a ``Plateau`` can load.
    """
    if isinstance(description, list | tuple):
        parts = [separated(part, f"{place}[{i}]") for i, part in enumerate(description)]
        return [part for part, _ in parts], {k: x for _, more in parts for k, x in more.items()}
    if not isinstance(description, Mapping):
        return description, {}
    place, words = f"{place}={description.get('name')}", dict[Any, Any]()
    found: dict[str, Mapping[str, Any]] = {}
    state = description.get("state")
    # A subclass of ``Plateau`` has another name, and its state may have more entries.
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
    """Find each ``Plateau`` that a hyperparameter uses but whose state is not saved.

    The state of a ``Plateau`` is saved if it is the schedule itself or a part of one, but not if it
    is used inside a callable of the user's.

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
            # A class of the user's may use more than its fields when it is called.
            if (
                isinstance(part, Schedule)
                and type(part).__module__.rpartition(".")[0] != __package__
            ):
                others.append(type(part).__call__.__get__(part))
    # A subclass of the user's may have a state that cannot be loaded.
    known = {id(plateau) for plateau in saved if is_observed(plateau.state())}
    odd = [plateau for plateau in saved if id(plateau) not in known]
    return [plateau for plateau in reached([*odd, *others], Plateau) if id(plateau) not in known]


def _arguments(schedule: Any) -> dict[str, Any]:
    known = fields(schedule) if is_dataclass(schedule) else ()
    return {f.name: getattr(schedule, f.name) for f in known if f.init}
