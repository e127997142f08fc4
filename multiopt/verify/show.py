"""The report of ``multiopt verify``."""

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any

from multiopt import terminal
from multiopt.bench.machine import described, engine
from multiopt.bench.show import progress, publish
from multiopt.verify.checks import Check, checks
from multiopt.verify.places import places

__all__ = ["verify"]

HEADINGS = ("checked", "on", "cases", "wrong")
NUMBERS = {2}


def verify(path: str | None, libraries: Sequence[str] = ()) -> bool:
    """Check and report.

    Args:
        path: Where to write JSON, ``"-"`` for the standard output instead of a table, or None.
        libraries: Modules of other Array API libraries to check.

    Returns:
        Whether every promise is kept.
    """
    todo = checks(places(libraries))
    found: list[Check] = []
    with progress(len(todo), "checks") as bar:
        for title, run in todo:
            bar.set_postfix_str(title)
            found += run()
            bar.update()
    document = {
        "engine": engine(),
        "machine": described(),
        "kept": not any(check.is_broken for check in found),
        "results": [asdict(check) for check in found],
    }
    publish(document, path, lambda: report(document))
    return bool(document["kept"])


def report(document: dict[str, Any]) -> str:
    """The machine, the table, and what to do about what is broken."""
    machine, results = document["machine"], [Check(**result) for result in document["results"]]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    heading = f"{machine['cpu']}; engine: {document['engine']}. {versions}."
    rows = [HEADINGS]
    for check in results:
        wrong = ", ".join(f"{what}: {count}" for what, count in check.off.items()) or "none"
        if check.off and not check.counts:
            wrong += " (not used)"
        rows.append((check.what, check.where, str(check.cases), wrong))
    ends = ["Every promise is kept here."]
    broken = [check for check in results if check.is_broken]
    if broken:
        remedies = dict.fromkeys(check.remedy for check in broken)
        ends = [f"{len(broken)} of {len(results)} checks failed."]
        ends += map(_filled, remedies)
    notes = dict.fromkeys(check.note for check in results if check.note and check.off)
    return "\n".join(
        [_filled(heading), "", terminal.table(rows, NUMBERS), "", *map(_filled, notes), *ends]
    )


def _filled(text: str) -> str:
    return fill(text, terminal.width(), break_on_hyphens=False)
