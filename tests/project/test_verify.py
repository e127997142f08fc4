"""``multiopt verify``: it says nothing of a machine that is right, and names what is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import multiopt as mo
from multiopt.cli import main
from multiopt.verify import checks
from multiopt.verify.operations import (
    FORMATS,
    OPERATIONS,
    cases,
    differ,
    nearest_bits,
    right_bits,
    wrong,
)
from multiopt.verify.places import NUMPY

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _few_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "EQUAL", ["SGD", "Adam", "LAMB"])
    monkeypatch.setattr(checks, "COUNT", 2000)
    monkeypatch.setenv("COLUMNS", "100")


def found(path: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], dict[str, int]], Any]:
    """The exit status, what is wrong where, and the whole document."""
    status = main(["verify", "--json", str(path), *arguments])
    document = json.loads(path.read_text())
    assert document["kept"] == (status == 0)
    return status, {(r["what"], r["where"]): r["off"] for r in document["results"]}, document


def off_by_an_ulp(sqrt: Any) -> Any:
    """A root whose last bit is sometimes wrong."""

    def root(x: Any, *rest: Any, **options: Any) -> Any:
        exact = sqrt(x, *rest, **options)
        return exact * (1 + 2**-23) if str(getattr(x, "dtype", "")).endswith("float32") else exact

    return root


def test_a_machine_that_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, off, document = found(tmp_path / "out.json", "--library", "array_api_strict")
    assert status == 0, off
    assert "Every promise is kept here." in capsys.readouterr().out
    assert {where for what, where in off if what == "rules"} == {
        "NumPy, compiled",
        "NumPy, blocks",
        "torch, compiled",
        "JAX, compiled",
        "array_api_strict",
    }
    assert {where for what, where in off if what == "a file"} == {
        "NumPy",
        "torch",
        "JAX",
        "array_api_strict",
    }
    # It is not correctly rounded, and so not used.
    (root,) = (r for r in document["results"] if r["where"] == "torch, float32")
    assert list(root["off"]) == ["sqrt"]
    assert not root["counts"]


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"]


def test_every_line_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(np, "sqrt", off_by_an_ulp(np.sqrt))
    assert main(["verify"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60
    assert "checks failed" in out


def test_a_library_whose_root_is_off_by_an_ulp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(array_api_strict, "sqrt", off_by_an_ulp(array_api_strict.sqrt))
    status, off, _ = found(tmp_path / "out.json", "--library", "array_api_strict")
    assert status == 1
    assert list(off["operations", "array_api_strict, float32"]) == ["sqrt"]
    assert off["operations", "array_api_strict, float64"] == {}
    assert list(off["rules", "array_api_strict"]) == ["Adam", "LAMB"]
    assert not any(off[key] for key in off if "strict" not in key[1] and "torch, f" not in key[1])
    said = " ".join(capsys.readouterr().out.split())
    assert "array_api_strict does not round as IEEE 754 says" in said
    assert "Try another version" in said


def test_numpy_whose_root_is_off_by_an_ulp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "sqrt", off_by_an_ulp(np.sqrt))
    status, off, _ = found(tmp_path / "out.json")
    assert status == 1
    assert list(off["operations", "NumPy, float32"]) == ["sqrt"]
    # Compiled kernels take roots by themselves, and differ from the rule as it stands.
    assert list(off["rules", "NumPy, compiled"]) == ["Adam", "LAMB"]


def test_a_process_that_flushes(tmp_path: Path) -> None:
    program = """
import sys
import torch
from multiopt.verify import checks
from multiopt.cli import main
checks.EQUAL, checks.COUNT = ["SGD"], 2000
assert torch.set_flush_denormal(True)
sys.exit(main(["verify"]))
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stdout.split())
    assert "This process takes subnormal numbers for zeros" in said
    assert "torch.set_flush_denormal(False)" in said


def test_a_file_that_is_not_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = mo.Optimizer.save

    def wrong_save(self: mo.Optimizer, path: Path, params: dict[str, Any]) -> Any:
        return save(self, path, params={name: x + 1 for name, x in params.items()})

    monkeypatch.setattr(mo.Optimizer, "save", wrong_save)
    status, off, _ = found(tmp_path / "out.json")
    assert status == 1
    assert off["a file", "NumPy"] == {"parameters": 1}


@pytest.mark.parametrize("name", ["no_such_library", "math"])
def test_a_library_that_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--library", name])
    assert caught.value.code == 2
    assert f"--library must be an Array API library that is installed; got {name!r}" in " ".join(
        capsys.readouterr().err.split()
    )


# What is right


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_right_results_are_those_of_numpy(dtype: str) -> None:
    x, y = cases(dtype, 20_000)
    assert np.isfinite(x).all()
    assert np.isfinite(y).all()
    assert (np.abs(x) < np.finfo(dtype).tiny).sum() > 1000
    with np.errstate(all="ignore"):
        for operation in OPERATIONS.values():
            given = [x, y][: operation.inputs]
            result = operation.perform(np, *given)
            assert not wrong(operation, given, result).any(), operation.name
            if result.dtype == np.bool_:
                assert wrong(operation, given, ~result).all()
                continue
            # One unit in the last place is noticed everywhere but at NaN.
            form = FORMATS[dtype]
            other = (result.view(form.bits) + form.bits(1)).view(dtype)
            assert (wrong(operation, given, other) | np.isnan(result)).all(), operation.name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_right_conversions_are_those_of_numpy(dtype: str) -> None:
    x, _ = cases("float32", 20_000)
    form = FORMATS[dtype]
    # Ties, and next to ties, too.
    every = np.arange(2**15, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    middle = every[1:] / 2 + every[:-1] / 2
    x = np.concatenate([x, middle, np.nextafter(middle, np.float32(0))])
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert not differ(nearest_bits(x, dtype), expected.view(np.uint16), form).any()


def test_roots_of_a_few_numbers() -> None:
    bits = np.array([0.0, 4.0, 2.0, -1.0], np.float64).view(np.uint64)
    roots = right_bits(OPERATIONS["sqrt"], [bits], FORMATS["float64"]).view(np.float64)
    assert roots[:3].tolist() == [0.0, 2.0, 2**0.5]
    assert np.isnan(roots[3])
    assert NUMPY.name == "NumPy"
