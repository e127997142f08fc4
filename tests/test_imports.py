"""What importing and installing multiopt brings along."""

import os
import re
import subprocess
import sys
from importlib.metadata import requires

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
    loaded = loaded_after(f"{make[library]}\n{step}")
    assert f"multiopt_{library}" in loaded
    assert not loaded & {other, f"multiopt_{other}", "pyro", "numba"}


def test_a_plain_install_brings_five_packages() -> None:
    plain = [line for line in requires("multiopt") or [] if "extra ==" not in line]
    names = {re.match(r"[\w-]+", line).group() for line in plain}  # type: ignore[union-attr]
    assert names == {"numpy", "array-api-compat", "safetensors", "tqdm", "xxhash"}
