"""What users do with ``optim_objs``."""

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import multiopt as mo
import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import BOTH, give, param, steps_of


@BOTH
@pytest.mark.parametrize("how", ["del", "pop", "clear", "assign"])
def test_an_entry_that_is_deleted_starts_over(module: Any, how: str) -> None:
    opt, loc = module.Adam({"lr": 0.1}), param("loc")
    for _ in range(3):
        opt({give(loc)})
    assert loc in opt.optim_objs
    assert len(opt.optim_objs) == 1
    if how == "del":
        del opt.optim_objs[loc]
    elif how == "pop":
        opt.optim_objs.pop(loc)
    elif how == "clear":
        opt.optim_objs.clear()
    else:
        opt.optim_objs = {}
    assert loc not in opt.optim_objs
    with pytest.raises(KeyError):
        opt.optim_objs[loc]
    with pytest.raises(KeyError):
        del opt._state_waiting_to_be_consumed["loc"]
    opt({give(loc)})
    assert steps_of(opt, "loc") == 1


@BOTH
@pytest.mark.parametrize("how", ["del", "clear", "assign"])
def test_a_deleted_entry_starts_over_with_the_state_that_waits(module: Any, how: str) -> None:
    opt, loc = module.Adam({"lr": 0.1}), param("loc")
    for _ in range(3):
        opt({give(loc)})
    # Pyro's shares its clock.
    state = copy.deepcopy(opt.get_state())
    opt({give(loc)})
    opt.set_state(state)
    if how == "del":
        del opt.optim_objs[loc]
    elif how == "clear":
        opt.optim_objs.clear()
    else:
        opt.optim_objs = {}
    assert loc not in opt.optim_objs
    opt({give(loc)})
    assert steps_of(opt, "loc") == 4


def by_name(name: str) -> dict[str, float]:
    return {"lr": 0.1}


@pytest.mark.parametrize("saved", ["Adam", "SGD"])
@pytest.mark.parametrize("how", ["del", "clear", "assign"])
def test_a_deleted_entry_starts_over_without_state_that_does_not_fit(
    tmp_path: Path, how: str, saved: str
) -> None:
    stopped = optim.Adam({"lr": 0.1}) if saved == "Adam" else optim.SGD({"lr": 1, "momentum": 0.5})
    stopped({give(param("a")), give(param("b"))})
    stopped.save(tmp_path / "opt")
    if saved == "SGD":
        with pytest.raises(
            mo.CheckpointError,
            match=r"slots \['momentum_.*: load it into the optimizer that was sa",
        ):
            optim.Adam({"lr": 0.1}).load(tmp_path / "opt")
    pyro.clear_param_store()
    opt, a, b = optim.Adam(by_name), param("a"), param("b", size=3)
    opt.load(tmp_path / "opt")
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"parameter '[ab]' has .*: del optim_objs\[tensor\] to start over without",
        ) as caught:
            opt([give(b), give(a)])
        assert caught.value.__suppress_context__
    if how == "del":
        del opt.optim_objs[b]
        if saved == "SGD":
            del opt.optim_objs[a]
    elif how == "clear":
        opt.optim_objs.clear()
    else:
        opt.optim_objs = {}
    opt([give(a), give(b)])
    assert [steps_of(opt, name) for name in "ab"] == [2 if saved == "Adam" else 1, 1]


def test_optim_objs_takes_no_optimizers() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    with pytest.raises(TypeError, match="optim_objs does not accept optimizers"):
        opt.optim_objs[loc] = torch.optim.Adam([loc])
    with pytest.raises(TypeError, match="can be emptied by assigning"):
        opt.optim_objs = {loc: torch.optim.Adam([loc])}


