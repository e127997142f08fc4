"""Saves that are killed, refused by the system or go wrong: the old file or the new one, whole."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

import multiopt as mo
from tests.libraries import assert_equal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no signals that kill, no limits")

IN_NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-ec")


def often(moderate: int, thorough: int) -> int:
    """How often to do something: that depends on the profile of hypothesis."""
    return thorough if settings().max_examples >= 1000 else moderate


def happened(scenario: str, folder: Path, number: int = 0, mount: str = "") -> dict[str, int]:
    """What a scenario of ``killed`` tells, perhaps with something mounted for it alone."""
    command = [sys.executable, "-m", "tests.state.killed", scenario, str(folder), str(number)]
    if mount:
        command = [*IN_NAMESPACE, f'{mount}; shift; exec "$@"', "sh", str(folder), *command]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        # No kernels to compile, and no threads, beside which one does not fork.
        "MULTIOPT_ENGINE": "blocks",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, int] = json.loads(done.stdout)
    return told


def needs_mount(folder: Path, mount: str) -> None:
    """Skip where one may not mount."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare on this machine")
    probe = [*IN_NAMESPACE, mount, "sh", str(folder)]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.strip()}")


# Killed


def test_a_run_that_is_killed_at_any_moment_goes_on_from_its_last_save(tmp_path: Path) -> None:
    kills = often(60, 500)
    told = happened("at_random_moments", tmp_path, kills)
    # Some were killed in the middle of a save, some between its rename and the report.
    assert told["stray"] > 0
    assert 0 < told["newer"] <= told["saves"]


def test_a_save_that_is_killed_at_any_of_its_calls_leaves_the_old_file_or_the_new_one(
    tmp_path: Path,
) -> None:
    told = happened("at_every_call", tmp_path, often(7, 1))
    assert 0 < told["newer"] < told["killed"]
    assert 0 < told["stray"] < told["killed"]


def test_a_save_leaves_the_temporary_file_of_one_that_is_under_way(tmp_path: Path) -> None:
    happened("beside_a_save_that_stands_still", tmp_path)


def test_what_a_dead_save_of_a_read_only_file_left_is_removed(tmp_path: Path) -> None:
    happened("of_a_file_that_is_read_only", tmp_path)


def test_several_processes_may_save_to_one_file(tmp_path: Path) -> None:
    assert happened("all_at_once", tmp_path, often(20, 300))["loads"] > 0


def stepped(path: Path | None = None) -> tuple[mo.Optimizer, dict[str, np.ndarray]]:
    """A run of one step, saved."""
    opt, params = mo.Optimizer(mo.Adam(lr=0.1)), {"w": np.zeros((100, 100)), "b": np.zeros(())}
    go_on(opt, params)
    if path is not None:
        opt.save(path)
    return opt, params


def go_on(opt: mo.Optimizer, params: dict[str, np.ndarray]) -> None:
    opt.step(params, {name: np.cos(w + opt.steps) for name, w in params.items()})


def assert_holds(path: Path, opt: mo.Optimizer) -> None:
    its = mo.Optimizer(mo.Adam())
    its.load(path)
    assert its.steps == opt.steps
    assert its.pending == opt.names
    for name, entry in its.state_dict()["pending"].items():
        assert entry["step"] == opt.state(name).step
        for slot, array in opt.state(name).slots.items():
            assert_equal(entry["slots"][slot], array, f"{slot} of {name}")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["run.safetensors", "run", "[ab]*?.run", ".hidden", "é x"])
