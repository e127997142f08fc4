"""What the drop-in shows is what counts: settings, clips, clocks, slots that are changed there."""

import copy
import gc
import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.optim
import pytest
import torch

import multiopt as mo
import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import BOTH, RULED, SETTINGS, give, param, steps_of


def close(run: Callable[[Any], Any], rtol: float = 1e-5) -> None:
    """Hold what a program does with the drop-in to what it does with Pyro."""
    found = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        found.append(run(module))
    ours, theirs = found
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-7)


def group_of(opt: Any, loc: torch.Tensor) -> Any:
    one = opt.optim_objs[loc]
    return getattr(one, "optimizer", one).param_groups[0]


# Bounds of clips


@pytest.mark.parametrize("name", ["ClippedAdam", "DCTAdam"])
@pytest.mark.parametrize("bounds", [(1.0, 100.0), (100.0, 1.0)])
@pytest.mark.parametrize("how", ["group", "load", "set_state", "file", "pickle", "load_state_dict"])
def test_the_bound_of_a_rule_is_that_of_what_is_left_behind(
    name: str, bounds: tuple[float, float], how: str, tmp_path: Path
) -> None:
    def run(module: Any) -> list[float]:
        loc = param("loc", size=1)
        opt = getattr(module, name)({"lr": 0.1, "clip_norm": bounds[0]})
        other = getattr(module, name)({"lr": 0.1, "clip_norm": bounds[1]})
        for one in (other, opt):
            one([give(loc, 50.0)])
        if how == "group":
            group_of(opt, loc)["clip_norm"] = bounds[1]
        elif how == "load_state_dict":
            opt.optim_objs[loc].load_state_dict(copy.deepcopy(other.optim_objs[loc].state_dict()))
        else:
            opt = getattr(module, name)({"lr": 0.1, "clip_norm": bounds[0]})
            if how == "set_state":
                opt.set_state(copy.deepcopy(other.get_state()))
            elif how == "pickle" and module is optim:
                opt = pickle.loads(pickle.dumps(other))
            elif how == "load" and module is optim:
                torch.save(other.get_state(), tmp_path / "state")
                opt.load(tmp_path / "state")
            else:
                other.save(str(tmp_path / "state"))
                opt.load(str(tmp_path / "state"))
        left = []
        for sign in (1, -1, 1):
            opt([give(loc, 50.0 * sign)])
            assert loc.grad is not None
            left += [loc.grad.item(), loc.item()]
        return [*left, group_of(opt, loc)["clip_norm"]]

    close(run)


def test_a_bound_may_be_a_schedule() -> None:
    for name in ("ClippedAdam", "DCTAdam"):
        loc, by_hand = param(name), torch.zeros(2)
        opt = getattr(optim, name)({"lr": 0.1, "clip_norm": lambda step: 2.0 / step})
        core = mo.Optimizer(getattr(mo, name)(lr=0.1, clip_norm=lambda step: 2.0 / step))
        for _ in range(3):
            opt([give(loc, 50.0, -50.0)])
            core.step({"w": by_hand}, {"w": torch.tensor([50.0, -50.0])})
        assert loc.tolist() == by_hand.tolist()
        assert group_of(opt, loc)["clip_norm"] == 2.0 / 3


@pytest.mark.parametrize("key", ["clip_norm", "clip_value"])
@pytest.mark.parametrize("through", ["dict", "attribute", "callable", "tensor", "array"])
def test_settings_of_a_clip_are_followed(key: str, through: str) -> None:
    def run(module: Any) -> list[float]:
        value: Any = {"tensor": torch.tensor(1.0), "array": np.array(1.0)}.get(through, 1.0)
        settings: dict[str, Any] = {key: value}
        given: Any = (lambda *_: settings) if through == "callable" else settings
        opt = module.SGD({"lr": 1.0}, given)
        loc, late = param("loc", size=1), param("late", size=1)
        found = []
        for k in range(6):
            if k == 2:
                if through in ("tensor", "array"):
                    value += 2.0
                else:
                    (opt.pt_clip_args if through == "attribute" else settings)[key] = 3.0
            if k == 4:
                # No bound any more, which Pyro takes as well.
                settings[key] = None
            opt([give(loc, 50.0), *([give(late, 50.0)] if k else [])])
            found += [loc.item(), late.item()]
        return found

    close(run)


