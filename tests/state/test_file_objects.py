"""``save`` to and ``load`` from files that the caller has opened."""

import codecs
import errno
import gzip
import io
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import multiopt as mo
import multiopt.adapters.pyro as optim
from multiopt.adapters.torch_optim import read
from tests.hosts.pyro.tensors import PYRO, give, param, steps_of
from tests.libraries import assert_equal


def stepped(size: int = 3, names: int = 2) -> mo.Optimizer:
    opt = mo.Optimizer(mo.Adam(), average=mo.Average())
    params = {f"w{i}": np.ones(size) for i in range(names)}
    params |= {"z": np.ones(2, np.complex64), "empty": np.ones((0, 2)), "0-d": np.ones(())}
    opt.step(params, {name: 1.5 * np.ones_like(w) for name, w in params.items()})
    return opt


def in_a_file(opt: mo.Optimizer, folder: Path) -> bytes:
    opt.save(folder / "run", metadata={"epoch": 1})
    return (folder / "run").read_bytes()


class Writer:
    """What some clouds have: no more than ``write``, which says nothing and keeps what it gets."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.pieces.append(data)


class Reader:
    """No more than ``read``, which gives less than it is asked for."""

    def __init__(self, data: bytes) -> None:
        self.inner = io.BytesIO(data)

    def read(self, size: int) -> bytes:
        return self.inner.read(min(size, 1000))


class Slow(io.RawIOBase):
    """A raw file that takes a few bytes at a time, as pipes and sockets may."""

    def __init__(self, most: int | None = None) -> None:
        self.taken, self.most = bytearray(), most

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int | None:
        if self.most is not None and len(self.taken) >= self.most:
            return None
        self.taken += bytes(data[:777])
        return len(bytes(data[:777]))


# Save


@pytest.mark.parametrize("size", [3, 300_000])
def test_a_file_object_gets_the_bytes_that_a_file_has(tmp_path: Path, size: int) -> None:
    opt = stepped(size)
    expected = in_a_file(opt, tmp_path)
    writer, slow, buffer = Writer(), Slow(), io.BytesIO()
    for file in (writer, slow, buffer):
        opt.save(file, metadata={"epoch": 1})
    # What is kept is not the memory of the slots.
    opt.step({"w0": np.ones(size)}, {"w0": np.ones(size)})
    assert b"".join(writer.pieces) == bytes(slow.taken) == buffer.getvalue() == expected
    assert max(map(len, writer.pieces)) <= 2**21
    assert all(type(piece) is bytes for piece in writer.pieces)


def test_small_slots_are_handed_over_together() -> None:
    writer = Writer()
    stepped(names=500).save(writer)
    assert len(writer.pieces) <= 3


def test_bytes_go_where_the_file_object_is(tmp_path: Path) -> None:
    opt = stepped()
    expected = in_a_file(opt, tmp_path)
    with (tmp_path / "more").open("wb") as file:
        file.write(b"before")
        opt.save(file, metadata={"epoch": 1})
        assert not file.closed
        file.write(b"after")
    assert (tmp_path / "more").read_bytes() == b"before" + expected + b"after"


def test_a_file_object_that_takes_nothing_now_is_an_os_error() -> None:
    with pytest.raises(BlockingIOError, match="cannot take bytes now") as caught:
        stepped().save(Slow(most=1500))
    assert caught.value.errno == errno.EAGAIN


def test_what_a_file_object_raises_comes_out() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if data:
                raise OSError(errno.ENOSPC, "no space left")
            return 0

    with pytest.raises(OSError, match="no space left"):
        stepped().save(Full())
    with pytest.raises(ValueError, match="closed file"):
        stepped().save(closed(io.BytesIO()))


def closed(file: Any) -> Any:
    file.close()
    return file


def test_nothing_is_handed_over_of_what_cannot_be_saved() -> None:
    file = io.BytesIO()
    with pytest.raises(ValueError, match=r"metadata\['a'\] is a set"):
        stepped().save(file, metadata={"a": {1}})
    assert file.getvalue() == b""


# Load


def gzipped(data: bytes) -> Any:
    return gzip.open(io.BytesIO(gzip.compress(data)))


def piped(data: bytes) -> Any:
    out, into = os.pipe()

    def fill() -> None:
        with os.fdopen(into, "wb") as file:
            file.write(data)

    threading.Thread(target=fill).start()
    return os.fdopen(out, "rb", buffering=0)


@pytest.mark.parametrize("size", [3, 300_000])
@pytest.mark.parametrize("opened", [io.BytesIO, gzipped, piped, Reader])
def test_a_file_object_is_loaded_as_a_file_is(
    tmp_path: Path, opened: Callable[[bytes], Any], size: int
) -> None:
    opt = stepped(size)
    data = in_a_file(opt, tmp_path)
    again = mo.Optimizer(mo.Adam(), average=mo.Average())
    file = opened(data)
    report = again.load(file)
    assert (report.pending, report.metadata) == (opt.names, {"epoch": 1})
    assert file.read(1) == b""
    if hasattr(file, "close"):
        assert not file.closed
        file.close()
    state = again.state_dict()
    for name in opt:
        for slot, array in opt.state(name).slots.items():
            assert_equal(state["pending"][name]["slots"][slot], array)
        average = state["pending_averages"][name]["slots"]["average"]
        assert_equal(average, np.asarray(opt.average(name)))


def test_a_pipe_takes_a_save(tmp_path: Path) -> None:
    opt = stepped(300_000)
    expected = in_a_file(opt, tmp_path)
    out, into = os.pipe()
    taken: list[bytes] = []

    def take() -> None:
        with os.fdopen(out, "rb") as file:
            taken.append(file.read())

    reader = threading.Thread(target=take)
    reader.start()
    with os.fdopen(into, "wb", buffering=0) as file:
        opt.save(file, metadata={"epoch": 1})
    reader.join()
    assert taken == [expected]


def test_a_gzip_file_takes_a_save(tmp_path: Path) -> None:
    opt = stepped()
    with gzip.open(tmp_path / "run.gz", "wb") as file:
        opt.save(file)
    with gzip.open(tmp_path / "run.gz", "rb") as file:
        assert mo.Optimizer(mo.Adam(), average=mo.Average()).load(file).pending == opt.names


def test_it_is_read_from_where_it_is_to_its_end(tmp_path: Path) -> None:
    data = in_a_file(stepped(), tmp_path)
    file = io.BytesIO(b"before" + data)
    with pytest.raises(mo.CheckpointError, match="a multiopt checkpoint; it is damaged or another"):
        mo.Optimizer(mo.Adam()).load(file)
    file.seek(6)
    opt = mo.Optimizer(mo.Adam(), average=mo.Average())
    assert "w0" in opt.load(file, names=["w0"]).pending
    assert file.tell() == len(data) + 6
    with pytest.raises(mo.CheckpointError, match="file not fully covered"):
        opt.load(io.BytesIO(data + b"after"))


def test_a_damaged_file_object_is_refused_by_name_and_by_what_it_is_called(tmp_path: Path) -> None:
    data = bytearray(in_a_file(stepped(), tmp_path))
    data[-1] ^= 1
    opt = mo.Optimizer(mo.Adam(), average=mo.Average())
    with pytest.raises(mo.CheckpointError, match=r"<_io.BytesIO object at .*>: the state of '.*'"):
        opt.load(io.BytesIO(data))
    assert opt.pending == ()
    (tmp_path / "run").write_bytes(data)
    with (tmp_path / "run").open("rb") as file:
        with pytest.raises(mo.CheckpointError, match=r"run: the state of '.*' is damaged"):
            opt.load(file)
        file.seek(0)
        assert len(opt.load(file, strict=False).unused) == 1
    for size in (0, 3, 100, len(data) - 1):
        with pytest.raises(mo.CheckpointError):
            opt.load(io.BytesIO(data[:size]))
    with pytest.raises(mo.CheckpointError, match=r"BytesIO .*: the loaded state .*\(of Adam\)"):
        mo.Optimizer(mo.SGD(momentum=0.5)).load(io.BytesIO(in_a_file(stepped(), tmp_path)))


def test_a_hostile_file_object_is_refused(tmp_path: Path) -> None:
    header = b"[" + b"[]," * 300_000 + b"0]"
    for length in (len(header), 10**8 + 1, 2**63):
        with pytest.raises(mo.CheckpointError, match=r"lists and commas|too short for a header"):
            mo.Optimizer(mo.Adam()).load(io.BytesIO(length.to_bytes(8, "little") + header))


def test_a_file_of_torch_says_what_reads_it() -> None:
    file = io.BytesIO()
    torch.save({"a": 1}, file)
    file.seek(0)
    with pytest.raises(mo.CheckpointError, match=r"use multiopt\.adapters\.torch_optim\.read"):
        mo.Optimizer(mo.Adam()).load(file)


def test_a_load_leaves_no_copy_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = in_a_file(stepped(), tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    mo.Optimizer(mo.Adam(), average=mo.Average()).load(io.BytesIO(data))
    with pytest.raises(mo.CheckpointError):
        mo.Optimizer(mo.Adam()).load(io.BytesIO(data[:-1]))
    assert list((tmp_path / "temporary").iterdir()) == []


# What is no binary file object


@pytest.mark.parametrize(
    "text",
    [
        lambda path: io.StringIO(),
        lambda path: path.open("r+", encoding="utf-8"),
        lambda path: tempfile.NamedTemporaryFile("w+", dir=path.parent),  # noqa: SIM115
        lambda path: codecs.open(str(path), "r+", encoding="utf-8"),  # noqa: SIM115
    ],
    ids=["StringIO", "open", "tempfile", "codecs"],
)
def test_a_file_object_of_text_is_refused(tmp_path: Path, text: Callable[[Path], Any]) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(256)))
    for act, mode in ((stepped().save, "wb"), (mo.Optimizer(mo.Adam()).load, "rb")):
        with (
            text(path) as file,
            pytest.raises(TypeError, match=rf"is not a binary file object: .* mode '{mode}'"),
        ):
            act(file)
    assert path.read_bytes() == bytes(range(256))


@pytest.mark.parametrize("odd", [None, 3, b"", object(), ["run"]], ids=repr)
def test_what_is_neither_a_path_nor_a_file_object_is_refused(odd: Any) -> None:
    if odd == b"":
        odd = bytearray(b"run")
    with pytest.raises(TypeError, match=r"a binary file object, which has write\(\); got"):
        stepped().save(odd)
    with pytest.raises(TypeError, match=r"a binary file object, which has read\(\); got"):
        mo.Optimizer(mo.Adam()).load(odd)


def test_a_file_object_of_the_other_direction_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with (tmp_path / "run").open("rb") as file, pytest.raises(OSError, match="write"):
        stepped().save(file)
    with (tmp_path / "run").open("wb") as file, pytest.raises(OSError, match="read"):
        mo.Optimizer(mo.Adam()).load(file)


class Both(os.PathLike[str]):
    """A path that can be written to by itself, as ``py.path.local`` can."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def write(self, data: bytes) -> None:
        raise AssertionError("it is a path")


