"""Machine code on disk: found again when nothing changed, compiled again when anything did."""

import errno
import gc
import importlib.metadata
import json
import os
import platform
import resource
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from multiopt_kernels.cpu import object_cache
from multiopt_kernels.cpu.object_cache import ObjectCode, cached, linked
from tests.engines.machine_code import call, compiled, run

CODE = ObjectCode({"run": "symbol"}, (b"\x7fELF\x00\n\xff", b"", b"second\n{}"))
OTHER = ObjectCode({"run": "other"}, (b"other",))


class Made:
    """What ``make`` does, counted."""

    def __init__(self, code: ObjectCode = CODE) -> None:
        self.code = code
        self.times = 0

    def __call__(self) -> ObjectCode:
        self.times += 1
        return self.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MULTIOPT_CACHE_DIR", str(folder))
    return folder


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def is_hit(*identity: str | bytes, code: ObjectCode = CODE) -> bool:
    """Whether a call finds the code; right in any case."""
    made = Made(code)
    assert cached("kernel", identity, made) == code
    return not made.times


def answer(number: int, name: str = "answer") -> ObjectCode:
    """A kernel that returns a number as its status."""
    return compiled(name, lambda build, _: build.ret(ir.IntType(32)(number)))


# Found again.


def test_code_is_made_once(folder: Path) -> None:
    assert not is_hit("a")
    assert is_hit("a")
    assert is_hit("a")
    assert only_file(folder).name.startswith("kernel-")


def test_another_process_finds_it_without_importing_numba(folder: Path) -> None:
    cached("kernel", ["a", b"b"], lambda: answer(42))
    code = """
import sys
from multiopt_kernels.cpu.object_cache import cached, linked
from tests.engines.machine_code import call
addresses = linked(cached("kernel", ["a", b"b"], None))
print(call(addresses["answer"]), {"numba", "torch", "jax"} & set(sys.modules))
"""
    assert run(code) == "42 set()"


def test_an_error_of_the_compiler_passes_and_leaves_nothing(folder: Path) -> None:
    def make() -> ObjectCode:
        raise ArithmeticError("no such rule")

    with pytest.raises(ArithmeticError):
        cached("kernel", ["a"], make)
    assert not list(folder.iterdir())


# Compiled again.


@pytest.mark.parametrize(
    "identity", [(), ("a",), ("b", "a"), ("a", "b", ""), ("", "a", "b"), ("ab",), ("a", "c")]
)
def test_each_part_of_the_identity_matters(folder: Path, identity: tuple[str, ...]) -> None:
    assert not is_hit("a", "b")
    assert not is_hit(*identity, code=OTHER)
    assert is_hit("a", "b")
    assert is_hit("a", b"b")


def package(name: str) -> tuple[Any, str, Any]:
    real = importlib.metadata.version
    return importlib.metadata, "version", lambda n: "0.1" if n == name else real(n)


def unknown() -> None:
    raise RuntimeError("host features are unknown")


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        pytest.param(*package("numba"), id="numba"),
        pytest.param(*package("llvmlite"), id="llvmlite"),
        pytest.param(*package("numpy"), id="numpy"),
        pytest.param(sys, "version", "3.99.0", id="Python"),
        pytest.param(sys, "platform", "plan9", id="system"),
        pytest.param(platform, "machine", lambda: "vax", id="machine"),
        pytest.param(llvm, "get_host_cpu_name", lambda: "i486", id="processor"),
        pytest.param(llvm, "get_host_cpu_features", llvm.FeatureMap, id="features"),
        pytest.param(llvm, "get_host_cpu_features", unknown, id="features unknown"),
        pytest.param(object_cache, "FORM", b"form 2", id="form"),
    ],
)
def test_each_tool_and_the_processor_matter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, value: Any
) -> None:
    assert not is_hit("a")
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, value)
        object_cache._surroundings.cache_clear()
        assert not is_hit("a", code=OTHER)
        assert is_hit("a", code=OTHER)
    object_cache._surroundings.cache_clear()
    assert is_hit("a")


def test_settings_of_numba_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_hit("a")
    monkeypatch.setenv("NUMBA_OPT", "1")
    assert not is_hit("a")
    monkeypatch.setenv("NUMBA_OPT", "2")
    assert not is_hit("a")


# Damaged and foreign files.


def test_no_damaged_byte_and_no_missing_end_gets_through(folder: Path) -> None:
    assert not is_hit("a")
    path = only_file(folder)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert object_cache._read(path) is None
        path.write_bytes(whole[:i])
        assert object_cache._read(path) is None
    assert not is_hit("a")
    assert path.read_bytes() == whole
    assert is_hit("a")


@pytest.mark.parametrize("form", [b"", b"{}", b"\x80\x04N.", b"\0" * 100, json.dumps({}).encode()])
def test_a_file_of_other_form_is_replaced(folder: Path, form: bytes) -> None:
    assert not is_hit("a")
    only_file(folder).write_bytes(form)
    assert not is_hit("a")
    assert is_hit("a")


def test_an_intact_file_under_a_wrong_name_is_replaced(folder: Path) -> None:
    assert not is_hit("a")
    path = only_file(folder)
    path.unlink()
    assert not is_hit("b", code=OTHER)
    only_file(folder).rename(path)
    assert not is_hit("a")
    assert is_hit("a")


def test_a_directory_in_place_of_a_file_is_no_error(folder: Path) -> None:
    assert not is_hit("a")
    path = only_file(folder)
    path.unlink()
    path.mkdir()
    assert not is_hit("a")
    assert only_file(folder) == path


# Whom to trust.