@BOTH
def test_settings_of_a_clip_that_were_empty_at_first_sight_stay_so(module: Any) -> None:
    settings: dict[str, float] = {}
    opt, loc, late = module.SGD({"lr": 1.0}, settings), param("loc"), param("late")
    opt([give(loc, 3.0, 4.0)])
    settings["clip_norm"] = 1.0
    opt([give(loc, 3.0, 4.0), give(late, 3.0, 4.0)])
    np.testing.assert_allclose(loc.detach(), [-6.0, -8.0])
    np.testing.assert_allclose(late.detach(), [-0.6, -0.8], rtol=1e-5)


def test_a_setting_that_becomes_impossible_changes_nothing() -> None:
    settings = {"clip_norm": 1.0}
    opt, loc = optim.SGD({"lr": 1.0}, settings), param("loc")
    opt([give(loc, 3.0, 4.0)])
    for wrong, error in ({"clip_norm": -1.0}, ValueError), ({"clip_nrom": 1.0}, TypeError):
        before = dict(settings)
        settings.clear()
        settings.update(wrong)
        for _ in range(2):
            with pytest.raises(error, match=r"norm must be a number|clip_args has \['clip_nrom'\]"):
                opt([give(loc, 3.0, 4.0)])
        settings.clear()
        settings.update(before)
    opt([give(loc, 3.0, 4.0)])
    np.testing.assert_allclose(loc.detach(), [-1.2, -1.6], rtol=1e-5)


def test_what_nobody_else_holds_is_not_watched() -> None:
    opt = optim.SGD({"lr": 1.0}, lambda name: {"clip_norm": 1.0})
    opt([give(param("a")), give(param("b"))])
    assert opt._sources == {}


# Settings that are the caller's own objects


@pytest.mark.parametrize("name", ["Adam", "SGD", "ClippedAdam"])
@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("through", ["own", "group", "assigned", "loaded"])
def test_a_rate_that_is_a_tensor_is_followed(name: str, kind: str, through: str) -> None:
    if (kind, name) == ("array", "Adam"):
        pytest.skip("torch takes no arrays there")

    def run(module: Any) -> list[float]:
        rate: Any = torch.tensor(0.1) if kind == "tensor" else np.array(0.1)
        loc, other = param("loc", size=1), param("other", size=1)
        opt = getattr(module, name)({"lr": 0.1 if through == "assigned" else rate})
        opt([give(loc), give(other)])
        if through == "assigned":
            group_of(opt, loc)["lr"] = rate
        if through == "loaded":
            state = copy.deepcopy(opt.get_state())
            opt = getattr(module, name)({"lr": 0.5})
            opt.set_state(state)
            opt([give(loc), give(other)])
        group = group_of(opt, loc)
        if through in ("own", "assigned"):
            rate[()] = 0.5
        else:
            group["lr"][()] = 0.5
        for _ in range(2):
            opt([give(loc), give(other)])
        found = [loc.item(), other.item(), float(group["lr"])]
        group["lr"] = 0.25
        rate[()] = 9.0
        opt([give(loc)])
        return [*found, loc.item()]

    close(run)


def test_betas_that_are_tensors_or_a_list_are_followed() -> None:
    def run(module: Any) -> list[float]:
        betas, listed = (torch.tensor(0.9), torch.tensor(0.99)), [0.9, 0.99]
        loc, other = param("loc", size=1), param("other", size=1)
        opts = [
            module.Adam({"lr": torch.tensor(0.1), "betas": betas, "foreach": False}),
            module.ClippedAdam({"lr": 0.1, "betas": listed}),
        ]
        found = []
        for k in range(4):
            for opt, tensor in zip(opts, (loc, other), strict=True):
                opt([give(tensor, 1.0 + k)])
            found += [loc.item(), other.item()]
            betas[0].fill_(0.5)
            listed[0] = 0.5
        assert opts[1].optim_objs[other].param_groups[0]["betas"] is listed
        return found

    close(run)


def test_a_rate_that_is_a_tensor_follows_a_scheduler() -> None:
    def run(module: Any) -> list[float]:
        settings = {"lr": torch.tensor(0.5)}
        scheduler = module.ExponentialLR(
            {"optimizer": torch.optim.SGD, "optim_args": settings, "gamma": 0.5}
        )
        loc = param("loc", size=1)
        for _ in range(3):
            scheduler([give(loc)])
            scheduler.step()
        return [loc.item(), settings["lr"].item()]

    close(run)


