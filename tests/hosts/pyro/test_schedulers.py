"""Learning-rate schedulers: torch's own, over parameters that are stepped together."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

import multiopt as mo
import multiopt.adapters.pyro as optim
from multiopt.adapters.pyro import lr_scheduler
from multiopt.adapters.pyro import tensor as tensor_module
from multiopt.adapters.pyro.joint import JointOptim
from multiopt.hyperparameters import set_numbers
from tests.hosts.pyro.tensors import BOTH, give, leaf, param


class Halving:
    """A schedule with a state that torch saves."""

    def __init__(self) -> None:
        self.every = 4

    def __call__(self, epoch: int) -> float:
        return 0.5 ** (epoch // self.every)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": Halving()},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.95},
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [3, 7, 7], "gamma": 0.5},
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "LinearLR": {"start_factor": 0.25, "total_iters": 7},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 20, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 4, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4, "mode": "exp_range"},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 40, "three_phase": True},
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.5, "cooldown": 1},
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "ClippedAdam": (pyro.optim.clipped_adam.ClippedAdam, {"lr": 0.1, "lrd": 0.99}),
}
STEPS = 30

#: Those that hold functions or counts, of which torch steps each.
BY_ITSELF = {"LambdaLR", "MultiplicativeLR", "MultiStepLR", "CyclicLR"}


def made(module: Any, name: str, kind: str = "SGD") -> Any:
    constructor, settings = OPTIMIZERS[kind]
    settings = {"optimizer": constructor, "optim_args": settings, **ARGUMENTS[name]}
    before = dict(settings)
    scheduler = getattr(module, name)(settings, {"clip_norm": 1.0})
    assert module is pyro.optim or settings == before
    return scheduler


def run(scheduler: Any, steps: range = range(STEPS)) -> list[list[dict[str, Any]]]:
    """The groups at each step; one parameter appears late, one has a gradient now and then."""
    seen = []
    for i in steps:
        rng = np.random.default_rng(i)
        tensors = [param(name, size=3) for name in "abc"[: 2 + (i > 7)]]
        for tensor in tensors:
            give(tensor, *rng.standard_normal(3).tolist())
        if i % 3:
            tensors[1].grad = None
        scheduler(set(tensors))
        losses = [1.0 + i % 4] if scheduler.pt_scheduler_constructor is PLATEAU else []
        scheduler.step(*losses)
        groups = [scheduler.optim_objs[tensor].optimizer.param_groups[0] for tensor in tensors]
        seen.append([{k: v for k, v in group.items() if k != "params"} for group in groups])
    return seen


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau


def values() -> dict[str, Any]:
    return {name: pyro.param(name).detach().clone().numpy() for name in "abc"}


def assert_alike(ours: Any, theirs: Any, rel: float = 1e-9) -> None:
    """Equal, numbers with a tolerance; callables are not compared."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_alike(ours[key], value, rel)
    elif isinstance(theirs, list | tuple):
        assert type(ours) is type(theirs)
        for pair in zip(ours, theirs, strict=True):
            assert_alike(*pair, rel)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rel, abs=0)
    elif not callable(theirs):
        assert ours == theirs


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_scheduler_follows_pyros(name: str, kind: str) -> None:
    found = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        scheduler = made(module, name, kind)
        assert isinstance(scheduler, JointOptim) == (module is optim)
        assert isinstance(scheduler, module.PyroLRScheduler)
        groups = run(scheduler)
        state = {label: one["scheduler"] for label, one in scheduler.get_state().items()}
        found.append((groups, state, values()))
    (ours, our_state, our_values), (theirs, their_state, their_values) = found
    if kind == "ClippedAdam":
        # Pyro decays the rate of a parameter without a gradient too.
        ours = [[groups[0], *groups[2:]] for groups in ours]
        theirs = [[groups[0], *groups[2:]] for groups in theirs]
        del our_state["b"], their_state["b"], our_values["b"], their_values["b"]
    assert_alike(ours, theirs, 1e-9 if kind == "ClippedAdam" else 0)
    assert len({group["lr"] for group, *_ in ours}) > 1
    assert_alike(our_state, their_state, 1e-9 if kind == "ClippedAdam" else 0)
    for label, value in their_values.items():
        np.testing.assert_allclose(our_values[label], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["SequentialLR", "ChainedScheduler", "LRScheduler", "_LRScheduler"]
)
def test_what_pyro_cannot_make_fails_alike(name: str) -> None:
    errors = []
    for module in (optim, pyro.optim):
        loc, settings = param("loc"), {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}}
        more: dict[str, Any] = {} if name.endswith("LRScheduler") else {"schedulers": []}
        scheduler = getattr(module, name)({**settings, **more})
        # Twice: what failed is not half there.
        for _ in range(2):
            with pytest.raises((TypeError, NotImplementedError)) as error:
                scheduler([give(loc)])
            errors.append((error.type, str(error.value)))
            assert len(scheduler.optim_objs) == 0
            assert scheduler.get_state() == {}
    assert len(set(errors)) == 1


