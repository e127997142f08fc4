"""Runs that save at every step and are killed.

``python -m tests.state.killed SCENARIO FOLDER NUMBER`` runs one.

A process of its own, which imports only numpy and multiopt: it forks the processes that save, and
one with the threads of torch or JAX must not fork. It prints what happened as JSON.
"""

import errno
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import multiopt as mo

SHAPES = {"encoder.weight": (200, 100), "scale": (), "loc": (3000,)}

#: Children that have not ended.
ALIVE: set[int] = set()


def new_run() -> mo.Optimizer:
    return mo.Optimizer(mo.Adam())


def go_on(opt: mo.Optimizer) -> None:
    """Take the next step, whose gradients, and so the slots, are those of its number alone."""
    rng = np.random.default_rng(opt.steps)
    params = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    grads = {name: np.asarray(rng.random(w.shape), np.float32) for name, w in params.items()}
    opt.step(params, grads)


def params_of(step: int) -> dict[str, np.ndarray]:
    """The parameters that are saved with the state of a step; one has no state."""
    return {"loc": np.full(3000, step, np.float32), "frozen": np.full((50, 40), float(step))}


def keep(opt: mo.Optimizer, path: Path) -> None:
    opt.save(path, params=params_of(opt.steps))


def loaded(path: Path) -> mo.Optimizer:
    """The state in a file, whose parameters are of the same step."""
    opt, params = new_run(), params_of(-1)
    opt.load(path, params=params)
    for name, param in params.items():
        assert (param == opt.steps).all(), f"{name} is of another step than the state"
    return opt


def assert_holds(path: Path, opt: mo.Optimizer) -> None:
    """What is in the file is this state, and all of it."""
    mine, its = opt.state_dict(), loaded(path).state_dict()
    assert its["pending"].keys() == mine["entries"].keys()
    assert its["steps"] == mine["steps"]
    for name, entry in mine["entries"].items():
        found = its["pending"][name]
        assert found["step"] == entry["step"]
        assert found["slots"].keys() == entry["slots"].keys()
        for slot, array in entry["slots"].items():
            assert (found["slots"][slot] == array).all(), f"{slot} of {name}"


def others(path: Path) -> list[Path]:
    """What is beside the file."""
    return [one for one in path.parent.iterdir() if one != path]


def refusal(opt: mo.Optimizer, path: Path) -> int | None:
    """The system's number for why it cannot be saved; None if it was."""
    try:
        keep(opt, path)
    except OSError as error:
        return error.errno
    return None


def fork(work: Callable[[], None]) -> int:
    """Let a child do something and end; its status is 1 if that failed."""
    child = os.fork()
    if child:
        ALIVE.add(child)
        return child
    ALIVE.clear()
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def kill(child: int = 0) -> int:
    """Kill a child and return how it ended; by default this process."""
    os.kill(child or os.getpid(), signal.SIGKILL)
    return ended(child)


def ended(child: int) -> int:
    """How a child ended: its status, or the number of a signal, negative."""
    status = os.waitpid(child, 0)[1]
    ALIVE.remove(child)
    return os.waitstatus_to_exitcode(status)


def at_random_moments(folder: Path, kills: int) -> dict[str, int]:
    """Kill a run again and again; each goes on from the file.

    The file must hold the last save that the run said was finished, or the one it was at.
    """
    rng, path = random.Random(kills), folder / "run.safetensors"
    opt = new_run()
    go_on(opt)
    start = time.perf_counter()
    for _ in range(10):
        keep(opt, path)
    span = (time.perf_counter() - start) / 10
    seen = {"stray": 0, "newer": 0, "saves": 0}
    for _ in range(kills):
        begun, news = opt.steps, os.pipe()

        def save_on(run: mo.Optimizer = opt, report: int = news[1]) -> None:
            while True:
                go_on(run)
                keep(run, path)
                os.write(report, b".")

        child = fork(save_on)
        os.close(news[1])
        if rng.random() < 0.8:
            select.select([news[0]], [], [])
        time.sleep(rng.uniform(0, 3 * span))
        assert kill(child) == -signal.SIGKILL
        with os.fdopen(news[0], "rb") as reader:
            finished = begun + len(reader.read())

        found = loaded(path).steps
        assert finished <= found <= finished + 1, (finished, found)
        while opt.steps < found:
            go_on(opt)
        assert_holds(path, opt)
        seen["stray"] += len(others(path))
        seen["newer"] += found > finished
        seen["saves"] += found - begun
        keep(opt, path)
        assert others(path) == []
    return seen


def at_every_call(folder: Path, stride: int) -> dict[str, int]:
    """Kill a save before each call of a C function that it makes, or before every so many."""
    path, opt = folder / "run.safetensors", new_run()
    go_on(opt)
    keep(opt, path)
    # What a save makes only once, such as imports, is made now.
    calls = counted(lambda: keep(opt, path))
    seen = {"calls": calls, "killed": 0, "stray": 0, "newer": 0}
    for place in range(calls - 1, -1, -stride):
        keep(opt, path)

        def save(place: int = place) -> None:
            go_on(opt)
            with calling_before(place, kill):
                keep(opt, path)

        assert ended(fork(save)) == -signal.SIGKILL, place
        seen["killed"] += 1
        newer = loaded(path).steps > opt.steps
        seen["newer"] += newer
        seen["stray"] += len(others(path))
        if newer:
            go_on(opt)
        assert_holds(path, opt)
        keep(opt, path)
        assert others(path) == []
    return seen


