"""What a step did, as the optimizer tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from multiopt.arrays import Part
from multiopt.step.clip import Clip

__all__ = ["Outcome", "Report", "abridged", "explain"]

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


def abridged(names: Sequence[str]) -> str:
    """Names in a message, not too many."""
    if not names:
        return "nothing"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + more


@dataclass(slots=True, eq=False)
class Outcome:
    """What becomes of a step, from which a report is made when somebody asks.

    Attributes:
        names: The names of the step.
        new: Those that were seen for the first time.
        parts: Those that were updated, with what became of them.
        skipped: Those that were left alone for their gradients, by place.
        global_norms: The norms over several gradients.
    """

    names: list[str]
    new: tuple[str, ...]
    parts: Sequence[Part]
    skipped: Sequence[int]
    global_norms: Mapping[Clip, float]

    @property
    def updated(self) -> list[str]:
        """The names that were updated."""
        if sum(len(part.places) for part in self.parts) == len(self.names):
            return self.names
        places = np.concatenate([part.places for part in self.parts] or [np.empty(0, np.int64)])
        return [self.names[place] for place in np.sort(places).tolist()]

    def detached(self) -> "Outcome":
        """The same, without the groups, of which it says nothing."""
        parts = [replace(part, group=cast("Any", None)) for part in self.parts]
        return replace(self, parts=parts)

    def report(self) -> Report:
        """The report."""
        norms: dict[int, float] = {}
        limited: dict[int, Any] = {}
        for part in self.parts:
            if part.norms is not None:
                found = zip(part.places.tolist(), part.norms.tolist(), strict=True)
                norms |= {place: norm for place, norm in found if norm != -1}
            if part.clipped is not None:
                for position, value in (part.limited or {}).items():
                    limited[int(part.places[position])] = value
                limited |= dict.fromkeys(part.places[part.clipped].tolist(), True)
        return Report(
            self.new,
            tuple(self.updated),
            tuple(self.names[place] for place in self.skipped),
            {self.names[place]: norms[place] for place in sorted(norms)},
            self.global_norms,
            {self.names[place]: limited[place] for place in sorted(limited)},
        )


def explain(
    error: BaseException, before: Outcome | None, now: Outcome | None, torn: BaseException | None
) -> None:
    """Add a note that says what a step has done in which something was raised.

    Args:
        error: What was raised.
        before: What became of the step before.
        now: What became of the last step.
        torn: What was raised in the middle of writing, if anything was.
    """
    if now is not None and now is not before:
        note = f"the step was whole; it updated {abridged(now.updated)}"
    elif torn is error:
        note = "the step was writing when this was raised; load an earlier state"
    elif isinstance(error, KeyError | TypeError | ValueError):
        # The checks say it in words of their own, or it goes without saying.
        return
    else:
        note = "nothing was changed by this step"
    error.add_note(f"multiopt: {note}")