@BOTH
def test_a_group_is_updated_like_a_dict_and_shows_what_is_now(module: Any) -> None:
    opt, loc = module.ClippedAdam({"lr": 1.0, "lrd": 0.5}), param("loc")
    opt({give(loc)})
    group = opt.optim_objs[loc].param_groups[0]
    assert group["lr"] == 0.5
    opt({give(loc)})
    assert group["lr"] == 0.25
    group.update(lr=8.0, betas=(0.5, 0.5))
    assert opt.get_state()["loc"]["param_groups"][0]["betas"] == (0.5, 0.5)
    opt({give(loc)})
    assert group["lr"] == 4.0
    group["lrd"] = 0.25
    assert group["lr"] == 4.0
    opt({give(loc)})
    assert group["lr"] == 1.0
    assert group["params"][0] is loc
    assert "eps" in group


@BOTH
def test_amsgrad_can_be_switched_on_before_the_first_step(module: Any) -> None:
    opt, loc = module.Adam({"lr": 0.1}), param("loc")
    opt({loc})
    opt.optim_objs[loc].param_groups[0]["amsgrad"] = True
    opt({give(loc)})
    assert "max_exp_avg_sq" in opt.get_state()["loc"]["state"][0]


def test_a_group_refuses_what_it_cannot_do() -> None:
    opt, loc = optim.ClippedAdam({"lr": 1.0, "lrd": 0.0}), param("loc")
    opt({give(loc)})
    group = opt.optim_objs[loc].param_groups[0]
    with pytest.raises(ValueError, match="ClippedAdam: eps must be"):
        group["eps"] = -1.0
    with pytest.raises(
        ValueError, match=r"lr is 0 after 1 decays by lrd=0\.0; got 0\.5: start over"
    ):
        group["lr"] = 0.5
    assert group["lr"] == 0.0


def test_a_rate_set_right_after_loading_stays() -> None:
    opt, loc = optim.SGD({"lr": 1.0}), param("loc")
    opt({give(loc)})
    opt.set_state(opt.get_state())
    for one in opt.optim_objs.values():
        one.param_groups[0]["lr"] = 0.25
    opt({give(loc)})
    assert loc.tolist() == [-1.25, -1.25]


@BOTH
def test_the_learning_rate_can_be_read_and_set_where_pyro_has_it(module: Any) -> None:
    loc = param("loc")
    opt = module.SGD({"lr": 0.5})
    opt({give(loc)})
    group = opt.optim_objs[loc].param_groups[0]
    assert group["lr"] == 0.5
    group["lr"] *= 0.5
    opt({give(loc)})
    assert loc.tolist() == [-0.75, -0.75]
    assert opt.get_state()["loc"]["param_groups"][0]["lr"] == 0.25