def test_a_tensor_that_each_step_would_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr is tensor\(0.1000\) and lrd=0.5, .*pass float\(lr\)"):
        optim.ClippedAdam({"lr": torch.tensor(0.1), "lrd": 0.5})


# Groups


@BOTH
def test_a_group_keeps_keys_of_users_and_of_schedulers(module: Any, tmp_path: Path) -> None:
    opt, loc = module.Adam({"lr": 0.1}), param("loc")
    opt([give(loc)])
    group = opt.optim_objs[loc].param_groups[0]
    group["lr_scale"] = 0.5
    group.update(tag="decoder", initial_lr=0.1)
    group.setdefault("seen", []).append(3)
    assert group.pop("tag") == "decoder"
    assert "tag" not in group
    opt.save(str(tmp_path / "state"))
    for load in ("set_state", "load"):
        other = module.Adam({"lr": 0.2})
        if load == "set_state":
            other.set_state(copy.deepcopy(opt.get_state()))
        else:
            other.load(str(tmp_path / "state"))
        assert other._state_waiting_to_be_consumed
        other([give(loc)])
        again = other.optim_objs[loc].param_groups[0]
        assert (again["lr_scale"], again["initial_lr"], again["seen"]) == (0.5, 0.1, [3])
        assert again["lr"] == 0.1
    with pytest.raises(KeyError):
        del group["tag"]


def test_a_file_says_what_of_a_group_it_does_not_hold(tmp_path: Path) -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt([give(loc)])
    opt.optim_objs[loc].param_groups[0].update(tag={1, 2}, worst=float("inf"))
    with pytest.warns(UserWarning, match="left out 'tag' in the param_groups of 'loc', a set") as n:
        opt.save(tmp_path / "state")
    assert n[0].filename == __file__
    other = optim.Adam({"lr": 0.1})
    other.load(tmp_path / "state")
    other([give(loc)])
    group = other.optim_objs[loc].param_groups[0]
    assert group["worst"] == float("inf")
    assert "tag" not in group


@pytest.mark.parametrize("name", ["capturable", "foreach", "fused"])
def test_how_torch_would_run_can_be_set_and_read(name: str) -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt([give(loc)])
    group = opt.optim_objs[loc].param_groups[0]
    group[name] = True
    assert group[name] is True
    assert opt.get_state()["loc"]["param_groups"][0][name] is True
    opt([give(loc)])
    assert steps_of(opt, "loc") == 2


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_decay_can_be_decoupled_while_a_model_runs(name: str) -> None:
    def run(module: Any) -> list[float]:
        opt = getattr(module, name)({"lr": 0.1, "weight_decay": 0.5})
        loc, found = param("loc", 2.0, size=1), []
        opt([give(loc)])
        for value in (name == "Adam", name != "Adam"):
            group_of(opt, loc)["decoupled_weight_decay"] = value
            assert group_of(opt, loc)["decoupled_weight_decay"] == value
            for _ in range(2):
                opt([give(loc)])
            found.append(loc.item())
        return found

    close(run)


def test_what_cannot_be_changed_says_what_to_do() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt([give(loc)])
    one = opt.optim_objs[loc]
    group = one.param_groups[0]
    with pytest.raises(ValueError, match="differentiable=True"):
        group["differentiable"] = True
    with pytest.raises(TypeError, match="the tensor of a group cannot be changed"):
        group["params"] = [torch.zeros(2)]
    with pytest.raises(TypeError, match="'lr' is a setting, which cannot be deleted"):
        del group["lr"]
    with pytest.raises(TypeError, match=r"expected changes of its settings: param_groups\[0\]"):
        one.param_groups = [{"lr": 1.0}]
    changes: list[Callable[[Any], object]] = [
        lambda groups: groups.append({}),
        lambda groups: groups.clear(),
        lambda groups: groups.pop(),
        lambda groups: groups.__setitem__(0, {}),
        lambda groups: groups.__iadd__([{}]),
    ]
    for change in changes:
        with pytest.raises(TypeError, match="expected changes of its settings"):
            change(one.param_groups)
    with pytest.raises(TypeError, match="make another for"):
        opt.pt_optim_constructor = torch.optim.SGD
    assert [*one.param_groups] == [group]
    opt([give(loc)])
    assert steps_of(opt, "loc") == 2


