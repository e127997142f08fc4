"""``multiopt bench``, quickly: what it prints and what it notices; nothing about time."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest

import multiopt as mo
from multiopt.bench import show
from multiopt.bench.paired import Run, Side, Times
from multiopt.bench.show import Result, report
from multiopt.bench.sides import JAX, NUMPY, OPTAX, TEXTBOOK, comparisons
from multiopt.bench.work import Work
from multiopt.cli import main
from tests.project.test_cli import BENCH, start

TWO = Work("2 arrays of 3", ((3,),) * 2)

#: A document of ``--json`` where everything is installed and nothing else runs.
DOCUMENT: dict[str, Any] = {
    "engine": "compiled",
    "threads": 2,
    "load": 0.0,
    "quick": False,
    "machine": {
        "cpu": "Some(R) Processor of Many Words 8259CL CPU @ 2.50GHz",
        "cores": 2,
        "system": "Linux",
        "versions": {
            "python": "3.13.12",
            "multiopt": "0.1.0",
            "numpy": "2.4.6",
            "numba": "0.68.1",
            "torch": "2.13.0+cu130",
            "pyro-ppl": "1.9.2",
            "jax": "0.10.2",
            "optax": "0.2.8",
        },
    },
    "missing": [],
}


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "80")
    with pyro.get_param_store().scope():
        yield


def rows(results: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [(result["work"], result["ours"], result["peer"]) for result in results]


def test_every_row_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    document = json.loads(path.read_text())
    assert document.keys() == DOCUMENT.keys() | {"results"}
    assert (document["engine"], document["quick"], document["missing"]) == ("compiled", True, [])
    assert document["machine"].keys() == DOCUMENT["machine"].keys()
    assert document["machine"]["versions"]["numpy"] == np.__version__
    assert rows(document["results"]) == [
        (work.title, ours.name, peer.name) for work, ours, peer in comparisons(quick=True)
    ]
    for result in document["results"]:
        assert min(result["ours_us"], result["peer_us"], result["times_as_fast"]) > 0
    assert (out, err) == (report(document) + "\n", "")


def test_json_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "comparisons", lambda quick: [(TWO, NUMPY, TEXTBOOK)])
    monkeypatch.setattr(show, "measured", lambda *sides, **_: Times(1e-3, 3e-3, 0.4))
    assert main(["bench", "--quick", "--json", "-"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result == {
        "work": "2 arrays of 3",
        "ours": "NumPy",
        "peer": "textbook NumPy",
        "ours_us": 1000.0,
        "peer_us": 3000.0,
        "times_as_fast": 2.5,
    }


def test_the_report() -> None:
    results = [
        Result("10 arrays of 10", "NumPy", "textbook NumPy", 10.04, 63.7, 6.39),
        Result("10 arrays of 10", "JAX", "optax, jit", 732.1, 87.8, None),
        Result("1000 arrays of 10", "torch", "torch.optim fused", 293.4, 3975.2, 13.5),
    ]
    document = {
        **DOCUMENT,
        "results": [vars(result) for result in results],
        "load": 1.73,
        "missing": ["optax"],
    }
    assert report(document).splitlines() == [
        "Some(R) Processor of Many Words 8259CL CPU @ 2.50GHz; cores: 2, threads: 2,",
        "engine: compiled. python 3.13.12, multiopt 0.1.0, numpy 2.4.6, numba 0.68.1,",
        "torch 2.13.0+cu130, pyro-ppl 1.9.2, jax 0.10.2, optax 0.2.8.",
        "",
        "a step of Adam     ours on   us  peer                 us  times as fast",
        "10 arrays of 10    NumPy     10  textbook NumPy     63.7           6.39",
        "                   JAX      732  optax, jit         87.8        differs",
        "1000 arrays of 10  torch    293  torch.optim fused  3975           13.5",
        "",
        "Only the optimizer is timed. Above 1 multiopt is faster, below 1 the peer.",
        "Where the numbers that the two computed differ, their times say nothing.",
        "Busy: load 1.7 at the start. Large arrays suffer most.",
        "Not installed: optax. To add it: pip install optax",
    ]


@pytest.mark.parametrize("missing", [[], ["numba"]])
def test_the_report_fits_a_terminal_of_24_lines(missing: list[str]) -> None:
    results = [
        Result(work.title, ours.name, peer.name, 123456.7, 1234567.8, 1234.5)
        for work, ours, peer in comparisons(quick=False)
    ]
    text = report({**DOCUMENT, "results": [vars(result) for result in results], "missing": missing})
    assert "…" not in text
    assert len(text.splitlines()) <= 24
    assert max(map(len, text.splitlines())) <= 80


def begin_with(rate: float, more: float) -> Side:
    """A side of ours with another learning rate, or with a little more in one element."""

    def begin(work: Work, threads: int) -> Run:
        params, grads = work.arrays()
        opt = mo.Optimizer(mo.Adam(lr=rate))

        def values() -> dict[str, Any]:
            return {**params, "p1": params["p1"] + np.array([0, 0, more], np.float32)}

        return Run(lambda: opt.step(params, grads), values)

    return Side("another", begin)


@pytest.mark.parametrize(
    ("ours", "peer", "differs"),
    [
        (begin_with(1e-3, 0.0), TEXTBOOK, False),
        (begin_with(1e-3, 1e-6), TEXTBOOK, True),
        (NUMPY, begin_with(1e-3, 1e-6), False),
        (NUMPY, begin_with(1.1e-3, 0.0), True),
        (NUMPY, begin_with(1e-3, 1e-3), True),
    ],
)
def test_sides_that_compute_different_numbers_are_noticed(
    ours: Side,
    peer: Side,
    differs: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = [(TWO, NUMPY, TEXTBOOK), (TWO, replace(ours), peer)]
    monkeypatch.setattr(show, "comparisons", lambda quick: table)
    assert main(["bench", "--quick"]) == (1 if differs else 0)
    assert ("differs\n" in capsys.readouterr().out) == differs


def test_drawn_names_are_a_part_and_vary() -> None:
    turns = Work("ten", ((),) * 10, drawn=3).turns()
    assert turns == Work("ten", ((),) * 10, drawn=3).turns()
    assert {len(set(names)) for names in turns} == {3}
    assert {name for names in turns for name in names} == {f"p{i}" for i in range(10)}
    assert len(set(map(frozenset, turns))) > 10


def test_what_is_not_installed_is_left_out_and_named() -> None:
    process = start(*BENCH, "--quick")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    text = out.decode()
    assert text.count("textbook NumPy") == 4
    assert "torch.optim" not in text
    assert "engine: blocks" in text
    assert 'pip install "multiopt[fast,torch,pyro,jax]"\n' in text


def test_without_a_package_of_a_peer_its_rows_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [(TWO, NUMPY, TEXTBOOK), (TWO, JAX, OPTAX)]
    monkeypatch.setattr(show, "comparisons", lambda quick: table)
    monkeypatch.setitem(sys.modules, "optax", None)
    assert main(["bench", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "jit" not in out
    assert out.endswith("Not installed: optax. To add it: pip install optax\n")
