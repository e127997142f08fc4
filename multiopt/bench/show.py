"""The report of ``multiopt bench``."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from multiopt.bench.comparisons import AT_LEAST
from multiopt.bench.fresh import alone
from multiopt.bench.machine import described, engine
from multiopt.bench.plan import Result, jobs, missing

__all__ = ["bench", "table"]

HEADINGS = ("work", "ours", "against", "threads", "turn", "time", "its time", "result", "target")


def bench(rows: Sequence[str], threads: Sequence[int], quick: bool, path: str | None) -> None:
    """Measure and report.

    Args:
        rows: The rows to measure.
        threads: The numbers of threads to measure with.
        quick: Whether to measure little.
        path: Where to write JSON, ``"-"`` for the standard output instead of a table, or None.
    """
    results = []
    bar = tqdm(jobs(rows, threads, quick), unit="job", ncols=79)
    for job in bar:
        bar.set_postfix_str(job.title)
        results += job.run() if quick else alone(job.run)
    document = {
        "engine": engine(),
        "quick": quick,
        "machine": described(),
        "missing": missing(rows),
        "results": [asdict(result) for result in results],
    }
    text = json.dumps(document, indent=2)
    if path == "-":
        print(text)
        return
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    print(heading(document))
    print(table(results))


def heading(document: dict[str, Any]) -> str:
    """The machine and what else one must know to read the table, in Markdown."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}.",
        f"Last cache: {machine['last_level_cache'] / 2**20:.0f} MiB.",
        f"{versions}.",
        f"The rules are run by: {document['engine']}.",
    ]
    if document["missing"]:
        lines.append(f"Not installed, so left out: {', '.join(document['missing'])}.")
    if document["quick"]:
        lines.append("Small works and few turns: the figures say little.")
    return "\n".join(lines) + "\n"


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    lines = [HEADINGS, *map(_cells, results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def _cells(result: Result) -> tuple[str, ...]:
    target = ""
    if result.target is not None:
        target = f"{'at least' if result.unit in AT_LEAST else 'at most'} {result.target:g}"
    return (
        result.work,
        result.ours,
        result.against,
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


def digits(x: float) -> str:
    """A number with three digits, or with all before the point.

    >>> digits(0.98765), digits(12345.6)
    ('0.988', '12346')
    """
    return f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"
