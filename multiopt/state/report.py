"""The report of a load: what became of the state of each name, and what differs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multiopt.arrays import Array
from multiopt.state.differences import Difference

__all__ = ["LoadReport"]


@dataclass(frozen=True)
class LoadReport:
    """What a load did with each name.

    Attributes:
        restored: Names seen before, whose state was replaced.
        pending: Names not seen yet, whose state waits for the parameter.
        unused: State that was not used, by the name it was saved under, with the reason. If only
            the average of a name was not used, the reason says so.
        missing: Names seen before, or given as parameters, that the loaded state does not have;
            they are unchanged.
        metadata: What the user saved along with the state.
        differences: For each name, the hyperparameters that had another value in the saved rule
            than in this optimizer's, and whether the saved value was taken over; also the class of
            the rule (``"rule"``) and the numbers of the average (``"average.decay"``,
            ``"average.start"``). Rules that a callable chooses at first sight, and schedules that
            are the user's own callables, are not compared.
        params: The parameters that were given, now with the loaded values; None if none were.

    >>> LoadReport(unused={"scale": "it was not asked for"}).unused["scale"]
    'it was not asked for'
    """

    restored: tuple[str, ...] = ()
    pending: tuple[str, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    differences: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    params: dict[str, Array] | None = None