def test_only_the_user_has_access(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert not is_hit("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_replaced(folder: Path, mode: int) -> None:
    assert not is_hit("a")
    only_file(folder).chmod(mode)
    assert not is_hit("a")
    assert stat.S_IMODE(only_file(folder).stat().st_mode) == 0o600
    assert is_hit("a")


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777])
def test_a_directory_that_others_may_write_is_not_used(folder: Path, mode: int) -> None:
    assert not is_hit("a")
    folder.chmod(mode)
    assert not is_hit("a")
    assert not is_hit("b")
    assert only_file(folder)
    folder.chmod(0o755)
    assert is_hit("a")


def test_a_link_is_followed_to_what_is_judged(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(0o700)
    folder.symlink_to(tmp_path / "disk")
    assert not is_hit("a")
    assert is_hit("a")
    (tmp_path / "disk").chmod(0o777)
    assert not is_hit("a")


def test_what_belongs_to_another_user_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_hit("a")
    path = only_file(folder)
    assert object_cache._read(path)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert object_cache._read(path) is None
    assert not is_hit("a")
    assert not is_hit("b")
    assert only_file(folder) == path


# Nothing can be written.


def test_a_place_that_cannot_be_a_directory_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "under", "/dev/null/x", "~nobody-at-all"):
        monkeypatch.setenv("MULTIOPT_CACHE_DIR", str(place))
        assert not is_hit("a")
        assert not is_hit("a")


def test_no_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("MULTIOPT_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert not is_hit("a")


@pytest.mark.parametrize("name", ["mkdir", "open", "replace", "utime"])
def test_a_refusing_system_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name == "utime":
        assert not is_hit("a")

    def refuse(*args: Any, **keywords: Any) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(os, name, refuse)
        assert is_hit("a") == (name == "utime")
    assert name == "utime" or not list(folder.parent.rglob("*multiopt*"))


def test_a_full_disk_is_no_error_and_leaves_no_half_file(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        assert not is_hit("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.iterdir())


def test_an_interrupt_leaves_no_half_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        is_hit("a")
    assert not list(folder.iterdir())


# Where it lies.


def test_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    for name in ("MULTIOPT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as here:
        here.setattr(sys, "platform", "linux")
        assert object_cache._place() == home / ".cache" / "multiopt"
        here.setenv("XDG_CACHE_HOME", "relative")
        assert object_cache._place() == home / ".cache" / "multiopt"
        here.setenv("XDG_CACHE_HOME", "/xdg")
        assert object_cache._place() == Path("/xdg/multiopt")
        here.setattr(sys, "platform", "darwin")
        assert object_cache._place() == home / "Library" / "Caches" / "multiopt"
        here.setattr(sys, "platform", "win32")
        assert object_cache._place() == home / "AppData" / "Local" / "multiopt"
        here.setenv("LOCALAPPDATA", "/local")
        assert object_cache._place() == Path("/local/multiopt")
        here.setenv("MULTIOPT_CACHE_DIR", "/chosen")
        assert object_cache._place() == Path("/chosen")
        here.setenv("MULTIOPT_CACHE_DIR", "")
        assert object_cache._place() == Path("/local/multiopt")


# No growing pile.


def test_what_was_used_last_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_cache, "KEPT", 3)
    for i in range(3):
        assert not is_hit(str(i))
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    assert is_hit("1")
    for i in range(3, 5):
        assert not is_hit(str(i))
    assert len(list(folder.iterdir())) == 3
    assert is_hit("1")
    assert is_hit("3")
    assert is_hit("4")
    assert not is_hit("0")


def test_what_a_killed_writer_left_is_deleted_and_nothing_else(folder: Path) -> None:
    folder.mkdir(0o700)
    names = ["old.multiopt-unfinished", "young.multiopt-unfinished", "foreign.txt"]
    for name in names:
        (folder / name).touch()
        if not name.startswith("young"):
            os.utime(folder / name, (time.time() - 4000,) * 2)
    assert not is_hit("a")
    assert {path.name for path in folder.iterdir() if "kernel" not in path.name} == {*names[1:]}


def test_processes_that_write_and_delete_at_once(folder: Path) -> None:
    code = """
from multiopt_kernels.cpu import object_cache
from multiopt_kernels.cpu.object_cache import ObjectCode, cached
object_cache.KEPT = 3
for i in range(300):
    code = ObjectCode({"n": str(i % 7)}, (b"%d" % (i % 7) * 1000,))
    assert cached("kernel", [str(i % 7)], lambda: code) == code
"""
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, [code] * 3)) == [""] * 3
    left = list(folder.iterdir())
    assert 1 <= len(left) <= 3
    assert {path.suffix for path in left} == {".multiopt"}
    assert all(object_cache._read(path) for path in left)


# Loaded.


def test_linked_code_stays() -> None:
    first, second = answer(1, "first"), answer(2, "second")
    both = ObjectCode({"a": "first", "b": "second"}, first.objects + second.objects)
    addresses = linked(both)
    gc.collect()
    assert [call(addresses["a"]), call(addresses["b"])] == [1, 2]


def test_the_same_symbol_twice_is_two_functions() -> None:
    assert [call(linked(answer(n))["answer"]) for n in (1, 2)] == [1, 2]


def test_a_symbol_that_is_not_there_is_an_error() -> None:
    with pytest.raises(LookupError, match="no symbol 'missing' for 'run'"):
        linked(ObjectCode({"run": "missing"}, answer(1).objects))


def test_threads_make_and_link_at_once(folder: Path) -> None:
    def one(i: int) -> int:
        made = cached("kernel", [str(i % 5)], lambda: answer(i % 5))
        return call(linked(made)["answer"])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(100))) == [i % 5 for i in range(100)]
