"""What the drop-in has of the core beside Pyro's arguments, and how it tells of itself."""

import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import pyro.optim
import pytest
import torch

import multiopt as mo
import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import give, param

FACTORIES: dict[str, Any] = {
    "factory": lambda **more: optim.SGD({"lr": 1.0}, **more),
    "class": lambda **more: optim.PyroOptim(torch.optim.SGD, {"lr": 1.0}, **more),
    "clipped": lambda **more: optim.ClippedAdam({"lr": 1.0}, **more),
    "scheduler": lambda **more: optim.StepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "step_size": 1000}, **more
    ),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_gradients_that_are_not_finite_are_skipped_or_raised(kind: str) -> None:
    made = FACTORIES[kind]
    a, b = param("a"), param("b")
    raising = made(on_nonfinite="raise")
    with pytest.raises(ValueError, match="the gradient of 'a' has infinities or NaNs"):
        raising([give(a, np.inf, 0.0), give(b)])
    assert a.tolist() == b.tolist() == [0.0, 0.0]
    opt = made(on_nonfinite="skip", max_consecutive_skips=2)
    for _ in range(2):
        opt([give(a, np.nan, 0.0), give(b)])
    assert opt.last.skipped == ("a",)
    assert opt.last.updated == ("b",)
    assert opt.skips == {"a": mo.Skips(2, 2)}
    assert a.tolist() == [0.0, 0.0] != b.tolist()
    with pytest.raises(ValueError, match="more than 2 steps in a row"):
        opt([give(a, np.nan, 0.0), give(b)])


@pytest.mark.parametrize("kind", FACTORIES)
def test_averages_are_kept_saved_and_copied(kind: str, tmp_path: Path) -> None:
    names = []

    def average(name: str) -> mo.Average | None:
        names.append(name)
        return None if name == "net.none" else mo.Average()

    made = FACTORIES[kind]
    opt = made(average=average)
    a, none = param("net$$$a"), param("net$$$none")
    seen = []
    for _ in range(3):
        opt([give(a), give(none)])
        seen.append(a.detach().clone())
    assert sorted(names) == ["net.a", "net.none"]
    mean = torch.stack(seen).mean(0)
    np.testing.assert_allclose(opt.average("net$$$a"), mean, rtol=1e-6)
    for name in ("net$$$none", "other"):
        with pytest.raises(KeyError, match=f"no average of parameter {name!r}".replace("$", r"\$")):
            opt.average(name)
    if kind == "scheduler":
        # Pyro's format has no place for them.
        return
    opt.save(tmp_path / "opt")
    others = [made(average=mo.Average()), made(average=mo.Average())]
    for other in others:
        other.load(tmp_path / "opt")
    others[1].save(tmp_path / "again")
    others[1] = made(average=average)
    others[1].load(tmp_path / "again")
    seen.append(torch.empty(2))
    start = a.detach().clone()
    for other in others:
        with torch.no_grad():
            a.copy_(start)
        other([give(a)])
        seen[3] = a.detach().clone()
        np.testing.assert_allclose(other.average("net$$$a"), torch.stack(seen).mean(0), rtol=1e-6)
    with pytest.warns(UserWarning, match=r"left out averages .*'net\$\$\$a'"):
        made().load(tmp_path / "opt")
    core = mo.Optimizer(mo.SGD(), average=lambda name: mo.Average() if "none" not in name else None)
    if kind != "clipped":
        core.load(tmp_path / "opt")
        assert core.pending == ("net$$$a", "net$$$none")


def test_a_pickle_takes_averages_skips_and_settings_along() -> None:
    opt = optim.SGD(
        {"lr": 1.0}, on_nonfinite="skip", max_consecutive_skips=1, average=mo.Average(decay=0.5)
    )
    loc = param("loc")
    opt([give(loc)])
    opt([give(loc, np.nan, 0.0)])
    again = pickle.loads(pickle.dumps(opt))
    with pytest.raises(ValueError, match="more than 1 steps in a row"):
        again([give(loc, np.nan, 0.0)])
    again([give(loc)])
    assert again.skips == {"loc": mo.Skips(1, 0)}
    # Of -1 and -2, the second twice as heavy.
    np.testing.assert_allclose(again.average("loc"), -5 / 3, rtol=1e-6)


