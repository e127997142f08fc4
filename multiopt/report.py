"""What a step did, as the optimizer tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np

from multiopt.clipping import Clip
from multiopt.plan import Outcome

__all__ = ["Report", "abridged", "report_of", "updated_names"]

#: How many names a note lists.
LISTED = 5


@dataclass(frozen=True)
class Report:
    """What the last step did.

    Attributes:
        new: Names seen for the first time.
        updated: Names that were updated, the new ones among them.
        skipped: Names left alone because their gradient was not finite.
        norms: Norm of the gradient, before clipping, of each name with ``Clip(norm=...)``.
        global_norms: Global norm, before clipping by it, of each ``Clip(global_norm=...)``.
    """

    new: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict)
    global_norms: Mapping[Clip, float] = field(default_factory=dict)
    _limited: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def clipped(self) -> tuple[str, ...]:
        """Names whose gradient a clip changed; a value clip on a device is fetched when read."""
        return tuple(name for name, limited in self._limited.items() if bool(limited))


def updated_names(names: list[str], outcome: Outcome) -> list[str]:
    """The names that a step updated."""
    return names if outcome.active is None else list(compress(names, outcome.active))


def abridged(names: Sequence[str]) -> str:
    """Names in a message, not too many."""
    if not names:
        return "nothing"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + more


def report_of(names: list[str], new: tuple[str, ...], outcome: Outcome) -> Report:
    """The report of a step of some names, some of them new."""
    norms, clipped = outcome.norms, outcome.clipped
    limited: dict[str, Any] = {}
    if clipped is not None:
        limited = {names[i]: True for i in np.flatnonzero(clipped).tolist()}
        for i, value in outcome.on_devices.items():
            limited.setdefault(names[i], value)
        limited = {name: limited[name] for name in names if name in limited}
    return Report(
        new,
        tuple(updated_names(names, outcome)),
        tuple(names[i] for i in outcome.skipped),
        {names[i]: norm for i, norm in zip(norms.where, norms.own.tolist(), strict=True)}
        if norms is not None
        else {},
        {} if norms is None else norms.shared,
        limited,
    )