# Clocks and slots

RESETS: dict[str, Callable[[Any, torch.Tensor], object]] = {
    "clear": lambda one, loc: one.state.clear(),
    "assign defaultdict": lambda one, loc: setattr(one, "state", defaultdict(dict)),
    "assign": lambda one, loc: setattr(one, "state", {}),
    "del": lambda one, loc: one.state.__delitem__(loc),
    "pop": lambda one, loc: one.state.pop(loc),
    "empty": lambda one, loc: one.state.__setitem__(loc, {}),
    "clear slots": lambda one, loc: one.state[loc].clear(),
}


@pytest.mark.parametrize("how", RESETS)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "ClippedAdam", "SGD", "RMSprop"])
def test_a_state_that_is_emptied_begins_again(name: str, how: str) -> None:
    if (name, how) in {("SGD", "assign"), ("Adam", "assign")}:
        pytest.skip("torch needs a defaultdict")

    def run(module: Any) -> list[float]:
        settings = {**SETTINGS.get(name, {}), "lr": 0.1}
        if name == "ClippedAdam":
            settings["lrd"] = 0.9
        opt, loc = getattr(module, name)(settings), param("loc", size=1)
        for k in range(5):
            opt([give(loc, 1.0 + k)])
        group_of(opt, loc)["eps" if name != "SGD" else "momentum"] = 0.5
        if how == "assign":
            RESETS["assign defaultdict"](opt.optim_objs[loc], loc)
        else:
            RESETS[how](opt.optim_objs[loc], loc)
        assert not opt.optim_objs[loc].state.get(loc)
        found = [group_of(opt, loc)["lr"]]
        for _ in range(3):
            opt([give(loc, -1.0)])
            found += [loc.item(), group_of(opt, loc)["lr"]]
        return found

    close(run)


@pytest.mark.parametrize("name", RULED)
def test_a_state_can_be_read_where_torch_has_it(name: str) -> None:
    found = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        opt, loc = getattr(module, name)(SETTINGS[name]), param("loc", 1.0, (2, 3))
        opt([loc])
        one = opt.optim_objs[loc]
        fresh = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in one.state[loc].items()}
        opt([give(loc)])
        assert set(one.state) == {loc}
        state = one.state[loc]
        # Ours has a clock everywhere.
        found.append((fresh, {k for k in state if state[k] is not None} | {"step"}))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "ClippedAdam"])
@pytest.mark.parametrize("how", ["in place", "assign", "whole"])
def test_slots_that_are_written_count(name: str, how: str) -> None:
    slots = {"SGD": "momentum_buffer", "RMSprop": "square_avg"}
    slot = slots.get(name, "exp_avg")

    def run(module: Any) -> list[float]:
        opt, loc = getattr(module, name)({**SETTINGS[name], "lr": 0.1}), param("loc", size=2)
        for _ in range(2):
            opt([give(loc)])
        state = opt.optim_objs[loc].state
        if how == "in place":
            state[loc][slot].mul_(3.0)
        elif how == "assign":
            state[loc][slot] = torch.tensor([0.5, 0.25])
        else:
            state[loc] = {**state[loc], slot: torch.tensor([0.5, 0.25])}
        found = state[loc][slot].tolist()
        opt([give(loc)])
        return [*found, *loc.tolist(), *state[loc][slot].tolist()]

    close(run)


@pytest.mark.parametrize("how", ["fill", "zero", "iadd", "assign", "number"])
@pytest.mark.parametrize("name", ["Adam", "RAdam", "ClippedAdam", "AdagradRMSProp"])
def test_a_clock_that_is_written_counts(name: str, how: str) -> None:
    if name in ("ClippedAdam", "AdagradRMSProp") and how in ("fill", "zero"):
        pytest.skip("an int in Pyro")
    if name in ("Adam", "RAdam") and how == "number":
        pytest.skip("a tensor in torch")

    def run(module: Any) -> list[float]:
        settings = {**SETTINGS[name], **({"lrd": 0.9} if name == "ClippedAdam" else {})}
        opt, loc = getattr(module, name)(settings), param("loc", size=1)
        for _ in range(7):
            opt([give(loc)])
        state = opt.optim_objs[loc].state[loc]
        clock = state["step"]
        if how == "fill":
            clock.fill_(3)
        elif how == "zero":
            clock.zero_()
        elif how == "iadd":
            state["step"] += 100
        elif how == "assign":
            state["step"] = torch.tensor(3.0) if isinstance(clock, torch.Tensor) else 3
        else:
            state["step"] = 3
        found = [float(state["step"])]
        for _ in range(2):
            opt([give(loc, 0.5)])
            found += [loc.item(), float(state["step"])]
        # It is the same object for as long as somebody has it.
        if how in ("fill", "zero"):
            assert clock is state["step"]
        return found

    close(run)


