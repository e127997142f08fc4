"""What users install: the wheel, in an environment that has its dependencies and nothing else."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["multiopt", "multiopt_jax", "multiopt_kernels", "multiopt_numpy", "multiopt_torch"]

#: What a program of a user does, with NumPy alone.
PROGRAM = """
import importlib.util
import sys
import numpy as np
import multiopt as mo

for library in ("torch", "jax", "numba", "pyro", "hypothesis", "pytest"):
    assert importlib.util.find_spec(library) is None, library
assert "site-packages" in mo.__file__, mo.__file__
opt = mo.Optimizer(mo.Adam(lr=0.1), clip=mo.Clip(norm=1.0))
w = {"w": np.ones(3)}
opt.step(w, {"w": np.array([1.0, 2.0, 3.0])})
opt.save("run.safetensors", metadata={"epoch": 1})
other = mo.Optimizer(mo.Adam(lr=0.1), clip=mo.Clip(norm=1.0))
assert other.load("run.safetensors").metadata == {"epoch": 1}
v = {"w": w["w"].copy()}
opt.step(w, {"w": np.ones(3)})
other.step(v, {"w": np.ones(3)})
assert (v["w"] == w["w"]).all()
try:
    import multiopt.adapters.pyro
except ImportError as error:
    assert "pyro" in str(error), error
"""


def run(*command: str | Path, cwd: Path) -> str:
    # The path by which the tests find the sources is not for what is installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def required() -> list[str]:
    """The distributions that an install without extras brings, each without extras of its own."""
    found, waiting = list[str](), ["multiopt"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.append(name)
        for line in metadata.requires(name) or ():
            requirement, _, marker = line.partition(";")
            if "extra" not in marker and "platform" not in marker:
                waiting.append(requirement.split("[")[0].split(">")[0].split("=")[0].strip())
    return found[1:]


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel; dependencies are links to those of this one."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where, cwd=folder).strip())
    for name in required():
        files = metadata.files(name) or ()
        tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            source = Path(str(metadata.distribution(name).locate_file(top)))
            if not (packages / top).exists():
                (packages / top).symlink_to(source)
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        *("--no-index", wheel),
        cwd=folder,
    )
    return python


def test_the_wheel_has_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*PACKAGES, next(top for top in tops if top.endswith(".dist-info"))}
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
        root = ROOT if package == "multiopt" else ROOT / "backends"
        files = [path for path in (root / package).rglob("*.*") if "__pycache__" not in path.parts]
        wanted = {path.relative_to(root).as_posix() for path in files}
        assert {name for name in names if name.startswith(f"{package}/")} == wanted


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        about = message_from_bytes(archive.read(path))
        licenses = [name for name in archive.namelist() if name.endswith("LICENSE")]
    assert (about["Name"], about["License-Expression"]) == ("multiopt", "Apache-2.0")
    assert about["Requires-Python"] == ">=3.11"
    assert len(licenses) == 1
    urls = [url.partition(",")[0] for url in about.get_all("Project-URL") or ()]
    assert urls == ["Documentation", "Source", "Issues", "Changelog"]
    assert sorted(about.get_all("Provides-Extra") or ()) == ["fast", "jax", "pyro", "torch"]


def test_the_sdist_has_what_the_tests_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("Makefile", "conftest.py", "constraints.txt", "CHANGELOG.md", "SECURITY.md"):
        assert name in names
    assert "tests/project/test_wheel.py" in names
    assert "spec/vectors/adam.json" in names


def test_it_works_in_a_bare_environment(bare: Path, tmp_path: Path) -> None:
    run(bare, "-c", PROGRAM, cwd=tmp_path)
    command = bare.parent / "multiopt"
    assert run(command, "--version", cwd=tmp_path).startswith("multiopt ")
    assert "1 names seen" in run(command, "show", "run.safetensors", cwd=tmp_path)
    assert run(command, cwd=tmp_path).startswith("usage: multiopt")
    # Numba, torch and JAX are not there.
    verified = run(command, "verify", cwd=tmp_path)
    assert "NumPy, blocks" in verified
    assert "torch" not in verified
    assert "Every promise is kept here." in verified