def test_what_is_a_path_is_replaced_whole(tmp_path: Path) -> None:
    stepped().save(Both(tmp_path / "run"))
    assert mo.Optimizer(mo.Adam(), average=mo.Average()).load(Both(tmp_path / "run")).pending


# torch and Pyro


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_object_of_torch_is_read(zipped: bool) -> None:
    file = io.BytesIO()
    file.write(b"before")
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
    data = file.getvalue()[6:]
    for source in (io.BytesIO(data), gzipped(data), piped(data)):
        assert read(source)["a"].tolist() == [1.0, 1.0]
        source.close()
    file.seek(6)
    assert read(file)["a"].tolist() == [1.0, 1.0]


def test_what_cannot_be_read_of_torch_is_said() -> None:
    file = io.BytesIO()
    stepped().save(file)
    file.seek(0)
    with pytest.raises(
        mo.CheckpointError, match=r"BytesIO .*got a file of safetensors: if multiopt"
    ):
        read(file)
    with pytest.raises(mo.CheckpointError, match=r"BytesIO .*it is damaged, or of another kind"):
        read(io.BytesIO(b"nothing of torch"))
    with pytest.raises(TypeError, match="mode 'rb'"):
        read(io.StringIO("text"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a binary file object, which has read\(\); got 3"):
        read(3)  # type: ignore[arg-type]


def test_the_drop_in_saves_to_a_file_object_and_loads_from_one() -> None:
    pyro.clear_param_store()
    opt, loc, file = optim.Adam({"lr": 0.1}), param("loc"), io.BytesIO()
    opt({give(loc)})
    file.write(b"before")
    opt.save(file)
    for source in (file, io.BytesIO(b"before" + pickle.dumps(0))):
        source.seek(6)
        other = optim.Adam({"lr": 0.1})
        if source is file:
            other.load(source)
            assert steps_of(other, "loc") == 1
        else:
            with pytest.raises(mo.CheckpointError, match="BytesIO"):
                other.load(source)
    theirs = PYRO.Adam({"lr": 0.1})
    theirs([give(loc)])
    file = io.BytesIO()
    torch.save(theirs.get_state(), file)
    file.seek(0)
    other = optim.Adam({"lr": 0.1})
    other.load(file)
    assert steps_of(other, "loc") == 1