@BOTH
def test_too_many_steps_are_an_error(module: Any) -> None:
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "max_lr": 1.0}
    scheduler, loc = module.OneCycleLR({**settings, "total_steps": 3}), param("loc")
    scheduler([give(loc)])
    for _ in range(3):
        scheduler.step()
    with pytest.raises(ValueError, match="Tried to step 4 times"):
        scheduler.step()


@BOTH
def test_what_a_scheduler_needs(module: Any) -> None:
    with pytest.raises(KeyError, match="optimizer"):
        module.StepLR({"optim_args": {"lr": 0.1}, "step_size": 1})
    with pytest.raises(KeyError, match="optim_args"):
        module.StepLR({"optimizer": torch.optim.SGD, "step_size": 1})


def test_settings_of_the_optimizer_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="SGD: lr must be"):
        optim.StepLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": -1.0}, "step_size": 1})


@BOTH
def test_settings_by_name(module: Any) -> None:
    def by_name(name: str) -> dict[str, float]:
        return {"lr": 1.0 if name == "a" else 2.0}

    settings = {"optimizer": torch.optim.SGD, "optim_args": by_name, "gamma": 0.5}
    scheduler = module.ExponentialLR(settings)
    a, b = param("a"), param("b")
    for _ in range(2):
        scheduler({give(a), give(b)})
        scheduler.step()
    assert (a.tolist(), b.tolist()) == ([-1.5, -1.5], [-3.0, -3.0])


@pytest.mark.filterwarnings("ignore:multiopt has no rule for DCTAdam")
def test_a_scheduler_around_an_optimizer_without_a_rule() -> None:
    constructor = pyro.optim.dct_adam.DCTAdam
    arguments = {"lr": 0.5, "subsample_aware": True}
    settings = {"optimizer": constructor, "optim_args": arguments, "gamma": 0.5}
    scheduler, loc = optim.ExponentialLR(settings), param("loc")
    assert isinstance(scheduler, optim.PyroOptim)
    assert isinstance(scheduler, optim.PyroLRScheduler)
    assert not isinstance(scheduler, JointOptim)
    assert settings["optimizer"] is constructor
    for _ in range(2):
        scheduler([give(loc)])
        scheduler.step()
    np.testing.assert_allclose(loc.detach(), -0.75, rtol=1e-5)


def test_a_rate_may_be_set_between_the_steps_of_a_scheduler() -> None:
    found = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        scheduler, loc = made(module, "ExponentialLR"), param("loc")
        for i in range(4):
            scheduler([give(loc)])
            scheduler.step()
            if i == 1:
                scheduler.optim_objs[loc].optimizer.param_groups[0]["lr"] = 5.0
        found.append(scheduler.optim_objs[loc].optimizer.param_groups[0]["lr"])
    assert found[0] == found[1] == 5.0 * 0.9 * 0.9


# State


