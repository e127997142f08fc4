"""Two sides timed in turn, A B A B, in one process.

The figure is the median of the ratios of single turns, whose two halves ran side by side.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np

from multiopt.bench.work import Arrays, Work

__all__ = ["Run", "Side", "Times", "measured"]

#: A hot turn is as many calls as take this long, in seconds.
TURN = 0.02
#: The number of turns, unless ``budget`` allows a number between these, and that of a quick look.
FEWEST, MOST, QUICK = 7, 25, 3


class Run(NamedTuple):
    """A side that is ready to go.

    Attributes:
        step: What is timed.
        values: The parameters as they are now, as NumPy arrays by name.
    """

    step: Callable[[], object]
    values: Callable[[], Arrays]


@dataclass(frozen=True)
class Side:
    """One of the two that are compared.

    Args:
        name: What the table calls it.
        begin: From a work and a number of threads to a run on new arrays.
        needs: The modules without which there is no such side.
    """

    name: str
    begin: Callable[[Work, int], Run]
    needs: tuple[str, ...] = ()


class Times(NamedTuple):
    """What was measured.

    Attributes:
        ours: Seconds a call, the median of the turns.
        theirs: The same for the other side.
        ratio: The median of the turns' ratios, ours to theirs.
    """

    ours: float
    theirs: float
    ratio: float


def measured(
    ours: Run,
    theirs: Run,
    *,
    hot: bool = True,
    quick: bool = False,
    spins: bool = False,
    budget: float = 5.0,
) -> Times:
    """Time two sides in turn.

    Args:
        ours: One side.
        theirs: The other.
        hot: Whether a turn is many calls, after one that is not timed, so that caches hold what
            the side needs. Else it is one call, straight after the other side's.
        quick: Whether to take few turns.
        spins: Whether OpenMP's threads spin beside this work.
        budget: How many seconds all turns may take, if the fewest do not take longer.
    """
    with _no_collection():
        # The first calls compile and allocate.
        guess = [min(_turn(run, 1, True, spins) for _ in range(2)) for run in (ours, theirs)]
        calls = [min(1000, max(1, ceil(TURN / seconds))) if hot else 1 for seconds in guess]
        turn = sum((1 + n) * seconds for n, seconds in zip(calls, guess, strict=True))
        turns = QUICK if quick else min(MOST, max(FEWEST, int(budget / turn)))
        pairs = [
            (_turn(ours, calls[0], hot, spins), _turn(theirs, calls[1], hot, spins))
            for _ in range(turns)
        ]
    return Times(
        median(a for a, _ in pairs), median(b for _, b in pairs), median(a / b for a, b in pairs)
    )


def _turn(run: Run, calls: int, hot: bool, spins: bool) -> float:
    """Seconds a call."""
    torch = sys.modules.get("torch")
    if torch is not None and spins:
        # OpenMP's workers go on spinning for a while after a parallel region and take cores from
        # whatever comes next: let them spin before both sides, as after a backward pass.
        torch.ones(2**16).add_(1)
    step = run.step
    if hot:
        step()
    # The first malloc of 1 KiB or more after many small frees pays for putting them together, a
    # millisecond after a step of Pyro: not the next side's debt.
    np.empty(8192)
    start = perf_counter()
    for _ in range(calls):
        step()
    return (perf_counter() - start) / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of a turn."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
