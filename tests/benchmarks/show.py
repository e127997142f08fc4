"""The report of ``python -m tests.benchmarks``."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from textwrap import fill
from typing import Any

from tqdm import tqdm

from multiopt import terminal
from multiopt.bench.machine import LIBRARIES, described, engine
from multiopt.bench.show import digits, publish
from tests.benchmarks.comparisons import AT_LEAST
from tests.benchmarks.plan import Result, jobs, missing
from tests.benchmarks.works import last_level_cache

__all__ = ["bench", "table"]

HEADINGS = ("threads", "turn", "time", "its time", "result", "target")
NUMBERS = {HEADINGS.index(heading) for heading in ("threads", "time", "its time")}


def bench(rows: Sequence[str], threads: Sequence[int], quick: bool, path: str | None) -> None:
    """Measure and report.

    Args:
        rows: The rows to measure.
        threads: The numbers of threads to measure with.
        quick: Whether to measure little.
        path: Where to write JSON, ``"-"`` for the standard output instead of a table, or None.
    """
    results = []
    work, columns = jobs(rows, threads, quick), min(terminal.width(), 80) - 1
    # None: only on a terminal.
    with tqdm(work, unit="job", ncols=columns, disable=None) as bar:
        for job in bar:
            bar.set_postfix_str(job.title)
            results += job.run()
    document = {
        "engine": engine(),
        "quick": quick,
        "machine": {
            **described((*LIBRARIES, "scikit-learn", "array-api-compat")),
            "last_level_cache": last_level_cache(),
        },
        "missing": missing(rows),
        "results": [asdict(result) for result in results],
    }
    publish(document, path, lambda: f"{heading(document)}\n{table(results)}")


def heading(document: dict[str, Any]) -> str:
    """The machine and what else one must know to read the table."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    sentences = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}.",
        f"Last cache: {machine['last_level_cache'] / 2**20:.0f} MiB.",
        f"{versions}.",
        f"The rules are run by: {document['engine']}.",
    ]
    if document["missing"]:
        sentences.append(f"Not installed, so left out: {', '.join(document['missing'])}.")
    if document["quick"]:
        sentences.append("Small works and few turns: the figures say little.")
    return (
        "\n".join(fill(one, terminal.width(), break_on_hyphens=False) for one in sentences) + "\n"
    )


def table(results: Sequence[Result]) -> str:
    """The results as a table: a line for each comparison, and below it those of its turns."""
    rows: list[str | tuple[str, ...]] = ["work: ours / against", HEADINGS]
    for (work, ours, against), turns in groupby(results, attrgetter("work", "ours", "against")):
        sides = " / ".join(side for side in (ours, against) if side)
        rows += [f"{work}: {sides}" if work else sides, *map(_cells, turns)]
    return terminal.table(rows, NUMBERS)


def _cells(result: Result) -> tuple[str, ...]:
    target = ""
    if result.target is not None:
        target = f"{'at least' if result.unit in AT_LEAST else 'at most'} {result.target:g}"
    return (
        str(result.threads or ""),
        result.turn,
        seconds(result.ours_seconds),
        seconds(result.against_seconds),
        f"{digits(result.figure)} {result.unit}",
        target,
    )


def seconds(time: float | None) -> str:
    """A time as one reads it.

    >>> seconds(0.00123), seconds(None)
    ('1.23 ms', '')
    """
    if time is None:
        return ""
    for unit, length in (("s", 1.0), ("ms", 1e-3)):
        if time >= length:
            return f"{digits(time / length)} {unit}"
    return f"{digits(time / 1e-6)} us"