@pytest.mark.parametrize("way", ["file", "pyro to ours", "ours to pyro", "set_state"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_schedule_goes_on_where_it_stopped(
    tmp_path: Path, name: str, kind: str, way: str
) -> None:
    whole = run(made(optim, name, kind))
    ends = values()
    pyro.clear_param_store()
    stopped = made(pyro.optim if way == "pyro to ours" else optim, name, kind)
    resumed = made(pyro.optim if way == "ours to pyro" else optim, name, kind)
    found = run(stopped, range(15))
    if way == "set_state":
        resumed.set_state(stopped.get_state())
        # What waits is what was given.
        ours, theirs = (one.get_state()["a"]["scheduler"] for one in (resumed, stopped))
        assert_alike(ours, theirs, 0)
    else:
        stopped.save(str(tmp_path / "opt"))
        resumed.load(str(tmp_path / "opt"))
    found += run(resumed, range(15, STEPS))
    if kind == "ClippedAdam" and "pyro" in way:
        # Pyro decays the rate of a parameter without a gradient too.
        whole = [[groups[0], *groups[2:]] for groups in whole]
        found = [[groups[0], *groups[2:]] for groups in found]
        ends.pop("b")
    assert_alike(found, whole)
    for label, value in ends.items():
        np.testing.assert_allclose(values()[label], value, rtol=1e-4, atol=1e-6)


def test_the_arguments_that_were_saved_win() -> None:
    found = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        stopped = made(module, "OneCycleLR")
        run(stopped, range(15))
        settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 9.0, "momentum": 0.5}}
        resumed = module.OneCycleLR({**settings, "max_lr": 9.0, "total_steps": 20})
        resumed.set_state(stopped.get_state())
        found.append(run(resumed, range(15, STEPS)))
    assert found[0] == found[1]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_scheduler_goes_on_by_name(copy_of: Callable[[Any], Any]) -> None:
    whole = run(made(optim, "OneCycleLR", "AdamW"))
    pyro.clear_param_store()
    scheduler = made(optim, "OneCycleLR", "AdamW")
    run(scheduler, range(15))
    again = copy_of(scheduler)
    assert again.pt_clip_args == {"clip_norm": 1.0}
    assert run(again, range(15, STEPS)) == whole[15:]


def test_the_state_of_a_plain_optimizer_is_no_state_of_a_scheduler(tmp_path: Path) -> None:
    loc, sgd = param("loc"), optim.SGD({"lr": 0.1, "momentum": 0.5})
    sgd([give(loc)])
    sgd.save(tmp_path / "opt")
    scheduler = made(optim, "ExponentialLR")
    with pytest.raises(mo.CheckpointError, match="of 'loc' is not that of a scheduler"):
        scheduler.set_state(sgd.get_state())
    with pytest.raises(mo.CheckpointError, match="of 'loc' is not that of a scheduler"):
        scheduler.load(tmp_path / "opt")
    assert scheduler.get_state() == {}


#: Classes whose state looks the same.
ALIKE = {"LambdaLR", "MultiplicativeLR"}


@pytest.mark.parametrize("other", ARGUMENTS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_state_of_another_kind_of_scheduler_is_refused(
    tmp_path: Path, name: str, other: str
) -> None:
    stopped, resumed, loc = made(optim, name), made(optim, other), param("loc")
    for one in (stopped, resumed):
        one([give(loc)])
        one.step(*([1.0] if one.pt_scheduler_constructor is PLATEAU else []))
    stopped.save(tmp_path / "opt")
    before = resumed.get_state()
    if name == other or {name, other} == ALIKE:
        resumed.load(tmp_path / "opt")
    else:
        with pytest.raises(
            mo.CheckpointError, match=rf"the schedule of 'loc' is not that of a {other}: expected"
        ):
            resumed.load(tmp_path / "opt")
        after = resumed.get_state()
        assert_alike(after["loc"]["scheduler"], before["loc"]["scheduler"], 0)
        assert (
            after["loc"]["optimizer"]["param_groups"] == before["loc"]["optimizer"]["param_groups"]
        )
    resumed([give(loc)])
    resumed.step(*([1.0] if other == "ReduceLROnPlateau" else []))


def test_a_schedule_that_is_no_state_is_refused() -> None:
    scheduler, loc = made(optim, "StepLR"), param("loc")
    scheduler([give(loc)])
    state = scheduler.get_state()
    state["loc"]["scheduler"] = 3
    with pytest.raises(mo.CheckpointError, match="schedule of 'loc' is a int; expected the state"):
        scheduler.set_state(state)


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_switch_of_a_scheduler_that_was_saved_wins(name: str, saved: bool) -> None:
    def one(cycle_momentum: bool) -> Any:
        settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1, "momentum": 0.5}}
        more = {**ARGUMENTS[name], "cycle_momentum": cycle_momentum}
        return getattr(optim, name)({**settings, **more})

    stopped, resumed = one(saved), one(not saved)
    run(stopped, range(5))
    resumed.set_state(stopped.get_state())
    found = [
        [[(group["lr"], group["momentum"]) for group in groups] for groups in run(one, range(5, 8))]
        for one in (resumed, stopped)
    ]
    assert found[0] == found[1]


