"""The benchmarks, quickly: both sides compute the same; nothing is asserted about time."""

import json
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

from multiopt.bench import machine
from multiopt.bench.paired import Run, measured
from multiopt.bench.work import Work
from tests.benchmarks import memory
from tests.benchmarks.__main__ import main
from tests.benchmarks.comparisons import COMPARISONS, ROWS, Comparison
from tests.benchmarks.fresh import alone
from tests.benchmarks.peers import shared_tensors, tensors, torch_threads
from tests.benchmarks.plan import Result, jobs, missing
from tests.benchmarks.show import table
from tests.benchmarks.works import works


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    with pyro.get_param_store().scope(), torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize(
    "comparison",
    [comparison for comparison in COMPARISONS if comparison.alike],
    ids=lambda one: f"{one.work}: {one.ours.name} and {one.against.name}",
)
def test_both_sides_compute_the_same(comparison: Comparison) -> None:
    work = works(quick=True)[comparison.work]
    ours, theirs = (side.begin(work, 2) for side in (comparison.ours, comparison.against))
    ours.step()
    theirs.step()
    before = {name: x.copy() for name, x in ours.values().items()}
    for _ in range(4):
        ours.step()
        theirs.step()
    mine, its = ours.values(), theirs.values()
    assert mine.keys() == its.keys() == before.keys() != set()
    for name, x in mine.items():
        # The tolerance for strangers, spec/arithmetic.md.
        np.testing.assert_allclose(x, its[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert (x != before[name]).all()


def test_every_comparison_that_is_not_alike_runs() -> None:
    for comparison in COMPARISONS:
        if not comparison.alike:
            for side in (comparison.ours, comparison.against):
                run = side.begin(Work("small", ((10,),)), 2)
                run.step()
                assert all(np.isfinite(x).all() for x in run.values().values())


@pytest.mark.parametrize(
    "comparison",
    [comparison for comparison in COMPARISONS if comparison.row == "checkpoint"],
    ids=lambda one: one.ours.name,
)
def test_files_of_both_sides_have_the_same_numbers(comparison: Comparison) -> None:
    work = Work("two", ((10,), (2, 3)))
    sides = [side.begin(work, 1) for side in (comparison.ours, comparison.against)]
    for side in sides:
        side.step()
        side.step()
    mine, its = (side.values() for side in sides)
    assert len(mine) == 4
    assert mine.keys() == its.keys()
    for name, x in mine.items():
        assert (x == its[name]).all()
        assert (x != 0).all()


def test_names_distinct_have_clocks_and_rates_of_their_own() -> None:
    side = next(one.ours for one in COMPARISONS if one.row == "distinct")
    run = side.begin(works(quick=True)["many small"], 1)
    before = {name: x.copy() for name, x in run.values().items()}
    run.step()
    moved = [abs(x - before[name]).max() for name, x in run.values().items()]
    assert len(set(moved)) == len(moved)


def test_what_the_row_of_clips_clips_is_longer_than_its_bound() -> None:
    known = works(quick=True)
    for comparison in COMPARISONS:
        if comparison.row == "clip":
            work = known[comparison.work]
            assert all(np.linalg.norm(grad) > 1.0 for grad in work.arrays()[1].values())
            with shared_tensors():
                runs = [one.begin(work, 1) for one in (comparison.ours, comparison.against)]
                for run in runs * 2:
                    run.step()
                # Torch's clip writes the gradients, and the next step of ours must clip them again.
                assert all(leaf.grad.norm() > 1.0 for leaf in tensors(work).values())


def test_both_norms_are_the_same() -> None:
    comparisons = [one for one in COMPARISONS if one.ours.name == "Accumulator"]
    assert len(comparisons) == 3
    for one in comparisons:
        runs = [side.begin(works(quick=True)[one.work], 1) for side in (one.ours, one.against)]
        for run in runs:
            run.step()
        ours, theirs = (run.values()["norm"] for run in runs)
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_one_thread_may_have_a_target_of_its_own() -> None:
    one = Comparison("a", "b", COMPARISONS[0].ours, COMPARISONS[0].against, 2.0, 3.0)
    assert [one.target(turn, n) for turn in ("hot", "cold") for n in (1, 2)] == [2.0, 2.0, 3.0, 3.0]
    one = replace(one, one_thread=1.6)
    assert [one.target(turn, n) for turn in ("hot", "cold") for n in (1, 2)] == [1.6, 2.0, 1.6, 3.0]


def test_turns_alternate() -> None:
    calls: list[str] = []
    runs = [Run(partial(calls.append, name), dict) for name in "ab"]
    times = measured(*runs, hot=False, quick=True, spins=True)
    assert "".join(calls).endswith("ababab")
    assert min(times) > 0


def test_hot_turns_have_a_call_that_is_not_timed() -> None:
    calls: list[str] = []
    runs = [Run(partial(calls.append, name), dict) for name in "ab"]
    measured(*runs, hot=True, quick=True, spins=True)
    assert calls.count("a") > 3 * 2


def test_every_row_is_measured_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["memory", "import", "first-step", "without-fast", "many", "checkpoint"]
    path = tmp_path / "bench.json"
    arguments = ["--quick", "--threads", "1", "--only", *rows, "--json", str(path)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    document = json.loads(path.read_text())
    assert list(document) == ["engine", "quick", "machine", "missing", "results"]
    assert document["engine"] in ("compiled", "blocks")
    assert document["quick"] is True
    assert document["missing"] == []
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["versions"]["numpy"] == np.__version__
    measurable = set(rows)
    if document["engine"] == "blocks":
        measurable.remove("first-step")
    if not memory.can_measure_peak():
        measurable.remove("memory")
    results = [Result(**result) for result in document["results"]]
    assert {result.row for result in results} == measurable
    assert out.endswith(table(results) + "\n")
    assert document["machine"]["cpu"] in out
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "distinct", "--json", "-"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert list(result) == [field.name for field in fields(Result)]
    assert result["turn"] == "hot"
    assert result["figure"] == pytest.approx(result["ours_seconds"] / result["against_seconds"], 2)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = ("pyro", "1000 of 10", "drop-in", "pyro.optim", 2)
    results = [
        Result(*row, "hot", 3e-4, 0.052, 173.2, "times as fast", 120),
        Result(*row, "cold", 6e-4, 0.052, 87.1, "times as fast", None),
        Result("memory", "", "NumPy", "", None, "", None, None, 0.25, "MiB", 8),
    ]
    assert table(results).splitlines() == [
        "work: ours / against",
        "threads  turn    time  its time  result              target",
        "1000 of 10: drop-in / pyro.optim",
        "      2  hot   300 us     52 ms  173 times as fast   at least 120",
        "      2  cold  600 us     52 ms  87.1 times as fast",
        "NumPy",
        "                                 0.25 MiB            at most 8",
    ]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda one: one.row)
def test_every_line_of_a_comparison_fits_80_columns_whole(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one, known = comparison, works(quick=False)
    against = one.against.name + (f", {known[one.against_work].title}" if one.against_work else "")
    sides = (known[one.work].title, one.ours.name, against)
    result = Result(one.row, *sides, 64, "cold", 1.23e-3, 1.23e-3, 0.00123, one.unit, one.hot)
    text = table([result])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_what_is_missing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    assert missing(["optax", "textbook"]) == ["optax"]
    assert jobs(["optax"], [1], quick=True) == []


def test_threads_are_counted_where_they_matter() -> None:
    titles = [job.title for job in jobs(["large", "distinct"], [2, 1, 2], quick=True)]
    assert titles == [
        *["large: torch and torch fused"] * 2,
        *["large: NumPy and torch fused"] * 2,
        "distinct: NumPy, names distinct and NumPy",
    ]


def test_the_engine_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", "blocks")
    assert machine.engine() == "blocks"
    monkeypatch.undo()
    assert alone(machine.engine, {"MULTIOPT_ENGINE": "blocks"}) == "blocks"


def test_a_step_takes_no_more_threads_than_it_is_told() -> None:
    before = torch.get_num_threads()
    seen = []
    run = Run(lambda: seen.append(torch.get_num_threads()), dict)
    with torch_threads(before + 1):
        measured(run, run, hot=False, quick=True, spins=True)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--threads", "0"], "--threads must be at least 1"),
        (["--only", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_wrong_arguments_are_explained(
    arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert remedy in capsys.readouterr().err


def test_every_row_can_be_named() -> None:
    assert len(set(ROWS)) == len(ROWS)
    assert {one.row for one in COMPARISONS} <= set(ROWS)
