"""The vectors of the spec: every library reproduces them, and their independent check holds."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt import rules
from spec import make_vectors
from spec.check_vectors import parsed
from tests.libraries import Library, assert_equal

SPEC = Path(__file__).parents[2] / "spec"
FILES = sorted((SPEC / "vectors").glob("*.json"))


@dataclass(frozen=True)
class Vector:
    """One case of a file."""

    file: str
    rule: str
    case: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.file}-{self.case['name']}-{self.case['dtype']}"


def vectors() -> list[Vector]:
    files = [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in FILES]
    return [Vector(name, file["rule"], case) for name, file in files for case in file["cases"]]


def hyperparameter(value: Any) -> Any:
    if isinstance(value, dict):
        numbers = value["schedule"]
        return lambda step: numbers[step - 1]
    return tuple(map(hyperparameter, value)) if isinstance(value, list) else value


def check_vectors(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the check in a process of its own, in which nothing can import multiopt."""
    code = (
        "import runpy, sys; sys.modules['multiopt'] = None; del sys.argv[0]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(SPEC / "check_vectors.py"), str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("vector", vectors(), ids=lambda vector: vector.id)
def test_every_library_reproduces_the_vectors(vector: Vector, library: Library) -> None:
    case = vector.case
    options, start, grads, steps = (
        parsed(case[key]) for key in ("hyperparameters", "param", "grads", "steps")
    )
    options = {name: hyperparameter(value) for name, value in options.items()}
    opt = mo.Optimizer(getattr(mo, vector.rule)(**options))
    param = library.param(np.array(start, case["dtype"]))
    for step, (grad, expected) in enumerate(zip(grads, steps, strict=True), start=1):
        grad = library.grad(np.array(grad, case["dtype"]))
        param = opt.step({"w": param}, {"w": grad})["w"]
        got = {"param": param, **opt.state("w").slots}
        assert list(got) == list(expected)
        for name, array in got.items():
            wanted = np.array(expected[name], case["dtype"])
            assert_equal(library.numpy(array), wanted, f"{name} after step {step}")


def test_every_rule_has_vectors_under_its_name() -> None:
    found = [getattr(rules, name) for name in rules.__all__ if name != "Rule"]
    modules = {rule.__module__.rpartition(".")[2]: rule for rule in found}
    files = {path.stem: json.loads(path.read_text(encoding="utf-8"))["rule"] for path in FILES}
    # The files have elements, each with a history of its own; DCTAdam may treat them as a whole.
    assert files == {
        name: rule.__name__ for name, rule in modules.items() if rule.elementwise is True
    }
    assert {path.stem for path in (SPEC / "rules").glob("*.md")} == set(modules)


def test_vectors_are_what_make_vectors_writes(tmp_path: Path) -> None:
    make_vectors.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FILES}
    for path in FILES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_check_holds() -> None:
    done = check_vectors(SPEC / "vectors")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(FILES)
    assert done.stderr == ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("damage", ["param", "slot", "flag", "input"])
def test_check_finds_damage(path: Path, damage: str, tmp_path: Path) -> None:
    file = json.loads(path.read_text(encoding="utf-8"))
    case = next(
        case
        for case in file["cases"]
        if case["finite"] and case["dtype"] == "float64" and len(case["steps"][-1]) > 1
    )
    if damage == "flag":
        case["finite"] = False
    elif damage == "input":
        flip(case["grads"][-1])
    else:
        after = case["steps"][-1]
        flip(after["param" if damage == "param" else list(after)[1]])
    (tmp_path / path.name).write_text(json.dumps(file), encoding="utf-8")
    done = check_vectors(tmp_path)
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert case["name"] in done.stderr


def flip(array: list[str]) -> None:
    """Change the first number of an array by a millionth."""
    array[0] = (float.fromhex(array[0]) * (1 + 1e-6)).hex()


def test_check_of_nothing_fails(tmp_path: Path) -> None:
    assert check_vectors(tmp_path).returncode == 1
