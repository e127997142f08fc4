"""The report of ``multiopt bench``."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain, groupby, repeat
from operator import attrgetter, itemgetter
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from multiopt import terminal
from multiopt.bench.machine import cores, described, engine, load, threads
from multiopt.bench.paired import Side, measured
from multiopt.bench.sides import NUMPY, comparisons
from multiopt.bench.work import Arrays, Work

__all__ = ["Result", "bench", "digits", "missing", "progress", "publish", "report"]

HEADINGS = ("a step of Adam", "ours on", "us", "peer", "us", "times as fast")
NUMBERS = {2, 4, 5}
BAR = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit}, {elapsed}{postfix}"

#: The extras of multiopt that bring what is compared, by module.
EXTRAS = {"numba": "fast", "torch": "torch", "pyro": "pyro", "jax": "jax"}

#: Steps before the numbers of all sides are compared, and seconds for the turns of one row.
STEPS, BUDGET = 5, 1.0
#: Cores at work beyond which threads wait for each other.
BUSY = 0.5
#: Relative and absolute: our libraries agree to the last bit, strangers as spec/arithmetic.md says.
EQUAL, CLOSE = (0.0, 0.0), (1e-5, 1e-6)


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        work: The parameters that were stepped.
        ours: The library on which multiopt stepped them.
        peer: Who else did.
        ours_us: Microseconds that a step of multiopt takes, the median of the turns.
        peer_us: The same for the peer.
        times_as_fast: The median of the turns' ratios, the peer's time to ours; None if the two
            computed different numbers.
    """

    work: str
    ours: str
    peer: str
    ours_us: float
    peer_us: float
    times_as_fast: float | None


def bench(quick: bool, path: str | None) -> bool:
    """Measure and report.

    Args:
        quick: Whether to measure little.
        path: Where to write JSON, ``"-"`` for the standard output instead of a table, or None.

    Returns:
        Whether all sides computed the same numbers.
    """
    at_the_start = load()
    rows = [row for row in comparisons(quick) if all(map(find_spec, row[1].needs + row[2].needs))]
    with progress(len(rows), "rows") as bar:
        results = list(_results(rows, quick, bar))
    document = {
        "engine": engine(),
        "threads": threads(),
        "load": at_the_start,
        "quick": quick,
        "machine": described(),
        "missing": missing(),
        "results": [asdict(result) for result in results],
    }
    publish(document, path, lambda: report(document))
    return all(result.times_as_fast is not None for result in results)


def progress(total: int, what: str) -> "tqdm[NoReturn]":
    """A bar for so many of something, on a terminal only."""
    columns = min(terminal.width(), 80) - 1
    return tqdm(total=total, unit=what, disable=None, ncols=columns, bar_format=BAR)


def publish(document: dict[str, Any], path: str | None, report: Callable[[], str]) -> None:
    """Print what was measured, and write it as JSON if that is asked for.

    Args:
        document: What was measured.
        path: Where to write JSON, ``"-"`` for the standard output instead of the report, or None.
        report: Makes the text that is printed.
    """
    text = json.dumps(document, indent=2)
    if path is not None and path != "-":
        Path(path).write_text(text + "\n", encoding="utf-8")
    print(text if path == "-" else report())


def missing() -> list[str]:
    """The modules that would make multiopt faster or add rows, and are not installed."""
    return [module for module in (*EXTRAS, "optax") if not find_spec(module)]


def _results(
    rows: list[tuple[Work, Side, Side]], quick: bool, bar: "tqdm[NoReturn]"
) -> Iterator[Result]:
    for work, group in groupby(rows, itemgetter(0)):
        bar.set_postfix_str(work.title)
        pairs = [(ours, peer) for _, ours, peer in group]
        runs = {side: side.begin(work, cores()) for pair in pairs for side in pair}
        for run in runs.values():
            for _ in range(STEPS):
                run.step()
        # Before any other step: some of these are the arrays that are stepped.
        expected = runs[NUMPY].values()
        agree = [
            _agree(runs[ours].values(), expected, EQUAL)
            and _agree(runs[peer].values(), expected, CLOSE)
            for ours, peer in pairs
        ]
        for (ours, peer), is_valid in zip(pairs, agree, strict=True):
            bar.set_postfix_str(f"{work.title}: {ours.name} and {peer.name}")
            times = measured(
                runs[ours], runs[peer], quick=quick, spins=work.is_parallel, budget=BUDGET
            )
            figures = times.ours * 1e6, times.theirs * 1e6, 1 / times.ratio if is_valid else None
            yield Result(work.title, ours.name, peer.name, *figures)
            bar.update()


def _agree(values: Arrays, expected: Arrays, tolerance: tuple[float, float]) -> bool:
    return values.keys() == expected.keys() and all(
        np.allclose(x, expected[name], *tolerance) for name, x in values.items()
    )


def report(document: dict[str, Any]) -> str:
    """The machine, the table and how to read it: a screenful of 24 lines."""
    machine, results = document["machine"], [Result(**result) for result in document["results"]]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    heading = (
        f"{machine['cpu']}; cores: {machine['cores']}, threads: {document['threads']}, "
        f"engine: {document['engine']}. {versions}."
    )
    rows = [HEADINGS]
    for work, group in groupby(results, attrgetter("work")):
        for title, row in zip(chain([work], repeat("")), group, strict=False):
            ratio = "differs" if row.times_as_fast is None else digits(row.times_as_fast)
            rows.append(
                (title, row.ours, digits(row.ours_us), row.peer, digits(row.peer_us), ratio)
            )
    notes = ["Only the optimizer is timed. Above 1 multiopt is faster, below 1 the peer."]
    if any(result.times_as_fast is None for result in results):
        notes.append("Where the numbers that the two computed differ, their times say nothing.")
    if document["load"] > BUSY:
        notes.append(f"Busy: load {document['load']:.1f} at the start. Large arrays suffer most.")
    if document["quick"]:
        notes.append("Small works and few turns: the figures say little.")
    if document["missing"]:
        notes.append(_how_to_add(document["missing"]))
    heading = fill(heading, terminal.width(), break_on_hyphens=False)
    return "\n".join([heading, "", terminal.table(rows, NUMBERS), "", *notes])


def _how_to_add(modules: list[str]) -> str:
    """What is not installed and the command that installs it, which is never broken.

    >>> print(_how_to_add(["numba", "jax", "optax"]))
    Not installed: numba, jax, optax. To add them:
    pip install "multiopt[fast,jax]" optax
    """
    extras = ",".join(EXTRAS[module] for module in modules if module in EXTRAS)
    packages = [f'"multiopt[{extras}]"'] * bool(extras) + [m for m in modules if m not in EXTRAS]
    text = f"Not installed: {', '.join(modules)}. To add {'them' if modules[1:] else 'it'}:"
    command = f"pip install {' '.join(packages)}"
    return f"{text}{' ' if len(text + command) < terminal.width() else chr(10)}{command}"


def digits(x: float) -> str:
    """A number with three digits, or with all before the point.

    >>> digits(0.98765), digits(12345.6)
    ('0.988', '12346')
    """
    return f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"
