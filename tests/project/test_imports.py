"""What importing and installing multiopt brings along, and what may import what."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

HEAVY = {"torch", "jax", "numba", "pyro", "tqdm"}


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after running some code."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    run = [sys.executable, "-c", f"{code}\n{report}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(run, env=env, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_multiopt_loads_no_framework() -> None:
    assert not loaded_after("import multiopt") & HEAVY


def test_stepping_numpy_arrays_loads_no_framework() -> None:
    code = """
import numpy as np, multiopt as mo
opt = mo.Optimizer(mo.Adam(), mo.Clip(norm=1.0))
opt.step({"w": np.ones(3)}, {"w": np.ones(3)})
opt.load_state_dict(opt.state_dict())
"""
    loaded_after(code)  # Numba is loaded where a kernel is not on disk yet.
    loaded = loaded_after(code)
    assert "multiopt_numpy" in loaded
    assert not loaded & (HEAVY | {"multiopt_torch", "multiopt_jax"})


@pytest.mark.parametrize(("library", "other"), [("torch", "jax"), ("jax", "torch")])
def test_a_step_loads_the_backend_of_its_arrays_only(library: str, other: str) -> None:
    make = {
        "torch": "import torch; w, g = torch.ones(3), torch.ones(3)",
        "jax": "import jax.numpy as jnp; w, g = jnp.ones(3), jnp.ones(3)",
    }
    step = "import multiopt as mo; mo.Optimizer(mo.Adam()).step({'w': w}, {'w': g})"
    loaded_after(f"{make[library]}\n{step}")  # Numba is loaded where a kernel is not on disk yet.
    loaded = loaded_after(f"{make[library]}\n{step}")
    assert f"multiopt_{library}" in loaded
    assert not loaded & {other, f"multiopt_{other}", "pyro", "numba"}


def test_a_plain_install_brings_five_packages() -> None:
    plain = [line for line in requires("multiopt") or [] if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line).group() for line in plain}  # type: ignore[union-attr]
    assert names == {"numpy", "array-api-compat", "safetensors", "tqdm", "xxhash"}


# The contracts of import-linter, in pyproject.toml

ROOT = Path(__file__).parents[2]

#: A module, what is imported there against a contract, and the name of the contract.
PLANTED = [
    ("multiopt/step/run.py", "from multiopt import registry", "Imports point one way"),
    ("multiopt/engine.py", "from multiopt import registry", "Imports point one way"),
    ("multiopt/step/report.py", "from multiopt import optimizer", "Imports point one way"),
    ("multiopt/entry.py", "import multiopt", "Imports point one way"),
    ("multiopt/in_no_layer.py", "import math", "Imports point one way"),
    ("multiopt/rules/rule.py", "from multiopt.rules import adam", "Imports make no circle"),
    (
        "backends/multiopt_kernels/forms.py",
        "from multiopt_kernels import engines",
        "Imports of the engines point one way",
    ),
    (
        "backends/multiopt_kernels/in_no_layer.py",
        "import math",
        "Imports of the engines point one way",
    ),
    (
        "backends/multiopt_torch/backend.py",
        "import multiopt_jax",
        "Backends share the NumPy backend and the engines alone",
    ),
    (
        "multiopt/registry.py",
        "import multiopt_numpy",
        "The core finds a backend by name, never by an import",
    ),
    (
        "backends/multiopt_jax/backend.py",
        "from multiopt.step import report",
        "A backend sees its protocol, engines and rules, not the registry",
    ),
    (
        "multiopt/step/skips.py",
        "import torch",
        "A library is imported by what is for it, never by the core",
    ),
    (
        "multiopt/bench/show.py",
        "import optax",
        "A library is imported by what is for it, never by the core",
    ),
    (
        "multiopt/bench/show.py",
        "from tests.benchmarks import works",
        "The project's tests and benchmarks are not for its users",
    ),
    (
        "backends/multiopt_kernels/blocks/group.py",
        "import numba",
        "A library is imported by what is for it, never by the core",
    ),
]


def broken_contracts(folder: Path) -> set[str]:
    """The names of the contracts that the code in a folder breaks."""
    run = [sys.executable, "-c", "from importlinter.cli import *; lint_imports_command()"]
    done = subprocess.run(
        [*run, "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", "backends"])},
        capture_output=True,
        text=True,
        check=False,
    )
    broken = set(re.findall(r"^(.*) BROKEN", done.stdout, re.MULTILINE))
    assert done.returncode == (1 if broken else 0), done.stdout + done.stderr
    return broken


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the code and of its contracts."""
    for name in ("multiopt", "backends"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_code_keeps_its_contracts(copy: Path) -> None:
    assert broken_contracts(copy) == set()


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED)
def test_an_import_against_a_contract_is_noticed(
    copy: Path, file: str, line: str, contract: str
) -> None:
    assert (copy / file).exists() or "in_no_layer" in file
    with (copy / file).open("a") as module:
        module.write(f"\n{line}\n")
    assert contract in broken_contracts(copy)