def test_a_save_removes_what_dead_saves_left_and_nothing_else(tmp_path: Path, name: str) -> None:
    """What they left is found as any crash leaves it: copied while a save flushes it."""
    path, kept = tmp_path / name, tmp_path / "kept"
    opt, _ = stepped(path)
    kept.mkdir()
    flush = os.fsync

    def copied(descriptor: int) -> None:
        for file in tmp_path.glob(".*.tmp"):
            if "copied" not in file.name:
                shutil.copy(file, kept / file.name)
        flush(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", copied)
        for _ in range(3):
            opt.save(path)
            opt.save(tmp_path / f"{name}.other")
            opt.save(tmp_path / f"other.{name}")
    strays = sorted(kept.iterdir())
    assert len(strays) == 9
    mine = {file for file in strays if file.name.startswith(f".{name}.")}
    its = {file for file in mine if file.name.startswith(f".{name}.other.")}
    mine -= its
    assert (len(mine), len(its)) == (3, 3)
    for file in strays:
        shutil.copy(file, tmp_path / file.name)
    others = (".tmp", f".{name}.tmp", f".{name}.notes", f"{name}.0123.tmp", f".{name}.notes.tmp")
    for other in others:
        (tmp_path / other).write_text("the user's own")
    (tmp_path / f".{name}.{'0' * 32}.tmp").mkdir()

    before = {file.name for file in tmp_path.iterdir()}
    opt.save(path)
    after = {file.name for file in tmp_path.iterdir()}
    assert before - after == {file.name for file in mine}
    assert after <= before


# Durable


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(path)
    old, flush = path.stat().st_ino, os.fsync
    flushed: list[tuple[int, int, int]] = []

    def seen(descriptor: int) -> None:
        flush(descriptor)
        file = os.fstat(descriptor)
        flushed.append((file.st_ino, file.st_size, path.stat().st_ino))

    monkeypatch.setattr(os, "fsync", seen)
    go_on(opt, params)
    opt.save(path)
    new = path.stat()
    (first, size, named), (folder, _, named_then) = flushed
    assert (first, size, named) == (new.st_ino, new.st_size, old)
    assert (folder, named_then) == (tmp_path.stat().st_ino, new.st_ino)


# Refused


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_may_not_grow_is_an_os_error_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(path)
    before = contents(tmp_path)
    (size,) = map(len, before.values())
    rng = random.Random(0)
    for limit in (0, 1, 8, size - 1, *(rng.randrange(size) for _ in range(often(20, 500)))):
        go_on(opt, params)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as info, largest_file(limit):
            opt.save(path)
        assert info.value.errno == errno.EFBIG
        assert contents(tmp_path) == before
    opt.save(path)
    assert_holds(path, opt)


def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=2m tmpfs "$1"'
    needs_mount(tmp_path, mount)
    happened("on_a_full_disk", tmp_path, mount=mount)


def test_a_disk_that_is_read_only_is_an_os_error(tmp_path: Path) -> None:
    mount = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1"'
    needs_mount(tmp_path, mount)
    stepped(tmp_path / "run.safetensors")
    before = contents(tmp_path)
    happened("on_a_read_only_disk", tmp_path, mount=mount)
    assert contents(tmp_path) == before


def test_a_folder_without_permission_is_an_os_error(tmp_path: Path) -> None:
    happened("without_permission", tmp_path)


def test_a_folder_that_may_be_written_and_not_read_is_one_to_save_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    opened, refused = os.open, 0

    def refusing(name: str | Path, flags: int, *more: int, **others: int | None) -> int:
        nonlocal refused
        if Path(name) == tmp_path:
            refused += 1
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return opened(name, flags, *more, **others)  # type: ignore[arg-type]

    # Root, as which tests may run, may read anything.
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing)
        opt, params = stepped(path)
    assert refused == 1
    assert_holds(path, opt)
    # Nothing else passes.
    go_on(opt, params)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open, 0, errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            opt.save(path)


def failing(function: Callable[..., object], place: int, code: int) -> Callable[..., object]:
    """A function whose call of this number, from 0 on, fails before it does anything."""
    calls = 0

    def call(*arguments: object, **more: object) -> object:
        nonlocal calls
        calls += 1
        if calls == place + 1:
            raise OSError(code, os.strerror(code))
        return function(*arguments, **more)

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_late_is_an_os_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(path)
    before = contents(tmp_path)
    go_on(opt, params)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), 0, code))
        with pytest.raises(OSError, match=os.strerror(code)) as info:
            opt.save(path)
    assert info.value.errno == code
    assert contents(tmp_path) == before
    go_on(opt, params)
    opt.save(path)
    assert_holds(path, opt)
    assert list(contents(tmp_path)) == ["run.safetensors"]


def test_a_name_that_does_not_reach_the_disk_is_an_os_error_and_the_new_file_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(path)
    go_on(opt, params)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, 1, errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            opt.save(path)
    assert_holds(path, opt)
    assert list(contents(tmp_path)) == ["run.safetensors"]


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("none/run.safetensors", errno.ENOENT),
        ("file/run.safetensors", errno.ENOTDIR),
        ("folder", errno.EISDIR),
        ("loop", errno.ELOOP),
        ("x" * 256, errno.ENAMETOOLONG),
        ("/proc/run.safetensors", errno.ENOENT),
    ],
    ids=["no folder", "a file", "a folder", "a loop", "a long name", "proc"],
)
def test_a_target_that_cannot_be_a_file_is_an_os_error(
    tmp_path: Path, target: str, code: int
) -> None:
    if target.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc on this machine")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    opt, params = stepped()
    with pytest.raises(OSError, match=rf"\[Errno {code}\]") as info:
        opt.save(tmp_path / target)
    assert info.value.errno == code
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "a file"
    go_on(opt, params)
    opt.save(tmp_path / "folder" / "run.safetensors")
    assert_holds(tmp_path / "folder" / "run.safetensors", opt)


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    opt, _ = stepped(path)
    assert_holds(path, opt)
    assert list(contents(tmp_path)) == [path.name]


def test_an_interrupt_in_a_save_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.safetensors"
    opt, params = stepped(path)
    before = contents(tmp_path)
    go_on(opt, params)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.save(path)
    assert contents(tmp_path) == before
