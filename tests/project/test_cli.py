"""The command line itself: help, version, Ctrl-C, readers who have enough, progress bars."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt.cli import main
from tests.benchmarks.__main__ import main as benchmarks

ROOT = Path(__file__).parents[2]

#: ``python -c`` with this is the command where nothing but NumPy is installed.
NUMPY_ALONE = """
import sys
sys.modules.update(dict.fromkeys({"torch", "pyro", "jax", "numba"}))
from multiopt.cli import main
sys.exit(main())
"""

DEMO = ["-c", NUMPY_ALONE, "demo", "--steps"]
BENCH = ["-c", NUMPY_ALONE, "bench"]
BENCHMARKS = ["-m", "tests.benchmarks", "--quick", "--only", "distinct"]


def start(*arguments: str, folder: Path = ROOT, **streams: Any) -> "subprocess.Popen[bytes]":
    """A Python with these arguments, in a group of processes of its own, as a shell starts it."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "backends")))
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )


def on_a_terminal(*arguments: str) -> str:
    """What a Python with these arguments writes to a terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 80))
    process = start(*arguments, stdout=its, stderr=its)
    os.close(its)
    written = b""
    try:
        while data := os.read(ours, 4096):
            written += data
    except OSError:  # Linux says so that the other side is closed.
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode()


# Without a command


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"multiopt {mo.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mo.__version__


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert main([]) == 0
    assert capsys.readouterr() == (text, "")
    assert all(f"    {command} " in text for command in ("demo", "bench", "show"))


def test_a_wrong_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["dance"])
    assert exit_.value.code == 2
    assert "invalid choice: 'dance'" in capsys.readouterr().err


# Ctrl-C


def until(condition: Callable[[], bool]) -> None:
    """Wait for something."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_interrupted(
    process: "subprocess.Popen[bytes]", when: Callable[[], bool], program: str = "multiopt"
) -> None:
    """Whether a command ends as it should if Ctrl-C comes to its group of processes."""
    until(when)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.decode()) == (130, f"\n{program}: interrupted\n")


def test_ctrl_c_ends_the_demo_with_one_line() -> None:
    process = start("-u", *DEMO, "1000000")
    out = process.stdout
    assert out is not None
    is_interrupted(process, lambda: out.readline().startswith(b"NumPy alone"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
@pytest.mark.parametrize("row", ["distinct", "without-fast", "import"])
def test_ctrl_c_ends_the_benchmarks_and_what_it_has_started(row: str) -> None:
    process = start("-m", "tests.benchmarks", "--only", row)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    started: set[str] = set()

    def measures() -> bool:
        started.update(children.read_text().split())
        return any(map(has_numpy, started))

    def has_numpy(child: str) -> bool:
        try:
            return "numpy" in Path(f"/proc/{child}/maps").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    is_interrupted(process, measures, "python -m tests.benchmarks")
    until(lambda: not any(map(has_numpy, started)))


def test_ctrl_c_that_comes_while_a_string_is_executed_is_no_other(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("""
import sys
from multiopt import cli
cli.demo = lambda steps, seed: exec("raise KeyboardInterrupt")
sys.exit(cli.main(["demo"]))
""")
    process = start("-m", "interrupted", folder=tmp_path)
    assert process.communicate(timeout=60) == (b"", b"\nmultiopt: interrupted\n")
    assert process.returncode == 130


# Readers


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "multiopt"],
        ["-m", "multiopt", "--help"],
        ["-m", "multiopt", "--version"],
        [*DEMO, "200"],
        [*BENCH, "--quick"],
        BENCHMARKS,
    ],
    ids=lambda arguments: arguments[-1],
)
def test_a_reader_who_has_enough_is_no_error(arguments: list[str]) -> None:
    process = start(*arguments)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


# The terminal


def test_progress_bars_are_for_terminals() -> None:
    process = start(*DEMO, "200")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"100%" not in out
    written = on_a_terminal(*DEMO, "200")
    for title in ("NumPy, first half", "NumPy, second half"):
        assert f"{title:19}100%" in written
    assert "ELBO -" in written


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ([*BENCH, "--quick"], "one array of 1e5: NumPy and textbook NumPy"),
        (BENCHMARKS, "distinct: NumPy, names distinct and NumPy"),
    ],
)
def test_measurements_have_a_bar_on_a_terminal_alone(arguments: list[str], title: str) -> None:
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"100%" not in out
    written = on_a_terminal(*arguments)
    assert title in written
    assert "100%" in written


@pytest.mark.parametrize("wide", [False, True])
def test_tables_are_as_wide_as_the_terminal_or_80_columns(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    wide: bool,
) -> None:
    opt, names = mo.Optimizer(mo.Adam(amsgrad=True)), ["a" * 40, "b" * 40]
    params = {name: np.ones((1000, 1)) for name in names}
    opt.step(params, {name: np.ones((1000, 1)) for name in names})
    opt.save(tmp_path / "run")
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", None)
    if wide:
        monkeypatch.setenv("COLUMNS", "140")
    assert main(["show", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading, *rows = lines[2:5]
    assert heading.split() == ["name", "state", "rule", "step", "slots", "shape", "dtype", "bytes"]
    assert len(heading) <= (140 if wide else 80)
    for name, row in zip(names, rows, strict=True):
        assert len(row) == len(heading)
        assert row.endswith(" 24000")
        assert (name in row) == wide
        assert ("…" in row) != wide
        assert row.startswith(name[:5])


# The file of --json


@pytest.mark.parametrize(
    ("command", "bench"),
    [
        (lambda *arguments: main(["bench", *arguments]), "multiopt.cli.bench"),
        (lambda *arguments: benchmarks(arguments), "tests.benchmarks.__main__.bench"),
    ],
    ids=["bench", "benchmarks"],
)
def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., int],
    bench: str,
) -> None:
    monkeypatch.setattr(bench, None)
    with pytest.raises(SystemExit) as exit_:
        command("--json", str(tmp_path / "none" / "bench.json"))
    assert exit_.value.code == 2
    assert "--json must be a file that can be written" in capsys.readouterr().err
