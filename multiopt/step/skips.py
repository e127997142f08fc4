"""Skips: how often names were left alone because of their gradients, and when that is an error.

A run in which a name is skipped again and again would go on without learning anything about it, so
a limit on consecutive skips can be set. ``spec/registry.md`` states what users can rely on.

>>> from multiopt.step.skips import counted
>>> counts = counted({}, ["w"], ["b"], limit=2)
>>> counted(counts, ["w"], ["b"], limit=2)
{'w': Skips(total=2, consecutive=2)}
>>> counted(counts, [], ["w", "b"], limit=2)
{'w': Skips(total=1, consecutive=0)}
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Skips", "check_limit", "counted"]


class Skips(NamedTuple):
    """How often a step left a name alone because its gradient was not finite.

    Attributes:
        total: The number of all skips.
        consecutive: The number of skips since the last update of the name. Steps without the name
            do not count.
    """

    total: int
    consecutive: int


def check_limit(limit: int | None, on_nonfinite: str) -> None:
    """Refuse a limit on consecutive skips that is not valid.

    Raises:
        ValueError: It is not an integer >= 1, or ``on_nonfinite`` is not ``"skip"``.
    """
    if limit is None:
        return
    if not (type(limit) is int and limit >= 1):
        raise ValueError(
            f"max_consecutive_skips must be an integer >= 1 or None; got {limit!r}: to skip "
            "nothing, use on_nonfinite='raise'"
        )
    if on_nonfinite != "skip":
        raise ValueError(
            f"max_consecutive_skips is {limit}, but nothing is skipped with "
            f"on_nonfinite={on_nonfinite!r}; expected on_nonfinite='skip'"
        )


def counted(
    skips: Mapping[str, Skips],
    skipped: Sequence[str],
    updated: Iterable[str],
    limit: int | None,
) -> dict[str, Skips]:
    """Compute the counts after a step.

    Args:
        skips: The counts before the step.
        skipped: The names that the step skips.
        updated: The names that the step updates.
        limit: The largest number of steps in a row that may skip a name; None for no limit.

    Raises:
        ValueError: A name would be skipped too often in a row.
    """
    ended = dict.fromkeys(updated)
    after = {
        name: Skips(count.total, 0) if name in ended else count for name, count in skips.items()
    }
    for name in skipped:
        total, consecutive = after.get(name, (0, 0))
        after[name] = Skips(total + 1, consecutive + 1)
    if limit is not None:
        beyond = ", ".join(repr(name) for name in skipped if after[name].consecutive > limit)
        if beyond:
            raise ValueError(
                f"the gradient of {beyond} has infinities or NaNs in more than {limit} steps in a "
                f"row, which were skipped; expected at most {limit}, as max_consecutive_skips="
                f"{limit} asks: find out where they come from, or take a smaller learning rate; "
                "nothing was changed"
            )
    return after
