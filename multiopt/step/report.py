"""Reports: what a step did, for users to read.

A step only stores an ``Outcome``. A ``Report``, which lists names, is created from it when somebody
asks. ``explain`` adds a note to an exception that says what has become of the step.

>>> import numpy as np
>>> import multiopt as mo
>>> opt = mo.Optimizer(mo.SGD(), clip=mo.Clip(norm=1.0))
>>> _ = opt.step({"w": np.zeros(2)}, {"w": np.array([3.0, 4.0])})
>>> opt.last
Report(new=('w',), updated=('w',), skipped=(), norms={'w': 5.0}, global_norms={})
>>> opt.last.clipped
('w',)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from multiopt.arrays import Part
from multiopt.step.clip import Clip

__all__ = ["Outcome", "Report", "abridged", "explain"]

#: The largest number of names that a message lists.
LISTED = 5


@dataclass(frozen=True)
class Report:
    """What the last step did.

    Attributes:
        new: The names seen for the first time.
        updated: The names that were updated, including the new ones.
        skipped: The names left alone because their gradient was not finite.
        norms: The norm of the gradient before clipping, for each name with ``Clip(norm=...)``.
        global_norms: The global norm before clipping by it, for each ``Clip(global_norm=...)``.
    """

    new: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict)
    global_norms: Mapping[Clip, float] = field(default_factory=dict)
    _limited: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def clipped(self) -> tuple[str, ...]:
        """The names whose gradient was clipped; reading this may fetch values from a device."""
        return tuple(name for name, limited in self._limited.items() if bool(limited))


def abridged(names: Sequence[str]) -> str:
    """List some names for a message, at most ``LISTED`` of them."""
    if not names:
        return "nothing"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + more


@dataclass(slots=True, eq=False)
class Outcome:
    """What a step has done, in the form in which the step has it.

    Attributes:
        names: The names of the step.
        new: The names seen for the first time.
        parts: The rows that were updated, with their norms and whether they were clipped.
        skipped: The places of the names that were skipped.
        global_norms: The global norm for each clip.
    """

    names: list[str]
    new: tuple[str, ...]
    parts: Sequence[Part]
    skipped: Sequence[int]
    global_norms: Mapping[Clip, float]

    @property
    def updated(self) -> list[str]:
        """The names that were updated, in the order of the step."""
        if sum(len(part.places) for part in self.parts) == len(self.names):
            return self.names
        places = np.concatenate([part.places for part in self.parts] or [np.empty(0, np.int64)])
        return [self.names[place] for place in np.sort(places).tolist()]

    def detached(self) -> "Outcome":
        """A copy without the groups, which a report does not need."""
        parts = [replace(part, group=cast("Any", None)) for part in self.parts]
        return replace(self, parts=parts)

    def report(self) -> Report:
        """Create the report."""
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
    """Add a note to an exception that says what has become of the step in which it was raised.

    Args:
        error: The exception.
        before: The outcome of the last step before this one.
        now: The outcome of the last completed step; another object if this step is complete.
        torn: The exception that was raised while a step was writing, if any.
    """
    if now is not None and now is not before:
        note = f"the step was whole; it updated {abridged(now.updated)}"
    elif torn is error:
        note = "the step was writing when this was raised; load an earlier state"
    elif isinstance(error, KeyError | TypeError | ValueError):
        # The message of a check says it in its own words, or it goes without saying.
        return
    else:
        note = "nothing was changed by this step"
    error.add_note(f"multiopt: {note}")
