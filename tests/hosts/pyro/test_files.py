"""Files, and state in Pyro's format, both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.optim
import pytest
import torch
from safetensors.numpy import save_file

import multiopt as mo
import multiopt.adapters.pyro as optim
from tests.hosts.pyro.tensors import PYRO, RULED, SETTINGS, give, leaf, param, steps_of

#: torch's Muon orthogonalizes in bfloat16.
ROUNDED = {"Muon": 1e-2}


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", RULED)
def test_the_format_is_pyros(name: str, steps: int) -> None:
    states = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        opt, loc = getattr(module, name)(SETTINGS[name]), param("loc", size=(2, 3))
        opt([loc])
        for _ in range(steps):
            opt([give(loc)])
        states.append(opt.get_state()["loc"])
    ours, theirs = states
    assert ours["param_groups"] == theirs["param_groups"]
    assert bool(ours["state"]) == bool(theirs["state"])
    for slot, value in theirs["state"].get(0, {}).items():
        assert type(ours["state"][0][slot]) is type(value)
        assert np.shape(ours["state"][0][slot]) == np.shape(value)
        np.testing.assert_allclose(ours["state"][0][slot], value, rtol=2e-6)


@pytest.mark.parametrize("first", ["pyro", "ours"])
@pytest.mark.parametrize("name", RULED)
def test_state_of_every_optimizer_before_its_first_gradient(name: str, first: str) -> None:
    modules = (pyro.optim, optim) if first == "pyro" else (optim, pyro.optim)
    opts = [getattr(module, name)(SETTINGS[name]) for module in modules]
    loc = param("loc", 1.0, size=(2, 3))
    opts[0]([loc])
    opts[1].set_state(opts[0].get_state())
    # What waits can be handed on.
    opts[1].set_state(opts[1].get_state())
    opts[1]([give(loc)])
    whole = torch.ones((2, 3), requires_grad=True)
    getattr(pyro.optim, name)(SETTINGS[name])([give(whole)])
    np.testing.assert_allclose(loc.detach(), whole.detach(), rtol=1e-5, atol=ROUNDED.get(name, 0))


def test_the_state_of_a_scheduler_of_pyro_is_taken_without_its_schedule() -> None:
    loc = param("loc")
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    theirs = PYRO.ExponentialLR(settings)
    theirs([give(loc)])
    theirs.step()
    ours = optim.Adam({"lr": 123.0})
    ours.set_state(theirs.get_state())
    ours([give(loc)])
    assert steps_of(ours, "loc") == 2
    assert ours.get_state()["loc"]["param_groups"][0]["lr"] == 0.05


@pytest.mark.parametrize("switch", ["amsgrad", "maximize"])
def test_a_switch_may_be_a_number_as_in_pyro(tmp_path: Path, switch: str) -> None:
    settings = {"lr": 0.1, switch: 1}
    ours, theirs = optim.Adam(settings), PYRO.Adam(settings)
    loc, whole = param("loc"), torch.zeros(2, requires_grad=True)
    for _ in range(2):
        theirs([give(loc)])
        ours([give(whole)])
    np.testing.assert_allclose(whole.detach(), loc.detach(), rtol=1e-5)
    theirs.save(str(tmp_path / "theirs"))
    resumed = optim.Adam({"lr": 9.0})
    resumed.load(tmp_path / "theirs")
    resumed([give(loc)])
    ours([give(whole)])
    np.testing.assert_allclose(whole.detach(), loc.detach(), rtol=1e-5)
    resumed.optim_objs[loc].param_groups[0][switch] = 0
    assert resumed.get_state()["loc"]["param_groups"][0][switch] is False


def test_decoupled_decay_goes_through_state_both_ways() -> None:
    loc = param("loc", 1.0)
    settings = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True}
    theirs, ours = PYRO.Adam(settings), optim.Adam(settings)
    theirs([give(loc)])
    ours.set_state(theirs.get_state())
    ours([give(loc)])
    (group,) = ours.get_state()["loc"]["param_groups"]
    assert group["decoupled_weight_decay"] is True
    assert group["weight_decay"] == 0.5


def test_a_file_of_another_rule_with_the_same_slots_keeps_the_settings_here(tmp_path: Path) -> None:
    loc, theirs = param("loc"), optim.ClippedAdam({"lr": 0.5})
    theirs([give(loc)])
    theirs.save(tmp_path / "opt")
    ours = optim.Adam({"lr": 0.1})
    ours.load(tmp_path / "opt")
    ours([give(loc)])
    (group,) = ours.get_state()["loc"]["param_groups"]
    assert (group["lr"], steps_of(ours, "loc")) == (0.1, 2)


def test_a_file_of_the_core_with_pending_state(tmp_path: Path) -> None:
    core = mo.Optimizer(mo.Adam(lr=0.1))
    core.step({"a": np.zeros(2, "f4")}, {"a": np.ones(2, "f4")})
    core.save(tmp_path / "first")
    core = mo.Optimizer(mo.Adam(lr=0.1))
    core.load(tmp_path / "first")
    core.step({"b": np.zeros(2, "f4")}, {"b": np.ones(2, "f4")})
    core.save(tmp_path / "second")
    opt = optim.Adam({"lr": 0.1})
    opt.load(tmp_path / "second")
    assert sorted(opt.get_state()) == ["a", "b"]


def test_what_only_the_core_has_is_left_out_with_a_warning(tmp_path: Path) -> None:
    half, single = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    core = mo.Optimizer(
        mo.Adam(lr=0.1),
        master_weights=True,
        on_nonfinite="skip",
        average=lambda name: mo.Average() if name == "single" else None,
    )
    core.step({"half": half}, {"half": torch.ones_like(half)})
    core.step({"single": single}, {"single": torch.ones_like(single)})
    core.step({"single": single}, {"single": torch.full_like(single, torch.nan)})
    core.save(tmp_path / "core")
    opt = optim.Adam({"lr": 0.1})
    with pytest.warns(
        UserWarning,
        match=r"left out averages and master copies, of \['half', 'single'\]: torch and Pyro",
    ) as caught:
        opt.load(tmp_path / "core")
    assert caught[0].filename == __file__
    assert sorted(opt.get_state()["half"]["state"][0]) == ["exp_avg", "exp_avg_sq", "step"]
    store = pyro.get_param_store()
    store["half"], store["single"] = half, single
    opt({give(leaf(store[name])) for name in ("half", "single")})
    assert [steps_of(opt, name) for name in ("half", "single")] == [2, 2]
    # The step above has ended the run of skips.
    assert opt.skips == {"single": mo.Skips(total=1, consecutive=0)}
    opt.save(tmp_path / "ours")
    optim.Adam({"lr": 0.1}).load(tmp_path / "ours")


def test_settings_of_what_was_not_stepped_are_saved_too(tmp_path: Path) -> None:
    opt, a, b = optim.Adam({"lr": 0.1}), param("a"), param("b")
    opt({give(a), b})
    opt.optim_objs[b].param_groups[0]["lr"] = 0.5
    opt.save(tmp_path / "opt")
    resumed = optim.Adam({"lr": 0.1})
    resumed.load(tmp_path / "opt")
    resumed({give(b)})
    np.testing.assert_allclose(b.detach(), -0.5, rtol=1e-6)
    core = mo.Optimizer(mo.Adam())
    core.load(tmp_path / "opt")
    core.step({"b": np.zeros(2, "f4")}, {"b": np.ones(2, "f4")})
    assert core.state("b").step == 1


def test_the_settings_of_plain_sgd_survive_a_file(tmp_path: Path) -> None:
    theirs, loc = PYRO.SGD({"lr": 0.25}), param("loc")
    theirs([give(loc)])
    ours = optim.SGD({"lr": 9.0})
    ours.set_state(theirs.get_state())
    ours.save(tmp_path / "opt")
    resumed = optim.SGD({"lr": 9.0})
    resumed.load(tmp_path / "opt")
    resumed({give(loc)})
    assert loc.tolist() == [-0.5, -0.5]


def test_a_schedule_is_not_asked_for_before_its_first_step() -> None:
    loc, opt = param("loc"), optim.SGD({"lr": lambda step: 1.0 / step})
    opt({loc})
    assert opt.get_state()["loc"]["param_groups"][0]["lr"] == 1.0


def test_map_location_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({}, tmp_path / "opt")
    seen, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda f, where, **options: seen.append(where) or load(f, where, **options)
    )
    opt = optim.Adam({"lr": 0.1})
    opt.load(tmp_path / "opt")
    opt.load(tmp_path / "opt", map_location=torch.device("cpu"))
    assert seen == ["cpu", torch.device("cpu")]


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("way", ["file", "pyro to ours", "ours to pyro", "set_state"])
def test_going_on_from_a_file_equals_never_having_stopped(
    tmp_path: Path, name: str, way: str
) -> None:
    settings = {**SETTINGS[name], **({"lrd": 0.9} if name == "ClippedAdam" else {})}
    rng = np.random.default_rng(0)
    grads = torch.from_numpy(rng.standard_normal((8, 2, 3)).astype(np.float32))
    first = pyro.optim if way == "pyro to ours" else optim
    second = pyro.optim if way == "ours to pyro" else optim

    loc, whole = param("loc", size=(2, 3)), torch.zeros((2, 3), requires_grad=True)
    stopped, never = getattr(first, name)(settings), getattr(optim, name)(settings)
    # The learning rate of the file wins, as in Pyro.
    resumed = getattr(second, name)({**settings, next(iter(settings)): 123.0})
    for i, grad in enumerate(grads):
        if i == 4:
            if way == "file":
                stopped.save(tmp_path / "opt")
                resumed.load(tmp_path / "opt")
            elif way == "set_state":
                resumed.set_state(stopped.get_state())
            else:
                torch.save(stopped.get_state(), tmp_path / "opt")
                resumed.load(str(tmp_path / "opt"))
            stopped = resumed
        loc.grad, whole.grad = grad.clone(), grad.clone()
        stopped({loc})
        never({whole})
    if way in ("file", "set_state") and name != "ClippedAdam":
        assert loc.tolist() == whole.tolist()
    else:
        atol = ROUNDED.get(name, 1e-6)
        np.testing.assert_allclose(loc.detach(), whole.detach(), rtol=1e-5, atol=atol)


def test_a_file_is_one_of_multiopts(tmp_path: Path) -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt({give(loc)})
    opt.save(str(tmp_path / "opt.safetensors"))
    core = mo.Optimizer(mo.Adam(lr=0.1))
    core.load(tmp_path / "opt.safetensors")
    assert core.pending == ("loc",)
    core.step({"loc": np.zeros(2, np.float32)}, {"loc": np.ones(2, np.float32)})
    assert core.state("loc").step == 2


def test_a_schedule_of_ours_outlives_a_load(tmp_path: Path) -> None:
    opt, loc = optim.SGD({"lr": lambda step: 1.0 / step}), param("loc")
    opt({give(loc)})
    opt.save(tmp_path / "opt")
    opt.load(tmp_path / "opt")
    opt({give(loc)})
    assert loc.tolist() == [-1.5, -1.5]


def test_sixteen_bit_state_of_pyro_becomes_float32() -> None:
    loc = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    pyro.get_param_store()["loc"] = loc
    loc = leaf(pyro.get_param_store()["loc"])
    theirs = PYRO.Adam({"lr": 0.1})
    theirs([give(loc)])
    ours = optim.Adam({"lr": 0.1})
    ours.set_state(theirs.get_state())
    ours({give(loc)})
    (state,) = ours.get_state()["loc"]["state"].values()
    assert state["exp_avg"].dtype == torch.float32
    assert int(state["step"]) == 2


def test_saving_warns_of_tensors_without_a_name(tmp_path: Path) -> None:
    opt = optim.Adam({"lr": 0.1})
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    opt({give(param("loc")), *map(give, tensors)})
    with pytest.warns(
        UserWarning,
        match="2 tensors are neither in a param store nor in a known module; their state",
    ):
        opt.save(tmp_path / "opt")
    other = optim.Adam({"lr": 0.1})
    other.load(tmp_path / "opt")
    assert list(other.get_state()) == ["loc"]


def test_state_without_a_name_is_left_out_with_a_warning() -> None:
    theirs, loc = PYRO.Adam({"lr": 0.1}), param("loc")
    theirs([give(loc)])
    pyro.clear_param_store()
    assert list(theirs.get_state()) == [None]
    with pytest.warns(UserWarning, match="left out a state without a parameter name"):
        optim.Adam({"lr": 0.1}).set_state(theirs.get_state())


def test_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    opt, a, b = optim.Adam({"lr": 0.1}), param("a"), param("b")
    opt({give(a), give(b)})
    opt.save(tmp_path / "opt")
    pyro.clear_param_store()
    a, b = param("a"), param("b", size=3)
    resumed = optim.Adam({"lr": 0.1})
    resumed.load(tmp_path / "opt")
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 'b' has shape \(2,\); expected"):
        resumed({give(a), give(b)})
    assert (a.tolist(), b.tolist()) == ([0.0] * 2, [0.0] * 3)
    assert [steps_of(resumed, name) for name in "ab"] == [1, 1]


def test_a_state_of_another_kind_is_found_at_once(tmp_path: Path) -> None:
    loc, sgd = param("loc"), optim.SGD({"lr": 0.1, "momentum": 0.9})
    sgd({give(loc)})
    sgd.save(tmp_path / "sgd")
    torch.save(sgd.get_state(), tmp_path / "sgd.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    adam = optim.Adam({"lr": 0.1})
    with pytest.raises(mo.CheckpointError, match=r"'loc' has the slots \['momentum_buffer'\]"):
        adam.load(tmp_path / "sgd")
    with pytest.raises(mo.CheckpointError, match=r"'loc' is not a state of Adam .* of another"):
        adam.load(tmp_path / "sgd.pt")
    with pytest.raises(
        mo.CheckpointError, match="expected the states of parameters by name; got a l"
    ):
        adam.load(tmp_path / "list.pt")
    state = sgd.get_state()
    state["loc"]["param_groups"][0]["lr"] = -1.0
    with pytest.raises(mo.CheckpointError, match="SGD: lr must be a finite number >= 0"):
        sgd.set_state(state)
    assert not adam._state_waiting_to_be_consumed
    assert steps_of(sgd, "loc") == 1


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "opt", metadata={"multiopt": '{"version": 99}'})
    with pytest.raises(mo.CheckpointError, match="got version 99: it needs a newer release"):
        optim.Adam({"lr": 0.1}).load(tmp_path / "opt")


def test_numpy_numbers_and_infinity_go_through_files(tmp_path: Path) -> None:
    loc = param("loc")
    theirs = pyro.optim.ClippedAdam({"lr": np.float64(0.25), "clip_norm": float("inf")})
    theirs([give(loc)])
    theirs.save(str(tmp_path / "theirs"))
    ours = optim.ClippedAdam({"lr": 123.0})
    ours.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    again = optim.ClippedAdam({"lr": 123.0})
    again.load(tmp_path / "ours")
    (group,) = again.get_state()["loc"]["param_groups"]
    assert (group["lr"], group["clip_norm"]) == (0.25, float("inf"))


def test_state_is_cast_to_the_parameter_as_torch_does() -> None:
    loc, theirs = param("loc"), PYRO.Adam({"lr": 0.1})
    theirs([give(loc)])
    state = theirs.get_state()
    pyro.clear_param_store()
    double = leaf(pyro.param("loc", torch.zeros(2, dtype=torch.float64)))
    ours = optim.Adam({"lr": 0.1})
    ours.set_state(state)
    ours([give(double)])
    assert ours.get_state()["loc"]["state"][0]["exp_avg"].dtype == torch.float64
    assert steps_of(ours, "loc") == 2


@pytest.mark.parametrize(("first", "second"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_adam_and_adamw_load_each_other_as_in_torch(first: str, second: str) -> None:
    loc = param("loc", 1.0)
    theirs = getattr(pyro.optim, first)({"lr": 0.25, "weight_decay": 0.5})
    theirs([give(loc)])
    resumed = [getattr(module, second)({"lr": 123.0}) for module in (optim, pyro.optim)]
    results = []
    for opt in resumed:
        with torch.no_grad():
            loc.fill_(1.0)
        opt.set_state(theirs.get_state())
        opt([give(loc)])
        results.append(loc.tolist())
    one, other = results
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"nothing of ours", b"PK\x03\x04half a file"])
def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "opt").write_bytes(content)
    opt = optim.Adam({"lr": 0.1})
    with pytest.raises(mo.CheckpointError, match=r"opt: expected a checkpoint that torch"):
        opt.load(tmp_path / "opt")
    assert opt.get_state() == {}


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (tmp_path / "the trap ran").mkdir, ()

    torch.save({"loc": Trap()}, tmp_path / "opt")
    with pytest.raises(mo.CheckpointError, match="expected a checkpoint"):
        optim.Adam({"lr": 0.1}).load(tmp_path / "opt")
    assert [path.name for path in tmp_path.iterdir()] == ["opt"]


def test_a_state_of_another_form_is_a_checkpoint_error() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("a")
    opt({give(loc)})
    state = opt.get_state()
    opt = optim.Adam({"lr": 0.1})
    with pytest.raises(mo.CheckpointError, match=r"the state of 'b' is not a state of Adam .*Key"):
        opt.set_state({**state, "b": {"momentum": 1}})
    assert opt.get_state() == {}


@pytest.mark.parametrize("way", ["file", "pyro to ours", "ours to pyro"])
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "SGD"])
def test_complex_state_goes_on(tmp_path: Path, name: str, way: str) -> None:
    first = pyro.optim if way == "pyro to ours" else optim
    second = pyro.optim if way == "ours to pyro" else optim
    start = torch.ones(3, dtype=torch.complex64)
    loc, whole = leaf(pyro.param("loc", start.clone())), start.requires_grad_()
    opt, never = (getattr(module, name)(SETTINGS[name]) for module in (first, pyro.optim))
    for i, grad in enumerate(torch.randn(6, 3, dtype=torch.complex64)):
        if i == 3:
            stopped, opt = opt, getattr(second, name)(SETTINGS[name])
            if way == "file":
                stopped.save(tmp_path / "opt")
                opt.load(tmp_path / "opt")
            else:
                opt.set_state(stopped.get_state())
        loc.grad, whole.grad = grad.clone(), grad.clone()
        opt([loc])
        never([whole])
    torch.testing.assert_close(loc, whole, rtol=1e-5, atol=1e-6)
