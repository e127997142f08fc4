"""Checkpoints of several ranks: the same bits on any number of ranks, and always whole."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import multiopt as mo
import multiopt.adapters.torch as optim
from multiopt.cli import main
from multiopt.distributed import load_sharded, save_sharded
from multiopt.errors import CheckpointError
from tests.ranks.processes import on_ranks

#: How the parameters of different kinds lie on a mesh of one or two dimensions.
PLACEMENTS: dict[str, tuple[Any, ...]] = {
    "rows": (Shard(0),),
    "columns": (Shard(1),),
    "replicated": (Replicate(),),
}


def _whole(name: str) -> torch.Tensor:
    shape = {"rows": (7, 3), "columns": (2, 5), "replicated": (4,), "plain": (3, 2), "few": (1, 2)}
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape[name], generator=generator, dtype=torch.float64)


def _made(**settings: Any) -> Any:
    """Parameters that lie in different ways on the ranks, and an optimizer of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = {"plain": torch.nn.Parameter(_whole("plain"))}
    for name, placements in {**PLACEMENTS, "few": (Shard(0),)}.items():
        params[name] = torch.nn.Parameter(distribute_tensor(_whole(name), mesh, placements))
    return params, optim.Adam(params.items(), lr=0.1, **settings)


def _step(params: dict[str, Any], optimizer: Any, steps: Sequence[int]) -> None:
    for step in steps:
        for name, param in params.items():
            grad = _whole(name) * (step + 1)
            if hasattr(param, "placements"):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def _digest(params: dict[str, Any], optimizer: Any) -> Any:
    def whole(tensor: Any) -> Any:
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.detach().reshape(-1).tolist()

    return {
        name: [whole(x) for x in (param, *dict(optimizer.state[param]).values())]
        for name, param in params.items()
    }


def _run(jobs: list[tuple[str | None, list[int], str | None]]) -> Any:
    for source, steps, target in jobs:
        params, optimizer = _made()
        if source is not None:
            for param in params.values():
                with torch.no_grad():
                    param.zero_()
            report = load_sharded(source, optimizer)
            assert report.metadata == {"epoch": 3}
            assert optimizer.param_groups[0]["lr"] == 0.2
        optimizer.param_groups[0]["lr"] = 0.2
        _step(params, optimizer, steps)
        if target is not None:
            save_sharded(target, optimizer, metadata={"epoch": 3})
    return _digest(params, optimizer)


def test_any_number_of_ranks_loads_what_others_saved(tmp_path: Path) -> None:
    files = [str(tmp_path / str(number)) for number in range(3)]
    (expected,) = on_ranks(1, _run, [(None, list(range(6)), None)])
    on_ranks(2, _run, [(None, [0, 1], files[0])])
    on_ranks(1, _run, [(files[0], [2], files[1])])
    on_ranks(4, _run, [(files[1], [3], files[2])])
    assert on_ranks(2, _run, [(files[2], [4, 5], None)]) == [expected] * 2


def test_show_prints_all_ranks_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    on_ranks(2, _run, [(None, [0, 1], str(tmp_path / "run"))])
    assert main(["show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "2 files" in shown
    assert '{"epoch": 3}' in shown
    for shape in ("(7, 3)", "(2, 5)", "(4,)", "(3, 2)", "(1, 2)"):
        assert shape in shown
    # What several ranks have is in one file.
    first, second = [path.read_bytes() for path in sorted((tmp_path / "run").glob("*-*"))]
    assert b"plain" in first
    assert b"replicated" in first
    assert b"plain" not in second
    assert b"replicated" not in second


def _plain(directory: str) -> Any:
    """Arrays of NumPy: the same on all ranks, and one of each rank's own under one name."""
    rank = dist.get_rank()
    opt, params = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.5)), {"w": np.ones(3), "own": np.ones(2)}
    grads = {"w": np.arange(3.0), "own": np.full(2, rank + 1.0)}
    opt.step(params, grads)
    choose: Any = {"local": "own".__eq__}
    save_sharded(directory, opt, params, **choose)
    other, fresh = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.5)), {n: 0 * x for n, x in params.items()}
    load_sharded(directory, other, fresh, **choose)
    for optimizer, arrays in ((opt, params), (other, fresh)):
        optimizer.step(arrays, grads)
    return {name: x.tolist() for name, x in fresh.items()}, {
        n: x.tolist() for n, x in params.items()
    }


def test_names_of_a_rank_of_its_own_come_back_to_it(tmp_path: Path) -> None:
    results = on_ranks(2, _plain, str(tmp_path))
    assert [loaded == kept for loaded, kept in results] == [True, True]
    assert results[0][0]["own"] != results[1][0]["own"]


