"""From the names of rows to jobs, and from jobs to results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

from multiopt.bench.machine import engine
from multiopt.bench.paired import measured
from tests.benchmarks import fresh, ranks
from tests.benchmarks.comparisons import (
    COMPARISONS,
    FASTER,
    MIB,
    SECONDS,
    SHARE,
    TIME,
    WITHOUT_FAST,
)
from tests.benchmarks.memory import can_measure_peak
from tests.benchmarks.peers import shared_tensors, torch_threads
from tests.benchmarks.works import works

__all__ = ["Job", "Result", "jobs", "missing"]


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        row: What ``--only`` calls it, with others.
        work: The parameters that were stepped.
        ours: Our side.
        against: The other.
        threads: How many threads both could use, or None where that is left to the libraries.
        turn: ``"hot"``: many calls a turn. ``"cold"``: one. ``""``: a process each.
        ours_seconds: Our time for a call, if time was measured.
        against_seconds: The other's.
        figure: The result, in ``unit``.
        unit: ``"times as fast"``, for one.
        target: The bound that issue 3 sets to the figure, if any: a lower one for
            ``"times as fast"``, an upper one for the others.
    """

    row: str
    work: str
    ours: str
    against: str
    threads: int | None
    turn: str
    ours_seconds: float | None
    against_seconds: float | None
    figure: float
    unit: str
    target: float | None


class Job(NamedTuple):
    """A part of the work.

    Attributes:
        title: What the progress bar says.
        run: Measures, in a process of its own where it must.
    """

    title: str
    run: Callable[[], list[Result]]


def missing(rows: Sequence[str]) -> list[str]:
    """The modules that some comparison of the rows would need."""
    needs = dict.fromkeys(module for one in COMPARISONS if one.row in rows for module in one.needs)
    return [module for module in needs if not find_spec(module)]


def jobs(rows: Sequence[str], threads: Sequence[int], quick: bool) -> list[Job]:
    """What to do for some rows.

    Args:
        rows: Their names.
        threads: Numbers of threads to measure with.
        quick: Whether to measure little, for a look or a test.
    """
    return list(_jobs(rows, sorted(set(threads)), quick))


def _jobs(rows: Sequence[str], threads: list[int], quick: bool) -> Iterator[Job]:
    for place, one in enumerate(COMPARISONS):
        if one.row in rows and all(map(find_spec, one.needs)):
            blocks = one.row == WITHOUT_FAST and engine() != "blocks"
            for number in threads if one.threaded else threads[-1:]:
                run: Callable[[], list[Result]] = partial(_compare, place, number, quick)
                # Read when NumPy is imported.
                env = {"OPENBLAS_NUM_THREADS": str(number)}
                if blocks:
                    run = partial(fresh.alone, run, {**env, "MULTIOPT_ENGINE": "blocks"})
                elif not quick:
                    run = partial(fresh.alone, run, env)
                yield Job(f"{one.row}: {one.ours.name} and {one.against.name}", run)
    if "replicas" in rows and find_spec("torch"):
        for key in ("many small", "many middling", "large"):
            yield Job(f"replicas: {key}", partial(_replicas, key, quick))
    if "ranks" in rows and find_spec("torch"):
        for key in ("many small", "many middling", "large"):
            yield Job(f"ranks: {key}", partial(_clipped, key, quick))
    if "memory" in rows and can_measure_peak():
        for library in ("NumPy", *(["torch"] if find_spec("torch") else [])):
            yield Job(f"memory: {library}", partial(_peak, library, threads[-1], quick))
    if "checkpoint" in rows and can_measure_peak():
        for library in ("NumPy", *(["torch"] if find_spec("torch") else [])):
            title = f"checkpoint: memory, {library}"
            yield Job(title, partial(_checkpoint_peaks, library, quick))
    if "import" in rows:
        yield Job("import", partial(_import, 2 if quick else 15))
    if "first-step" in rows and engine() == "compiled":
        yield Job("first-step", partial(_first_step, 1 if quick else 5))


def _compare(place: int, threads: int, quick: bool) -> list[Result]:
    one = COMPARISONS[place]
    known = works(quick)
    work, its = known[one.work], known[one.against_work or one.work]
    with shared_tensors():
        ours, theirs = one.ours.begin(work, threads), one.against.begin(its, threads)
    per_parameter = len(its.shapes) / len(work.shapes)
    # A target holds for one engine and the whole work.
    has_target = not quick and engine() == ("blocks" if one.row == WITHOUT_FAST else "compiled")
    results = []
    spins = work.is_parallel and threads > 1
    for turn in one.turns:
        with torch_threads(threads):
            times = measured(ours, theirs, hot=turn == "hot", quick=quick, spins=spins)
        ratio = times.ratio * per_parameter
        results.append(
            Result(
                row=one.row,
                work=work.title,
                ours=one.ours.name,
                against=one.against.name + (f", {its.title}" if its is not work else ""),
                threads=threads,
                turn=turn,
                ours_seconds=times.ours,
                against_seconds=times.theirs,
                figure=1 / ratio if one.unit in (FASTER, SHARE) else ratio,
                unit=one.unit,
                target=one.target(turn, threads) if has_target else None,
            )
        )
    return results


def _replicas(key: str, quick: bool) -> list[Result]:
    work = works(quick)[key]
    return [
        Result(
            *("replicas", work.title, f"Replicas, {reduction}", "all_reduce and step", 1, "hot"),
            *(*times, TIME, None),
        )
        for reduction, times in ranks.measured(work, quick).items()
    ]


def _clipped(key: str, quick: bool) -> list[Result]:
    work = works(quick)[key]
    return [
        Result(
            *("ranks", work.title, ours, "clip_grad_norm_", 1, "hot"),
            *(*times, TIME, None if quick else 1.1),
        )
        for ours, times in ranks.clipped(work, quick).items()
    ]


def _peak(library: str, threads: int, quick: bool) -> list[Result]:
    work = works(quick)["large"]
    ((elements,),) = work.shapes
    peak = fresh.peak(library, elements, threads)
    against = "beside parameter, gradient and slots"
    return [Result("memory", work.title, library, against, threads, "", None, None, peak, MIB, 8)]


def _checkpoint_peaks(library: str, quick: bool) -> list[Result]:
    work = works(quick)["large"]
    ((elements,),) = work.shapes
    saving, loading = fresh.checkpoint_peaks(library, elements)
    slot = round(4 * elements / 2**20, 1)
    rows = (
        ("save", "beside the state", saving, slot),
        # The buffers of the file, and of the allocator.
        ("load", "beside the loaded arrays", loading, 1.0),
    )
    return [
        Result(
            *("checkpoint", work.title, f"{what}, {library}", against, None, "", None, None),
            *(peak, MIB, None if quick else bound),
        )
        for what, against, peak, bound in rows
    ]


def _import(turns: int) -> list[Result]:
    ours, numpy = fresh.import_times(turns)
    names = ("import", "", "import multiopt", "import numpy")
    return [Result(*names, None, "", ours, numpy, ours - numpy, SECONDS, 0.1)]


def _first_step(turns: int) -> list[Result]:
    cold, cached = fresh.first_step(turns)
    sides = ("NumPy, nothing on disk", cold, 3), ("NumPy, kernel on disk", cached, 0.5)
    return [
        Result("first-step", "one array of 10", side, "", None, "", t, None, t, SECONDS, bound)
        for side, t, bound in sides
    ]
