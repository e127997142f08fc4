"""Which names of a checkpoint are wanted, and what they are called here.

>>> renamed(["module.w", "module.b"], None, lambda name: name.removeprefix("module."))
{'module.w': 'w', 'module.b': 'b'}
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from multiopt.errors import brief

__all__ = ["renamed", "wanted_names"]


def wanted_names(names: Iterable[str] | str | None) -> list[str] | None:
    """The names to load as a list; None stands for all of them.

    Raises:
        TypeError: The argument is neither names, nor one name, nor None.
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
    """Map each wanted name of the loaded state to its name in this optimizer.

    Args:
        have: The names in the loaded state.
        names: The wanted ones among them; None for all.
        rename: New names by old ones, as a mapping or a callable; None changes no name.

    Raises:
        KeyError: The loaded state does not have a name.
        TypeError: A new name is not a string, or ``rename`` is of another kind.
        ValueError: Two names would become one.
    """
    if not (rename is None or isinstance(rename, Mapping) or callable(rename)):
        raise TypeError(f"rename must be a mapping, a callable or None; got {brief(rename)}")
    if names is None and rename is None:
        return dict(zip(have, have, strict=True))
    wanted = have if names is None else names
    available = set(have)
    for name in [*wanted, *(rename if isinstance(rename, Mapping) else ())]:
        if name not in available:
            raise KeyError(f"cannot load parameter {name!r}: the loaded state does not contain it")
    if rename is None:
        rename = {}
    new_name = rename if callable(rename) else lambda name: rename.get(name, name)
    new: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in dict.fromkeys(wanted):
        other = new_name(name)
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