def _fail(directory: str, what: str) -> Any:
    params, optimizer = _made()
    _step(params, optimizer, [0])
    save_sharded(directory, optimizer)
    _step(params, optimizer, [1])
    before = _digest(params, optimizer)
    dist.barrier()
    if what == "save" and dist.get_rank() == 1:
        params["plain"] = "nothing"
    if what == "load" and dist.get_rank() == 1:
        params["plain"] = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    try:
        (save_sharded if what == "save" else load_sharded)(directory, optimizer, params)
    except Exception as error:
        params, text = optimizer._named_params(), f"{type(error).__name__}: {error}"
        assert _digest(params, optimizer) == before
        return text
    return "nothing was raised"


@pytest.mark.parametrize("what", ["save", "load"])
def test_if_one_rank_fails_all_do_and_nothing_has_changed(tmp_path: Path, what: str) -> None:
    first, second = on_ranks(2, _fail, str(tmp_path), what)
    assert f"RuntimeError: rank 1 could not {what}" in first
    assert "plain" in second
    assert len(list(tmp_path.iterdir())) == 3


def _killed(directory: str, killed: int, event: str, name: str) -> None:
    """Save after two steps; a rank is killed at some event of a file whose name ends like this."""
    params, optimizer = _made()
    _step(params, optimizer, [0, 1])

    def watch(what: str, arguments: tuple[Any, ...]) -> None:
        if what == event and str(arguments[what == "os.rename"]).endswith(name):
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == killed:
        sys.addaudithook(watch)
    save_sharded(directory, optimizer)


def _load_only(directory: str) -> Any:
    params, optimizer = _made()
    load_sharded(directory, optimizer)
    return _digest(params, optimizer)["plain"][1]


@pytest.mark.parametrize(
    ("killed", "event", "name", "clock"),
    [
        (1, "os.rename", ".safetensors", 1.0),
        (0, "os.rename", "index.json", 1.0),
        (0, "os.remove", ".safetensors", 2.0),
    ],
)
def test_a_rank_that_is_killed_leaves_the_old_or_the_new(
    tmp_path: Path, killed: int, event: str, name: str, clock: float
) -> None:
    on_ranks(2, _save_steps, str(tmp_path), 1)
    with pytest.raises(AssertionError, match="exit code -9"):
        on_ranks(2, _killed, str(tmp_path), killed, event, name)
    assert on_ranks(1, _load_only, str(tmp_path)) == [[clock]]
    # What killed ranks left behind goes with the next save.
    on_ranks(1, _save_steps, str(tmp_path), 1)
    assert len(list(tmp_path.iterdir())) == 2


def _save_steps(directory: str, steps: int) -> None:
    params, optimizer = _made()
    _step(params, optimizer, list(range(steps)))
    save_sharded(directory, optimizer)


def _load_error(directory: str) -> str:
    _, optimizer = _made()
    try:
        load_sharded(directory, optimizer)
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def test_damage_is_found(tmp_path: Path) -> None:
    on_ranks(1, _save_steps, str(tmp_path), 1)
    index = tmp_path / "index.json"
    (path,) = tmp_path.glob("*.safetensors")
    whole, listed = path.read_bytes(), index.read_text()
    for broken, text, expected in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), listed, "is damaged: it has"),
        (whole[:-8], listed, "is damaged: it has"),
        (None, listed, "is missing"),
        (whole, listed.replace("plain", "plane"), "its checksum differs"),
        (whole, "{}", "is not the index of a multiopt checkpoint"),
        (whole, "[" * 100_000, "is not the index of a multiopt checkpoint"),
    ):
        path.unlink(missing_ok=True)
        if broken is not None:
            path.write_bytes(broken)
        index.write_text(text)
        (found,) = on_ranks(1, _load_error, str(tmp_path))
        assert expected in found


def test_whole_parameters_are_loaded_without_ranks(tmp_path: Path) -> None:
    """State and parameters of shards, in one process that knows nothing of ranks."""
    on_ranks(2, _run, [(None, [0, 1], str(tmp_path))])
    params = {name: np.zeros(_whole(name).shape) for name in ("plain", *PLACEMENTS, "few")}
    opt = mo.Optimizer(mo.Adam(lr=0.2))
    load_sharded(tmp_path, opt, params)
    grads = {name: _whole(name).numpy() * 3 for name in params}
    opt.step(params, grads)
    (expected,) = on_ranks(1, _run, [(None, [0, 1, 2], None)])
    assert {name: [x.reshape(-1).tolist()] for name, x in params.items()} == {
        name: values[:1] for name, values in expected.items()
    }