def test_the_state_of_another_version_of_torch_is_taken() -> None:
    stopped, resumed = made(optim, "StepLR"), made(optim, "StepLR")
    run(stopped, range(5))
    state = stopped.get_state()
    for one in state.values():
        for key in ("_is_initial", "_get_lr_called_within_step"):
            one["scheduler"].pop(key, None)
        one["scheduler"].update(verbose=False, _of_tomorrow=1)
    resumed.set_state(state)
    assert run(resumed, range(5, 9)) == run(stopped, range(5, 9))


def test_schedules_that_torch_refuses_leave_all_as_it_was() -> None:
    scheduler = made(optim, "CyclicLR")
    run(scheduler, range(4))
    state, before = scheduler.get_state(), scheduler.get_state()
    run(scheduler, range(4, 6))
    ahead = scheduler.get_state()
    assert ahead["a"]["scheduler"] != before["a"]["scheduler"]
    del state["b"]["scheduler"]["_scale_fn_custom"]
    scheduler.set_state(state)
    a, b = (leaf(pyro.param(label)) for label in "ab")
    for _ in range(2):
        with pytest.raises(
            mo.CheckpointError, match=r"schedule of 'b' is not one that CyclicLR loads .*_scale_fn"
        ):
            scheduler([give(a, 1.0, 1.0, 1.0), give(b, 1.0, 1.0, 1.0)])
    del scheduler._state_waiting_to_be_consumed["a"], scheduler._state_waiting_to_be_consumed["b"]
    after = scheduler.get_state()
    for label in "ab":
        assert after[label]["scheduler"] == ahead[label]["scheduler"]
        ours, theirs = (x[label]["optimizer"] for x in (after, ahead))
        assert ours["param_groups"] == theirs["param_groups"]
        for slot, value in theirs["state"][0].items():
            assert torch.equal(ours["state"][0][slot], value)
    assert scheduler.optim_objs[a]._scale_fn_ref is not None


def test_saving_a_scheduler_warns_of_tensors_without_a_name(tmp_path: Path) -> None:
    scheduler, tensor = made(optim, "ExponentialLR"), torch.zeros(2, requires_grad=True)
    scheduler([give(tensor)])
    with pytest.warns(UserWarning, match="1 tensors are neither in a param store"):
        scheduler.save(tmp_path / "opt")


def test_a_state_that_does_not_fit_leaves_the_schedule() -> None:
    scheduler = made(optim, "ExponentialLR")
    run(scheduler, range(4))
    state = scheduler.get_state()
    pyro.clear_param_store()
    other, a, b = made(optim, "ExponentialLR"), param("a", size=3), param("b", size=2)
    other({a, b})
    other.set_state(state)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of parameter 'b' has shape"):
        other({give(a), give(b)})
    assert [tracked.scheduler.last_epoch for tracked in other._tensors] == [0, 0]


# Tensors that come and go


def test_a_schedule_goes_with_its_tensor() -> None:
    scheduler = made(optim, "ExponentialLR")
    for _ in range(3):
        pyro.clear_param_store()
        loc = param("loc")
        scheduler({give(loc)})
        scheduler.step()
        del loc
        gc.collect()
        assert len(scheduler.optim_objs) == len(scheduler._tensors) == 1
    pyro.clear_param_store()
    gc.collect()
    assert scheduler.optim_objs == {}
    assert len(scheduler._tensors) == 0


@BOTH
def test_a_deleted_schedule_starts_over(module: Any) -> None:
    scheduler, loc = made(module, "ExponentialLR"), param("loc")
    for _ in range(3):
        scheduler([give(loc)])
        scheduler.step()
    del scheduler.optim_objs[loc]
    scheduler([give(loc)])
    assert scheduler.optim_objs[loc].last_epoch == 0
    assert scheduler.optim_objs[loc].optimizer.param_groups[0]["lr"] == 0.1


def test_a_scheduler_that_goes_is_freed_at_once() -> None:
    scheduler, loc = made(optim, "OneCycleLR"), param("loc")
    scheduler([give(loc)])
    scheduler.step()
    group = weakref.ref(scheduler._registry.row_of("loc")[0])
    gc.disable()
    try:
        del scheduler
        assert group() is None
    finally:
        gc.enable()