def counted(work: Callable[[], None]) -> int:
    """How many calls of C functions something makes."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    with calling_before(None, count):
        work()
    return calls


@contextmanager
def calling_before(place: int | None, act: Callable[[], Any]) -> Iterator[None]:
    """Act before the call of a C function with this number; before each one if it is None."""
    number = -1

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal number
        if event == "c_call":
            number += 1
            if place is None or number == place:
                act()

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def beside_a_save_that_stands_still(folder: Path, _: int) -> dict[str, int]:
    """Save while another process is in the middle of a save: its temporary file is left alone."""
    path, opt = folder / "run.safetensors", new_run()
    go_on(opt)
    keep(opt, path)

    def stand_still() -> None:
        flush = os.fsync

        def stopped(descriptor: int) -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            flush(descriptor)

        os.fsync = stopped  # type: ignore[assignment]
        keep(opt, path)

    child = fork(stand_still)
    # It stops before each flush: of the temporary file, and of the folder.
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    beside = others(path)
    assert len(beside) == 1
    for _ in range(3):
        go_on(opt)
        keep(opt, path)
        assert others(path) == beside
    assert_holds(path, opt)
    os.kill(child, signal.SIGCONT)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    os.kill(child, signal.SIGCONT)
    assert ended(child) == 0
    assert others(path) == []
    assert loaded(path).steps == 1
    return {}


def all_at_once(folder: Path, saves: int) -> dict[str, int]:
    """Several processes save to one file: none of them fails, and no file is left."""
    path, opt = folder / "run.safetensors", new_run()
    go_on(opt)
    keep(opt, path)

    def save_on() -> None:
        for _ in range(saves):
            go_on(opt)
            keep(opt, path)

    children = [fork(save_on) for _ in range(4)]
    loads = 0
    while children:
        assert loaded(path).steps >= 1
        loads += 1
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            assert status == 0
            children.remove(child)
            ALIVE.remove(child)
    assert others(path) == []
    assert loaded(path).steps == saves + 1
    return {"loads": loads}


def without_permission(folder: Path, _: int) -> dict[str, int]:
    """Save to a folder that this user may not write."""
    # Other users cannot reach the folders of pytest.
    place = Path(tempfile.mkdtemp())
    path, opt = place / "run.safetensors", new_run()
    go_on(opt)
    keep(opt, path)

    def save() -> None:
        if os.geteuid() == 0:
            become_nobody()
        run = loaded(path)
        assert refusal(run, path) == errno.EACCES
        go_on(run)
        assert run.steps == 2

    try:
        place.chmod(0o555)
        assert ended(fork(save)) == 0
        assert others(path) == []
        assert_holds(path, opt)
    finally:
        place.chmod(0o755)
        path.unlink()
        place.rmdir()
    return {}


def of_a_file_that_is_read_only(folder: Path, _: int) -> dict[str, int]:
    """A save that dies leaves a file that its user cannot write, since the old one was so."""
    place = Path(tempfile.mkdtemp())
    path, opt = place / "run.safetensors", new_run()
    go_on(opt)

    def save(dies: bool) -> None:
        if os.geteuid() == 0:
            become_nobody()
        if dies:
            os.fsync = lambda descriptor: kill()  # type: ignore[assignment]
        keep(opt, path)

    try:
        place.chmod(0o777)
        assert ended(fork(partial(save, False))) == 0
        path.chmod(0o444)
        assert ended(fork(partial(save, True))) == -signal.SIGKILL
        assert len(others(path)) == 1
        assert ended(fork(partial(save, False))) == 0
        assert others(path) == []
        assert path.stat().st_mode & 0o777 == 0o444
    finally:
        shutil.rmtree(place)
    return {}


def become_nobody() -> None:
    """Permissions do not bind the superuser."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def on_a_full_disk(folder: Path, _: int) -> dict[str, int]:
    """Save to a small disk that is full; the folder is one, on which nothing is yet."""
    path, filler, opt = folder / "run.safetensors", folder / "filler", new_run()
    go_on(opt)
    keep(opt, path)
    before = path.read_bytes()
    # Room for nothing, for the header, for a part of the arrays and for nearly all of them.
    for room in (0, 4096, len(before) // 2, len(before) - 4096):
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        filler.write_bytes(b"x" * (free - room))
        go_on(opt)
        assert refusal(opt, path) == errno.ENOSPC
        assert path.read_bytes() == before
        assert others(path) == [filler]
        filler.unlink()
    keep(opt, path)
    assert others(path) == []
    assert_holds(path, opt)
    return {}


def on_a_read_only_disk(folder: Path, _: int) -> dict[str, int]:
    """Save to a disk on which there is a file and that cannot be written."""
    path, opt = folder / "run.safetensors", new_run()
    opt.load(path)
    before = path.read_bytes()
    assert refusal(opt, path) == errno.EROFS
    assert path.read_bytes() == before
    assert others(path) == []
    go_on(opt)
    assert opt.steps == 2
    return {}


SCENARIOS = (
    *(at_random_moments, at_every_call, beside_a_save_that_stands_still, all_at_once),
    *(without_permission, of_a_file_that_is_read_only, on_a_full_disk, on_a_read_only_disk),
)


def main() -> NoReturn:
    scenario, folder, number = sys.argv[1:]
    by_name = {one.__name__: one for one in SCENARIOS}
    try:
        print(json.dumps(by_name[scenario](Path(folder), int(number))))
    finally:
        # Those of a scenario that failed.
        for child in ALIVE:
            os.kill(child, signal.SIGKILL)
    sys.exit()


if __name__ == "__main__":
    main()
