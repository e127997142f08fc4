"""Pyro's four faults of state do not remain; copies; names that change."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.optim
import pytest
import torch

import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import BOTH, PYRO, give, leaf, param, steps_of


def test_state_set_after_a_step_is_taken_at_once() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt({give(loc)})
    saved = opt.get_state()
    for _ in range(2):
        opt({give(loc)})
    assert steps_of(opt, "loc") == 3
    opt.set_state(saved)
    assert steps_of(opt, "loc") == 1
    opt({give(loc)})
    assert steps_of(opt, "loc") == 2


def test_loaded_state_is_taken_once_and_never_again() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt({give(loc)})
    opt.set_state(opt.get_state())
    opt({give(loc)})
    pyro.clear_param_store()
    fresh = param("loc")
    opt({give(fresh)})
    assert steps_of(opt, "loc") == 1


def test_a_tensor_that_leaves_the_store_leaves_nothing_behind() -> None:
    opt = optim.Adam({"lr": 0.1})
    for _ in range(40):
        pyro.clear_param_store()
        loc = param("loc", size=100)
        opt({give(loc, *[1.0] * 100)})
        del loc
        gc.collect()
        assert len(opt._core) == 1
    assert list(opt.get_state()) == ["loc"]
    assert len(opt.optim_objs) == 1
    group, _ = opt._registry.row_of(next(iter(opt._core)))
    assert len(group) == 1
    assert len(group.shapes) == 2
    assert len(group._chunks) <= 2


def test_replacing_a_tensor_in_the_store_starts_over_under_its_name() -> None:
    opt, store = optim.Adam({"lr": 0.1}), pyro.get_param_store()
    for _ in range(3):
        opt({give(param("loc"))})
    store["loc"] = torch.ones(2)
    opt({give(leaf(store["loc"]))})
    state = opt.get_state()
    assert list(state) == ["loc"]
    assert steps_of(opt, "loc") == 1


def test_state_that_waits_survives_getting_and_saving(tmp_path: Path) -> None:
    opt = optim.Adam({"lr": 0.1})
    opt({give(param("a")), give(param("b"))})
    other = optim.Adam({"lr": 0.5})
    other.set_state(opt.get_state())
    other({give(param("a"))})
    assert [steps_of(other, name) for name in "ab"] == [2, 1]
    other.save(tmp_path / "opt")
    third = optim.Adam({"lr": 0.5})
    third.load(tmp_path / "opt")
    assert [steps_of(third, name) for name in "ab"] == [2, 1]


def test_two_stores_keep_an_entry_each() -> None:
    opt, store = optim.Adam({"lr": 0.1}), pyro.get_param_store()
    scopes: list[Any] = [None, None]
    for count in (1, 2, 3):
        for i in range(2):
            with store.scope(scopes[i]) as scopes[i]:
                for _ in range(1 + i):
                    opt({give(param("loc"))})
                assert steps_of(opt, "loc") == (1 + i) * count


def test_state_is_set_name_by_name() -> None:
    opt = optim.Adam({"lr": 0.1})
    opt({give(param("a")), give(param("b"))})
    state = opt.get_state()
    other = optim.Adam({"lr": 0.1})
    other.set_state({"a": state["a"]})
    other.set_state({"b": state["b"]})
    assert list(other.get_state()) == ["a", "b"]


def test_state_that_waits_shares_no_memory() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt({give(loc)})
    state = opt.get_state()
    other = optim.Adam({"lr": 0.1})
    other.set_state(state)
    state["loc"]["state"][0]["exp_avg"].fill_(9.0)
    for _ in range(2):
        waiting = other.get_state()["loc"]["state"][0]["exp_avg"]
        np.testing.assert_allclose(waiting, 0.1, rtol=1e-6)
        waiting.fill_(9.0)


def test_loaded_state_of_a_parameter_never_stepped_starts_it_over() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt({loc})
    unstepped = opt.get_state()
    opt({give(loc)})
    opt.set_state(unstepped)
    opt({give(loc)})
    assert steps_of(opt, "loc") == 1


@BOTH
def test_state_saved_before_the_first_gradient(module: Any) -> None:
    opt, loc = module.Adam({"lr": 0.25}), param("loc")
    opt({loc})
    assert loc.grad is None
    state = opt.get_state()
    assert state["loc"]["state"] == {}
    other = optim.Adam({"lr": 123.0})
    other.set_state(state)
    other({give(loc)})
    np.testing.assert_allclose(loc.detach(), -0.25, rtol=1e-6)


# Copies


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_by_name(copy_of: Callable[[Any], Any]) -> None:
    opt, loc = optim.Adam({"lr": 0.5}, {"clip_norm": 1.0}), param("loc")
    fresh = copy_of(opt)
    opt({give(loc)})
    other = copy_of(opt)
    for one in (fresh, other):
        assert isinstance(one, PYRO.PyroOptim)
        one({give(loc), give(param("late"))})
    assert [steps_of(one, "loc") for one in (opt, fresh, other)] == [1, 1, 2]
    assert other.pt_clip_args == {"clip_norm": 1.0}


def test_an_optimizer_that_goes_is_freed_at_once() -> None:
    opt, loc = optim.Adam({"lr": 0.5}), param("loc")
    opt({give(loc)})
    group = weakref.ref(opt._registry.row_of("loc")[0])
    gc.disable()
    try:
        del opt
        assert group() is None
    finally:
        gc.enable()


# Names that change, and two tensors of one name


def test_loaded_state_is_found_under_the_name_of_today() -> None:
    opt, weight = optim.Adam({"lr": 0.1}), torch.nn.Linear(1, 1, bias=False)
    pyro.module("m", weight)
    weight.weight.grad = torch.ones(1, 1)
    opt({weight.weight})
    pyro.clear_param_store()
    pyro.module("n", weight)
    opt.set_state(opt.get_state())
    for _ in range(2):
        opt({weight.weight})
    assert steps_of(opt, "n$$$weight") == 3


def test_of_two_tensors_of_a_name_the_one_in_the_store_takes_the_state() -> None:
    opt, store = optim.Adam({"lr": 0.1}), pyro.get_param_store()
    old = param("loc")
    for _ in range(3):
        opt({give(old)})
    state = opt.get_state()
    store["loc"] = torch.ones(2)
    new = leaf(store["loc"])
    for order in ([old, new], [new, old]):
        opt.set_state(state)
        opt([give(tensor) for tensor in order])
        assert steps_of(opt, "loc") == 4


@BOTH
def test_a_non_leaf_is_an_error(module: Any) -> None:
    w = torch.ones(2, requires_grad=True)
    loc = w * 2
    (loc**2).sum().backward()
    with pytest.raises(ValueError, match=r"non-leaf|not a leaf"):
        module.SGD({"lr": 1.0})([loc])


def test_state_under_similar_names_is_warned_of_once() -> None:
    def stepped(optimizer: Any, *names: str) -> None:
        optimizer({give(param(name)) for name in names})

    pyro.clear_param_store()
    theirs = optim.Adam({"lr": 0.5})
    stepped(theirs, "module.w", "module.b", "other")
    saved = theirs.get_state()
    pyro.clear_param_store()
    optimizer = optim.Adam({"lr": 0.5})
    optimizer.set_state(saved)
    expected = r"new parameters \('w', 'b'\) start without state .* \('module.w', 'module.b'\)"
    with pytest.warns(UserWarning, match=expected) as caught:
        stepped(optimizer, "w", "b", "new")
    assert caught[0].filename == __file__
    assert "set_state({name.removeprefix('module.'): state for name, state in" in str(caught[0])
    stepped(optimizer, "w", "b", "another.w")
    # What the warning says helps.
    pyro.clear_param_store()
    optimizer = optim.Adam({"lr": 0.5})
    optimizer.set_state({name.removeprefix("module."): state for name, state in saved.items()})
    stepped(optimizer, "w", "b", "new")
    assert steps_of(optimizer, "w") == 2