def test_tensors_that_stand_alike_get_their_numbers_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scheduler, changes = made(optim, "OneCycleLR", "AdamW"), []
    scheduler([give(param(name)) for name in "abc"])
    for module in (lr_scheduler, tensor_module):
        monkeypatch.setattr(
            module,
            "set_numbers",
            lambda known, *given: changes.append(given) or set_numbers(known, *given),
        )
    scheduler.step()
    *leaders, (names, values) = changes
    assert (names, set(values)) == (["a", "b", "c"], {"lr", "betas"})
    assert all(names == ["a"] for names, _ in leaders)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_schedulers_that_stand_alike_step_as_each_by_itself(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are just where another one is, torch steps one."""

    def run(shares: bool) -> tuple[list[Any], int]:
        pyro.clear_param_store()
        scheduler, steps = made(optim, name, "AdamW"), []
        kind = scheduler.pt_scheduler_constructor
        step = kind.step

        def counted(self: Any, *args: Any) -> None:
            steps.append(self)
            step(self, *args)

        if not shares:
            monkeypatch.setattr(lr_scheduler, "PLAIN", set())
        found: list[Any] = []
        # Those of one call stand alike; "c" comes later, "a" is moved by hand, "d" starts over.
        a, b, c, d = (give(param(name)) for name in "abcd")
        for t in range(8):
            scheduler([a, b, d] if t < 2 else [a, b, c, d])
            if t == 3:
                scheduler.optim_objs[a].optimizer.param_groups[0]["lr"] = 0.25
            with monkeypatch.context() as patch:
                patch.setattr(kind, "step", counted)
                scheduler.step(*([0.5] if name == "ReduceLROnPlateau" else []))
            if t == 4:
                del scheduler.optim_objs[d]
            for one in scheduler.get_state().values():
                found.append((one["scheduler"], one["optimizer"]["param_groups"]))
        objects = scheduler.optim_objs
        found += [objects[x].state_dict() for x in objects]
        found += [dict(objects[x].optimizer.param_groups[0], params=None) for x in objects]
        lists = [v for x in objects for v in vars(objects[x]).values() if isinstance(v, list)]
        assert len(set(map(id, lists))) == len(lists)
        return found, len(steps)

    (shared, some), (alone, every) = run(True), run(False)
    assert shared == alone
    # The scheduler of "d" is made twice, but the second time in a call.
    assert every == 2 * 3 + 6 * 4
    assert some == every if name in BY_ITSELF else some == 2 * 1 + 2 + 2 * 3 + 3 * 4


def test_a_function_of_a_schedule_may_look_at_the_others() -> None:
    seen: list[float] = []

    def halved(epoch: int) -> float:
        if epoch:
            seen.extend(one.last_epoch for one in scheduler.optim_objs.values())
        return 0.5**epoch

    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "lr_lambda": halved}
    scheduler, tensors = optim.LambdaLR(settings), [param(name) for name in "ab"]
    scheduler([give(tensor) for tensor in tensors])
    scheduler.step()
    assert seen == [1, 0, 1, 1]
    scheduler([give(tensor) for tensor in tensors])
    assert [tensor.tolist() for tensor in tensors] == [[-1.5, -1.5]] * 2


# A program of Pyro


@pytest.mark.parametrize("name", ["StepLR", "OneCycleLR", "ReduceLROnPlateau"])
def test_svi_with_a_scheduler_follows_pyro(name: str) -> None:
    def model() -> None:
        latent = pyro.sample("latent", dist.Normal(0.0, 0.3))
        pyro.sample("obs", dist.Normal(latent, 0.2), obs=torch.tensor(0.1))

    def guide() -> None:
        loc = pyro.param("loc", torch.tensor(0.0).double())
        scale = pyro.param("scale", torch.tensor(0.5).double(), constraint=constraints.positive)
        pyro.sample("latent", dist.Normal(loc, scale))

    found = []
    for module in (optim, pyro.optim):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        scheduler = made(module, name, "AdamW")
        svi = SVI(model, guide, scheduler, Trace_ELBO())
        losses = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(15):
                losses += [svi.step(), svi.step()]
                scheduler.step(*losses[-1:] if name == "ReduceLROnPlateau" else ())
        found.append(losses)
    ours, theirs = found
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
