"""What of loaded state is wanted, under which names, and what became of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from multiopt.errors import brief
from multiopt.state.file import PARTS

__all__ = ["LoadReport", "Options", "names_of", "renamed", "wanted_names"]


@dataclass(frozen=True)
class LoadReport:
    """What became of loaded state.

    Attributes:
        restored: Names seen before, whose state was replaced.
        pending: Names not seen yet, whose state waits for the parameter.
        unused: What was not used: its name where it was saved, and why. Where only the average of
            a name is of no use, the reason says so.
        missing: Names seen before of which there is nothing in the state, and which stay as they
            are.
        metadata: What was saved with the state, for the user.

    >>> LoadReport(unused={"scale": "it was not asked for"}).unused["scale"]
    'it was not asked for'
    """

    restored: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Options(NamedTuple):
    """How loaded state is taken over.

    Attributes:
        strict: Whether state that does not fit is an error, or else left out.
        cast: Whether slots are converted to the dtype that their parameter needs.
        own: Whether the slots are NumPy arrays that nobody else has.
    """

    strict: bool
    cast: bool
    own: bool = False


def names_of(state_dict: Mapping[str, Any]) -> list[str]:
    """The names of which a state dict has anything."""
    parts = (*PARTS, "skips")
    return list(dict.fromkeys(name for part in parts for name in state_dict.get(part, {})))


def wanted_names(names: Iterable[str] | str | None) -> list[str] | None:
    """The names that are asked for; None for all.

    Raises:
        TypeError: They are no names.
    """
    if names is None:
        return None
    if not isinstance(names, Iterable):
        raise TypeError(f"names must be names, one name or None; got {brief(names)}")
    return [names] if isinstance(names, str) else list(names)


def renamed(
    have: Sequence[str],
    names: Sequence[str] | None,
    rename: Mapping[str, str] | Callable[[str], str] | None,
) -> dict[str, str]:
    """The names that are wanted, and what they are to be called.

    Args:
        have: The names of which there is state.
        names: Those that are wanted; None for all.
        rename: New names, by old ones.

    Raises:
        KeyError: There is no state of a name.
        TypeError: A new name is no string, or ``rename`` is of another kind.
        ValueError: Two names would become one.
    """
    if not (rename is None or isinstance(rename, Mapping) or callable(rename)):
        raise TypeError(f"rename must be a mapping, a callable or None; got {brief(rename)}")
    wanted = have if names is None else names
    known = set(have)
    for name in [*wanted, *(rename if isinstance(rename, Mapping) else ())]:
        if name not in known:
            raise KeyError(f"cannot load parameter {name!r}: the loaded state has none of it")
    if rename is None:
        rename = {}
    called = rename if callable(rename) else lambda name: rename.get(name, name)
    new: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        other = called(name)
        if not isinstance(other, str):
            raise TypeError(f"cannot load parameter {name!r} as {brief(other)}: expected a string")
        if other in taken:
            raise ValueError(
                f"cannot load parameters {taken[other]!r} and {name!r}: both would be called "
                f"{other!r}"
            )
        new[name] = other
        taken[other] = name
    return new