def test_what_is_no_state_is_refused() -> None:
    opt, loc = optim.NAdam({"lr": 0.1}), param("loc")
    opt([loc])
    state = opt.optim_objs[loc].state[loc]
    assert not state
    with pytest.raises(TypeError, match=r"'loc' is empty before the first step; .*load_state"):
        state["exp_avg"] = torch.zeros(2)
    opt([give(loc)])
    before = {k: v.tolist() for k, v in state.items()}
    wrong: list[tuple[str, Any, type[Exception], str]] = [
        ("step", 1.5, ValueError, "a step >= 0; got 1.5"),
        ("step", -1, ValueError, "got -1"),
        ("exp_avg", torch.zeros(3), ValueError, r"'exp_avg' would have shape \(3,\)"),
        ("exp_avg", torch.zeros(2, dtype=torch.complex64), ValueError, "and dtype torch.complex64"),
        ("mu_product", 1.0, TypeError, "follows from the step and the settings"),
        ("exp_avgs", torch.zeros(2), KeyError, "has no 'exp_avgs'; it has step"),
    ]
    for name, value, error, words in wrong:
        with pytest.raises(error, match=words):
            state[name] = value
    with pytest.raises(TypeError, match=r"needs 'exp_avg': set it, clear the state, or del optim"):
        del state["exp_avg"]
    with pytest.raises(KeyError):
        del state["mine"]
    clock = state["step"]
    clock.fill_(0.5)
    with pytest.raises(ValueError, match=r"a step >= 0; got 0.5"):
        opt([give(loc)])
    clock.fill_(1)
    assert {k: v.tolist() for k, v in state.items()} == before
    with pytest.raises(KeyError):
        opt.optim_objs[loc].state[torch.zeros(2)]


def test_complex_slots_are_written_whole() -> None:
    loc = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    opt = optim.SGD({"lr": 1.0, "momentum": 1.0})
    loc.grad = torch.tensor([1 + 2j, 3j])
    opt([loc])
    slot = opt.optim_objs[loc].state[loc]["momentum_buffer"]
    assert slot.tolist() == [1 + 2j, 3j]
    slot.zero_()
    opt([loc])
    assert loc.tolist() == [-2 - 4j, -6j]


# Forgetting


@BOTH
def test_what_is_popped_leaves_the_state_that_waits(module: Any) -> None:
    opt, loc = module.Adam({"lr": 0.1}), param("loc")
    for _ in range(3):
        opt([give(loc)])
    opt.set_state(copy.deepcopy(opt.get_state()))
    one = opt.optim_objs.pop(loc)
    assert one is not None
    assert opt.optim_objs.pop(loc, "none") == "none"
    opt([give(loc)])
    assert steps_of(opt, "loc") == 4


def test_what_was_settings_of_dead_tensors_is_forgotten() -> None:
    opt = optim.Adam(lambda name: {"lr": float(np.random.default_rng(int(name[1:])).random())})
    for k in range(100):
        pyro.clear_param_store()
        opt([give(param(f"p{k}"))])
        gc.collect()
    assert len(opt.optim_objs) == 1
    assert not opt._sources


def test_tensors_can_be_swapped() -> None:
    opt, module = optim.Adam({"lr": 0.1}), torch.nn.Linear(2, 1)
    module(torch.ones(2)).sum().backward()
    opt(module.parameters())
    views = [opt.optim_objs[p].state[p] for p in module.parameters()]
    opt.optim_objs[module.weight].state[module.weight]["exp_avg"].mul_(0.5)
    other = torch.nn.Parameter(torch.full((1, 2), 3.0))
    module.zero_grad()
    torch.utils.swap_tensors(module.weight, other)
    assert len(opt.optim_objs) == 2
    module.weight.grad = torch.zeros(1, 2)
    opt([module.weight])
    assert [int(view["step"]) for view in views] == [2, 1]
    assert (module.weight < 3.0).all()
