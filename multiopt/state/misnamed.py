"""Pending state under a name that its parameter no longer has.

``torch.compile`` and wrappers such as ``DistributedDataParallel`` put a prefix before the names of
a module's parameters. State that was saved with the prefix and loaded without it waits forever,
while training starts from zero moments. So a step that meets new names looks for pending ones that
differ only by a prefix or a wrapper, and warns with the ``rename=`` that helps:

>>> waiting = ["module.layer.w"]
>>> pairs(["layer.w", "scale"], waiting.__contains__, by_ending(waiting))
{'module.layer.w': 'layer.w'}
>>> remedy({"module.layer.w": "layer.w"})
"rename=lambda name: name.removeprefix('module.')"
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping

from multiopt.errors import caller_level
from multiopt.step.report import abridged

__all__ = ["by_ending", "new_name", "pairs", "remedy", "warn_of_other_names"]

#: What ``torch.compile`` and wrappers may also put in the middle of a name.
WRAPPERS = "_orig_mod.", "module."


def by_ending(pending: Collection[str]) -> dict[str, str]:
    """Map every ending of a pending name (what is left without a prefix or wrapper) to the name."""
    names_by_ending: dict[str, str] = {}
    for name in pending:
        for end in (*_ends(name), _unwrapped(name)):
            names_by_ending.setdefault(end, name)
    return names_by_ending


def pairs(
    new: Iterable[str], waits: Callable[[str], bool], endings: Mapping[str, str]
) -> dict[str, str]:
    """Map pending names to the new names that differ from them by a prefix or a wrapper.

    Args:
        new: Names that start without state.
        waits: Whether state is pending under a name.
        endings: What ``by_ending`` returned; some of its names may no longer be pending.
    """
    result = {}
    for name in new:
        ends = [*_ends(name), _unwrapped(name)]
        near = [*ends, endings.get(name), endings.get(ends[-1])]
        match = next((other for other in near if other and other != name and waits(other)), None)
        if match is not None:
            result[match] = name
    return result


def warn_of_other_names(names: Mapping[str, str], advice: str | None = None) -> None:
    """Warn that pending state seems to belong to parameters with other names.

    Args:
        names: The names of the parameters, by the names of the pending state.
        advice: What to do about it; by default for ``multiopt.Optimizer``.
    """
    if advice is None:
        advice = f"load it again with {remedy(names)}; if not, forget those names"
    warnings.warn(
        f"new parameters ({abridged(list(names.values()))}) start without state while loaded "
        f"state waits under names that differ by a prefix ({abridged(list(names))}). If it is "
        f"theirs, {advice}",
        stacklevel=caller_level(),
    )


def _ends(name: str) -> list[str]:
    """The endings of a name after each of its dots, longest first."""
    parts = name.split(".")
    return [".".join(parts[k:]) for k in range(1, len(parts))]


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def remedy(names: Mapping[str, str]) -> str:
    """The ``rename`` argument of ``load`` that would rename state, as source code.

    Args:
        names: New names by old ones.
    """
    expression = new_name(names)
    return f"rename={expression if expression[0] == '{' else f'lambda name: {expression}'}"


def new_name(names: Mapping[str, str]) -> str:
    """An expression for the new name of ``name``, or a dict of new names, as source code.

    Args:
        names: New names by old ones.

    >>> new_name({"module.w": "w", "module.b": "b"})
    "name.removeprefix('module.')"
    """
    old, new = next(iter(names.items()))
    if old.endswith("." + new):
        prefix = old.removesuffix(new)
        if all(name == prefix + short for name, short in names.items()):
            return f"name.removeprefix({prefix!r})"
    if new.endswith("." + old):
        prefix = new.removesuffix(old)
        if all(long == prefix + name for name, long in names.items()):
            return f"{prefix!r} + name"
    for wrapper in WRAPPERS:
        if all(name.replace(wrapper, "") == short for name, short in names.items()):
            return f"name.replace({wrapper!r}, '')"
    more = ", ..." if len(names) > 1 else ""
    return f"{{{old!r}: {new!r}{more}}}"