def test_a_global_norm_is_of_all_tensors_of_a_call() -> None:
    a, b = param("a", size=1), param("b", size=1)
    opt = optim.SGD({"lr": 1.0}, {"clip_global_norm": 1.0})
    opt([give(a, 3.0), give(b, -4.0)])
    np.testing.assert_allclose([a.item(), b.item()], [-0.6, 0.8], rtol=1e-5)
    assert a.grad is not None
    np.testing.assert_allclose(a.grad.item(), 0.6, rtol=1e-5)
    assert list(opt.last.global_norms.values()) == [5.0]
    opt.pt_clip_args["clip_global_norm"] = 0.5
    opt([give(a, 3.0), give(b, -4.0)])
    np.testing.assert_allclose([a.item(), b.item()], [-0.9, 1.2], rtol=1e-5)
    norms = {"a": 1.0, "b": 1.0}
    by_name = optim.SGD({"lr": 1.0}, lambda name: {"clip_global_norm": norms[name]})
    by_name([give(a, 3.0), give(b, -4.0)])
    np.testing.assert_allclose([a.item(), b.item()], [-1.5, 2.0], rtol=1e-5)


def test_what_pyro_steps_has_none_of_it() -> None:
    more: dict[str, Any] = {"on_nonfinite": "skip", "average": mo.Average()}
    for name, value in more.items():
        with pytest.raises(TypeError, match=f"no rule for SparseAdam.*expected no {name}"):
            optim.SparseAdam({"lr": 1.0}, **{name: value})


def test_wrong_values_are_refused_as_by_the_core() -> None:
    with pytest.raises(ValueError, match="on_nonfinite must be"):
        optim.SGD({"lr": 1.0}, on_nonfinite="ignore")
    with pytest.raises(TypeError, match="average must be an Average"):
        optim.SGD({"lr": 1.0}, average=3)
    with pytest.raises(TypeError, match=r"clip_args has .*'global_norm'.*clip_global_norm"):
        optim.SGD({"lr": 1.0}, {"global_norm": 1.0})


def test_it_says_how_it_was_made() -> None:
    opt = optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}, on_nonfinite="skip")
    words = "<Adam({'lr': 0.1}, {'clip_norm': 1.0}, on_nonfinite='skip'): "
    assert repr(opt) == f"{words}0 tensors>"
    opt([give(param("a"))])
    opt.set_state({"b": opt.get_state()["a"]})
    assert repr(opt) == f"{words}1 tensors, 1 pending>"
    assert repr(FACTORIES["scheduler"]()) == "<StepLR over SGD({'lr': 1.0}): 0 tensors>"


# Horovod


def test_horovods_wrapper_says_once_that_torch_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    horovod, hvd = ModuleType("horovod"), ModuleType("horovod.torch")
    hvd.DistributedOptimizer = lambda optimizer, **_: optimizer  # type: ignore[attr-defined]
    horovod.torch = hvd  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "horovod", horovod)
    monkeypatch.setitem(sys.modules, "horovod.torch", hvd)
    assert optim.HorovodOptimizer is pyro.optim.HorovodOptimizer
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            wrapped = optim.HorovodOptimizer(optim.SGD({"lr": 0.5}))
            wrapped([give(param("a")), give(param("b"))])
    assert [str(one.message).partition(":")[0] for one in said] == [
        "HorovodOptimizer makes an optimizer of torch's SGD for each parameter"
    ]
    assert param("a").tolist() == [-1.0, -1.0]
    assert isinstance(wrapped.optim_objs[param("a")], torch.optim.SGD)
