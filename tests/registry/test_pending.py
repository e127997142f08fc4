"""Loaded state that waits for its parameter can be read as it will be."""

from pathlib import Path

import numpy as np
import pytest
import torch

import multiopt as mo
from tests.libraries import Library, assert_equal


def trained(library: Library) -> mo.Optimizer:
    opt = mo.Optimizer(mo.Adam(lr=mo.schedules.Linear(0.1, 0.2, steps=9)), average=mo.Average())
    params = {"w": library.param(np.array([1.0, -2.0], "float32"))}
    for step in range(3):
        params = opt.step(params, {"w": library.grad(np.array([0.5, step], "float32"))})
    return opt


def waiting(opt: mo.Optimizer, how: str, folder: Path) -> mo.Optimizer:
    other = mo.Optimizer(opt.rule, average=opt._registry.average)
    if how == "file":
        opt.save(folder / "file.safetensors")
        other.load(folder / "file.safetensors")
    else:
        other.load_state_dict(opt.state_dict())
    assert other.pending == ("w",)
    return other


@pytest.mark.parametrize("how", ["file", "state_dict"])
def test_what_waits_reads_as_what_was_saved(how: str, library: Library, tmp_path: Path) -> None:
    opt = trained(library)
    other = waiting(opt, how, tmp_path)
    assert other.state("w").step == 3
    assert other.hyperparameters("w") == opt.hyperparameters("w")
    array = np.asarray if how == "file" else library.numpy
    assert_equal(array(other.average("w")), library.numpy(opt.average("w")))
    slots = opt.state("w").slots
    assert other.state("w").slots.keys() == slots.keys()
    for name, slot in slots.items():
        assert_equal(array(other.state("w").slots[name]), library.numpy(slot))


def test_what_is_read_is_a_copy() -> None:
    opt = mo.Optimizer(mo.SGD(momentum=0.9), average=mo.Average())
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    other = mo.Optimizer(mo.SGD(momentum=0.9), average=mo.Average())
    other.load_state_dict(opt.state_dict())
    other.state("w").slots["momentum_buffer"][...] = 7.0
    other.average("w")[...] = 7.0
    params = {"w": np.zeros(2)}
    other.step(params, {"w": np.zeros(2)})
    assert (other.state("w").slots["momentum_buffer"] != 6.3).all()
    assert (other.average("w") < 1.0).all()


def test_complex_state_reads_as_complex() -> None:
    opt, grad = mo.Optimizer(mo.Adam()), torch.tensor([1.0 + 2.0j])
    opt.step({"w": torch.zeros(1, dtype=torch.complex64)}, {"w": grad})
    other = mo.Optimizer(mo.Adam())
    other.load_state_dict(opt.state_dict())
    assert_equal(other.state("w").slots["exp_avg"], opt.state("w").slots["exp_avg"])


def test_the_rule_is_the_one_it_would_start_with() -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.5))
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    other = mo.Optimizer(lambda name: mo.SGD(lr={"w": 0.25}[name]))
    other.load_state_dict(opt.state_dict())
    assert other.hyperparameters("w")["lr"] == 0.25
    other.rename({"w": "v"})
    with pytest.raises(KeyError, match="v"):
        other.hyperparameters("v")


@pytest.mark.parametrize("ask", ["state", "average", "hyperparameters"])
def test_a_name_of_nothing_is_refused(ask: str) -> None:
    opt = mo.Optimizer(mo.SGD())
    with pytest.raises(KeyError, match="parameter 'w'"):
        getattr(opt, ask)("w")


def test_without_an_average_there_is_none() -> None:
    opt = mo.Optimizer(mo.SGD())
    opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    other = mo.Optimizer(mo.SGD())
    other.load_state_dict(opt.state_dict())
    with pytest.raises(KeyError, match="no average of parameter 'w': none is kept"):
        other.average("w")