@BOTH
def test_a_rate_set_before_the_first_step_and_beside_a_decay(module: Any) -> None:
    loc, other = param("loc"), param("other")
    opt = module.ClippedAdam({"lr": 0.1, "lrd": 0.5})
    opt({give(loc), other})
    for tensor in (loc, other):
        opt.optim_objs[tensor].param_groups[0]["lr"] = 0.4
    before = loc.tolist()
    opt({give(loc), give(other)})
    np.testing.assert_allclose(loc.detach() - torch.tensor(before), -0.2, rtol=1e-5)
    # Pyro decays the rate of a tensor without a gradient, too; here its clock stands still.
    np.testing.assert_allclose(other.detach(), -0.2, rtol=1e-5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_can_be_zeroed_where_pyro_has_it(set_to_none: bool) -> None:
    loc, opt = param("loc"), optim.SGD({"lr": 0.5})
    opt({give(loc)})
    opt.optim_objs[loc].zero_grad(set_to_none=set_to_none)
    assert (loc.grad is None) == set_to_none
    if loc.grad is not None:
        assert loc.grad.tolist() == [0.0, 0.0]


# Schedulers of torch around what stands there


@BOTH
def test_schedulers_of_torch_take_what_is_there(module: Any) -> None:
    opt, loc = module.SGD({"lr": 1.0}), param("loc")
    opt([give(loc)])
    one = opt.optim_objs[loc]
    assert isinstance(one, torch.optim.Optimizer)
    assert one is opt.optim_objs[loc]
    parts = [
        torch.optim.lr_scheduler.ConstantLR(opt.optim_objs[loc], 0.5, 2),
        torch.optim.lr_scheduler.ExponentialLR(opt.optim_objs[loc], 0.5),
    ]
    scheduler = torch.optim.lr_scheduler.SequentialLR(one, parts, [2])
    rates = []
    for _ in range(5):
        opt([give(loc)])
        scheduler.step()
        rates.append(one.param_groups[0]["lr"])
    assert rates == [0.5, 1.0, 0.5, 0.25, 0.125]
    assert loc.tolist() == [-3.75, -3.75]
    assert opt.get_state()["loc"]["param_groups"][0]["initial_lr"] == 1.0
    assert "lr: 0.125" in repr(one)


@BOTH
def test_a_schedule_of_ones_own_goes_through_state(module: Any) -> None:
    opt, loc = module.Adam({"lr": 1.0}), param("loc")
    opt([give(loc)])
    kind = torch.optim.lr_scheduler.OneCycleLR
    first = kind(opt.optim_objs[loc], 3.0, total_steps=10)
    for _ in range(3):
        opt([give(loc)])
        first.step()
    state, schedule = opt.get_state(), first.state_dict()
    other = module.Adam({"lr": 1.0})
    other.set_state(state)
    other([loc])
    second = kind(other.optim_objs[loc], 3.0, total_steps=10)
    second.load_state_dict(schedule)
    other.optim_objs[loc].load_state_dict(state["loc"])
    for one in (first, second):
        one.step()
    groups = [o.get_state()["loc"]["param_groups"][0] for o in (opt, other)]
    assert groups[0] == groups[1]
    assert groups[0]["max_lr"] == 3.0


@BOTH
def test_one_tensor_can_be_stepped_and_loaded_by_itself(module: Any) -> None:
    opt, a, b = module.SGD({"lr": 1.0, "momentum": 0.5}), param("a"), param("b")
    opt([give(a), give(b)])
    one = opt.optim_objs[a]
    state = copy.deepcopy(one.state_dict())
    one.step()
    assert (a.tolist(), b.tolist()) == ([-2.5, -2.5], [-1.0, -1.0])
    one.load_state_dict(state)
    one.step()
    assert a.tolist() == [-4.0, -4.0]
    assert one.defaults["momentum"] == 0.5
    assert one.state[a]["momentum_buffer"].tolist() == [1.5, 1.5]


def test_what_one_tensor_refuses() -> None:
    opt, loc = optim.SGD({"lr": 1.0, "momentum": 0.5}), param("loc")
    opt([give(loc)])
    one = opt.optim_objs[loc]
    with pytest.raises(TypeError, match="an optimizer of one tensor"):
        one.add_param_group({"params": [loc]})
    with pytest.raises(mo.CheckpointError, match="'loc' is not a state of SGD"):
        one.load_state_dict({"momentum": 1})
    del opt
    with pytest.raises(ReferenceError):
        one.step()


def test_what_stands_there_does_not_hold_its_tensor() -> None:
    opt, loc = optim.SGD({"lr": 1.0}), param("loc")
    opt([give(loc)])
    one = opt.optim_objs[loc]
    pyro.clear_param_store()
    del loc
    gc.collect()
    assert len(opt.optim_objs) == 0
    with pytest.raises(ReferenceError, match="the tensor 'loc' is gone"):
        one.step()


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_a_tensor_of_another_shape_or_dtype_starts_over_when_its_entry_is_deleted(
    other: torch.Tensor,
) -> None:
    opt, w = optim.SGD({"lr": 0.5}), torch.zeros(2, requires_grad=True)
    w.grad = torch.ones(2)
    opt([w])
    w.data, w.grad = other.clone(), None
    w.grad = torch.ones_like(other)
    with pytest.raises((TypeError, ValueError), match=r"del optim_objs\[tensor\] to start over$"):
        opt([w])
    del opt.optim_objs[w]
    opt([w])
    assert w.tolist() == [-0.5] * len(other)
