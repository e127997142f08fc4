"""How often names were skipped, and how often is too often: ``spec/registry.md``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Skips", "check_limit", "counted"]


class Skips(NamedTuple):
    """How often a step left a name alone because its gradient was not finite.

    Attributes:
        total: In all.
        consecutive: Since its last update; steps in which it takes no part do not count.
    """

    total: int
    consecutive: int


def check_limit(limit: int | None, on_nonfinite: str) -> None:
    """Refuse what is not a limit of consecutive skips.

    Raises:
        ValueError: It is none, or nothing is skipped.
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
    """The counts after a step.

    Args:
        skips: Those before it.
        skipped: The names that it skips.
        updated: The names that it updates.
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
