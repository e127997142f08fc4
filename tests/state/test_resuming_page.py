"""The programs of docs/resuming.md, killed and started again, end as those that are left alone."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "resuming.md"

PROGRAMS = dict(
    re.findall(r"^## (\w+)\n.*?^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
)

#: The file that each program saves.
FILES = {"NumPy": "numpy.safetensors", "torch": "torch.safetensors", "Pyro": "pyro.pt"}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signals that kill")


def test_the_page_has_its_programs() -> None:
    assert list(PROGRAMS) == list(FILES)


def started(program: str, folder: Path) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAMS[program]],
        cwd=folder,
        # Without kernels to compile, it starts faster.
        env={**os.environ, "MULTIOPT_ENGINE": "blocks", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_after(run: "subprocess.Popen[str]", path: Path, saves: int) -> bool:
    """Kill a program once it has saved so often; False if it ended before."""
    seen: set[int] = set()
    while run.poll() is None:
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        if len(seen) > saves:
            run.kill()
            run.communicate()
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.parametrize("program", FILES)
def test_a_program_that_is_killed_ends_as_one_that_is_left_alone(
    tmp_path: Path, program: str
) -> None:
    with started(program, tmp_path / "whole") as whole:
        expected, errors = whole.communicate()
    assert whole.returncode == 0, errors
    kills = 0
    while True:
        with started(program, tmp_path / "killed") as run:
            if killed_after(run, tmp_path / "killed" / FILES[program], saves=8):
                kills += 1
                continue
            found, errors = run.communicate()
        break
    assert run.returncode == 0, errors
    assert found == expected
    assert kills >= 2
