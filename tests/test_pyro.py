"""The Pyro drop-in: what Pyro asks of an optimizer, its traps, and its four faults mended."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import multiopt as mo
import multiopt.adapters.pyro as optim
from multiopt import checkpoint

NAMES = ["SGD", "Adam", "AdamW", "ClippedAdam"]
BOTH = pytest.mark.parametrize("module", [pyro.optim, optim], ids=["pyro", "multiopt"])


@pytest.fixture(autouse=True)
def fresh_store() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def param(name: str, value: float = 0.0, size: int = 2) -> torch.Tensor:
    """The unconstrained leaf behind a parameter of the store."""
    return pyro.param(name, torch.full((size,), value)).unconstrained()


def give(tensor: torch.Tensor, *grad: float) -> torch.Tensor:
    tensor.grad = torch.tensor(grad or [1.0] * tensor.numel(), dtype=tensor.dtype)
    return tensor


def steps_of(opt: Any, name: str) -> int:
    (state,) = opt.get_state()[name]["state"].values()
    return int(state["step"])


# Three of Pyro's own example models, in short.


def linear_regression(data: torch.Tensor) -> Callable[[], None]:
    """Of Pyro's regression tutorial: a module, whose parameters have dotted names."""

    class Regression(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = pyro.nn.PyroModule[torch.nn.Linear](3, 1)
            self.linear.double()

        def forward(self) -> None:
            mean = self.linear(data[:, :3]).squeeze(-1)
            with pyro.plate("data", len(data)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=data[:, 3])

    pyro.set_rng_seed(1)
    return Regression()


def no_guide() -> None:
    pass


def coin(data: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Of Pyro's SVI tutorial, part I: positive parameters of a Beta guide."""
    tosses = (data[:, 0] > 0).double()
    ten = torch.tensor(10.0, dtype=torch.float64)

    def model() -> None:
        fairness = pyro.sample("fairness", dist.Beta(ten, ten))
        with pyro.plate("tosses", len(tosses)):
            pyro.sample("toss", dist.Bernoulli(fairness), obs=tosses)

    def guide() -> None:
        alpha = pyro.param("alpha", 1.5 * ten, constraint=constraints.positive)
        beta = pyro.param("beta", 1.5 * ten, constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(alpha, beta))

    return model, guide


def growing(data: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A mixture whose later components, and their parameters, arrive while it trains."""
    calls = [0]

    def model() -> None:
        calls[0] += 1
        for k in range(1 + calls[0] // 20):
            loc = pyro.param(f"loc_{k}", torch.tensor(0.5 * k, dtype=torch.float64))
            with pyro.plate(f"data_{k}", len(data)):
                pyro.sample(f"y_{k}", dist.Normal(loc, 1.0), obs=data[:, k % 4])

    return model, no_guide


MODELS: dict[str, Callable[[torch.Tensor], tuple[Callable[[], None], Callable[[], None]]]] = {
    "a module of dotted names": lambda data: (linear_regression(data), no_guide),
    "constraints": coin,
    "a parameter born late": growing,
}
SETTINGS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "Adam": ("Adam", ({"lr": 0.05},)),
    "Adam by name, clipped": (
        "Adam",
        (
            lambda name: {"lr": 0.05 if name.endswith(("weight", "alpha", "0")) else 0.02},
            {"clip_norm": 5.0, "clip_value": 3.0},
        ),
    ),
    "AdamW": ("AdamW", ({"lr": 0.05, "betas": (0.8, 0.99), "amsgrad": True},)),
    "ClippedAdam": ("ClippedAdam", ({"lr": 0.05, "lrd": 0.99, "clip_norm": 2.0},)),
    "SGD": ("SGD", ({"lr": 1e-3, "momentum": 0.9, "nesterov": True}, {"clip_norm": 50.0})),
}


def losses(module: Any, model_name: str, setting: str, steps: int = 100) -> list[float]:
    pyro.clear_param_store()
    data = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 4)) + 0.5)
    model, guide = MODELS[model_name](data)
    name, arguments = SETTINGS[setting]
    pyro.set_rng_seed(2)
    svi = SVI(model, guide, getattr(module, name)(*arguments), Trace_ELBO())
    return [svi.step() for _ in range(steps)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_svi_follows_pyro_with_only_the_import_changed(model: str, setting: str) -> None:
    ours, theirs = losses(optim, model, setting), losses(pyro.optim, model, setting)
    assert len(set(ours)) > 90
    # The tolerance against torch in float64, spec/arithmetic.md; a loss sums 40 to 200 terms.
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


# What Pyro and its users ask of the object


@pytest.mark.parametrize("name", NAMES)
def test_the_object_is_what_pyro_asks_for(name: str) -> None:
    factory, theirs = getattr(optim, name), getattr(pyro.optim, name)
    opt = factory({"lr": 0.1})
    assert isinstance(opt, pyro.optim.PyroOptim)
    assert factory.__name__ == name == opt.pt_optim_constructor.__name__
    assert opt.pt_optim_constructor is theirs({"lr": 0.1}).pt_optim_constructor
    assert (opt.pt_optim_args, opt.pt_clip_args) == ({"lr": 0.1}, {})
    # contrib.oed calls .step() and swallows only its absence; .optimizer marks a scheduler.
    assert not hasattr(opt, "step")
    assert not hasattr(opt, "optimizer")
    assert opt({give(param("loc"))}) is None


@pytest.mark.parametrize("kind", [set, list, tuple, lambda ps: dict(enumerate(ps)).values(), iter])
def test_any_iterable_of_tensors_will_do(kind: Callable[[list[torch.Tensor]], Any]) -> None:
    opt = optim.SGD({"lr": 1.0})
    tensors = [give(param(name)) for name in "abc"]
    opt(kind(tensors))
    assert all(tensor.tolist() == [-1.0, -1.0] for tensor in tensors)


def test_a_tensor_listed_twice_is_stepped_once() -> None:
    loc = give(param("loc"))
    optim.SGD({"lr": 1.0})([loc, loc])
    assert loc.tolist() == [-1.0, -1.0]


def test_a_gradient_may_have_a_graph() -> None:
    loc = param("loc", 3.0)
    (loc.grad,) = torch.autograd.grad((loc**2).sum(), loc, create_graph=True)
    assert loc.grad.grad_fn is not None
    optim.Adam({"lr": 1.0}, {"clip_norm": 1.0})({loc})
    np.testing.assert_allclose(loc.detach(), 2.0, rtol=1e-6)


def test_tensors_in_no_store_work_like_any_other() -> None:
    opt = optim.Adam({"lr": 0.1})
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        opt({give(tensor) for tensor in tensors})
    assert set(opt.optim_objs) == set(tensors)
    assert all(int(o.state_dict()["state"][0]["step"]) == 2 for o in opt.optim_objs.values())
    opt.optim_objs[tensors[0]].zero_grad()
    assert tensors[0].grad is None
    assert opt.get_state() == {}


def test_settings_by_name_need_a_name() -> None:
    opt = optim.Adam(lambda name: {"lr": 0.1})
    with pytest.raises(
        ValueError, match=r"optim_args is a callable .* shape \(2,\) is in no param"
    ):
        opt({give(torch.zeros(2, requires_grad=True))})


@BOTH
def test_module_local_params(module: Any) -> None:
    with pyro.settings.context(module_local_params=True):

        class Spread(pyro.nn.PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.scale = pyro.nn.PyroParam(torch.tensor(9.0), constraints.positive)

            def forward(self) -> None:
                pyro.sample("x", dist.Normal(0.0, self.scale), obs=torch.tensor(1.0))

        spread, opt = Spread(), module.Adam({"lr": 0.1})
        svi = SVI(spread, no_guide, opt, Trace_ELBO())
        first, *_, last = [svi.step() for _ in range(30)]
        assert list(pyro.get_param_store()) == []
    assert last < first
    assert len(opt.optim_objs) == 1


@BOTH
def test_settings_are_asked_for_by_name(module: Any) -> None:
    asked: list[Any] = []

    def by_name(name: str) -> dict[str, float]:
        asked.append(name)
        return {"lr": 0.1}

    def by_pair(module_name: str, param_name: str) -> dict[str, float]:
        asked.append((module_name, param_name))
        return {"clip_norm": 1.0}

    net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    pyro.module("net", net)
    opt = module.Adam(by_name, by_pair)
    for _ in range(2):
        opt({give(param("loc"))})
    weight = net[0].weight
    weight.grad = torch.ones(1, 1)
    opt({weight})
    assert asked == ["loc", ("loc", "loc"), "net.0.weight", ("net", "0.weight")]


def test_clip_settings_may_be_asked_for_by_one_name_too() -> None:
    opt = optim.SGD({"lr": 1.0}, lambda name: {"clip_value": 0.5} if name == "a" else {})
    a, b = give(param("a")), give(param("b"))
    opt({a, b})
    assert (a.tolist(), b.tolist()) == ([-0.5, -0.5], [-1.0, -1.0])


@BOTH
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("Adam", ({"lr": 0.1}, {"clip_norm": 1.0})),
        ("Adam", ({"lr": 0.1}, {"clip_value": 0.5})),
        ("ClippedAdam", ({"lr": 0.1, "clip_norm": 0.5},)),
        ("Adam", ({"lr": 0.1}, {"clip_norm": 100.0})),
    ],
)
def test_the_clipped_gradient_is_left_behind(module: Any, name: str, arguments: Any) -> None:
    loc = give(param("loc"), 3.0, -4.0)
    getattr(module, name)(*arguments)({loc})
    expected = {"clip_norm": [0.6, -0.8], "clip_value": [0.5, -0.5]}
    clip = arguments[-1]
    if name == "ClippedAdam":
        expected = {"clip_norm": [0.5, -0.5]}
    elif clip.get("clip_norm") == 100.0:
        expected = {"clip_norm": [3.0, -4.0]}
    np.testing.assert_allclose(
        loc.grad, next(expected[k] for k in expected if k in clip), rtol=1e-6
    )


def test_a_gradient_that_no_clip_touches_stays_the_same_object() -> None:
    loc = give(param("loc"))
    grad = loc.grad
    optim.Adam({"lr": 0.1}, {"clip_norm": 100.0})({loc})
    assert loc.grad is grad


def test_a_clipped_sixteen_bit_gradient_keeps_its_dtype() -> None:
    loc = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    optim.Adam({"lr": 0.1}, {"clip_norm": 1.0})({give(loc, 3.0, -4.0)})
    assert loc.grad is not None
    assert loc.grad.dtype == torch.bfloat16
    assert loc.grad.tolist() == [0.6015625, -0.80078125]


def test_execution_arguments_are_accepted_and_change_nothing() -> None:
    results = []
    for extra in (
        {},
        {"foreach": True},
        {"fused": True},
        {"capturable": True},
        {"lr": torch.tensor(0.1)},
    ):
        loc = give(param("loc"))
        optim.Adam({"lr": 0.1, "differentiable": False, **extra})({loc})
        results.append(loc.tolist())
        pyro.clear_param_store()
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optim.Adam(0.1), TypeError, "optim_args must be a dict or a callable; got 0.1"),
        (lambda: optim.Adam({}, 1.0), TypeError, "clip_args must be a dict or a callable; got 1.0"),
        (lambda: optim.Adam({"rate": 1}), TypeError, "unexpected keyword argument 'rate'"),
        (lambda: optim.Adam({"lr": -1}), ValueError, "Adam: lr must be a finite number >= 0"),
        (
            lambda: optim.Adam({}, {"norm": 1}),
            TypeError,
            r"clip_args has \['norm'\]; expected clip_n",
        ),
        (lambda: optim.Adam({}, {"clip_norm": -1}), ValueError, "Clip: norm must be a number >= 0"),
        (lambda: optim.Adam({"differentiable": True}), ValueError, "not part of an autograd graph"),
    ],
)
def test_bad_settings_are_found_at_once(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()


def test_settings_by_name_must_be_a_dict() -> None:
    with pytest.raises(
        TypeError, match=r"optim_args gave 0\.1 for parameter 'loc'; expected a dict"
    ):
        optim.Adam(lambda name: 0.1)({give(param("loc"))})


def test_adam_with_torchs_decoupled_decay_is_adamw() -> None:
    results = []
    for factory, extra in ((optim.AdamW, {}), (optim.Adam, {"decoupled_weight_decay": True})):
        loc = give(param("loc", 1.0))
        factory({"lr": 0.1, "weight_decay": 0.5, **extra})({loc})
        results.append(loc.tolist())
        pyro.clear_param_store()
    assert results[0] == results[1]


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


@BOTH
@pytest.mark.parametrize("lrd", [1.0, 3.0, 5.0])
def test_clipped_adam_decays_its_rate_as_pyro_tests_it(module: Any, lrd: float) -> None:
    loc, opt = param("loc"), module.ClippedAdam({"lr": 0.01, "lrd": lrd})
    for step in range(1, 5):
        opt({give(loc)})
        (group,) = opt.get_state()["loc"]["param_groups"]
        assert group["lr"] == 0.01 * lrd**step


# State: Pyro's four faults do not remain


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
    opt, slots = optim.Adam({"lr": 0.1}), []
    for _ in range(5):
        pyro.clear_param_store()
        loc = param("loc")
        opt({give(loc)})
        slots.append(weakref.ref(opt._core._entries[next(iter(opt._core))].slots[0]))
        del loc
        gc.collect()
        assert len(opt._core) == 1
    assert list(opt.get_state()) == ["loc"]
    assert len(opt.optim_objs) == 1
    opt({give(param("loc"))})
    gc.collect()
    assert [ref() for ref in slots] == [None] * 5
    pyro.clear_param_store()
    gc.collect()
    assert opt.optim_objs == {}
    assert opt.get_state() == {}
    assert len(opt._core) == 0


def test_replacing_a_tensor_in_the_store_starts_anew_under_its_name() -> None:
    opt, store = optim.Adam({"lr": 0.1}), pyro.get_param_store()
    for _ in range(3):
        opt({give(param("loc"))})
    store["loc"] = torch.ones(2)
    opt({give(store["loc"].unconstrained())})
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


def test_loaded_state_of_a_parameter_never_stepped_starts_it_anew() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    opt({loc})
    unstepped = opt.get_state()
    opt({give(loc)})
    opt.set_state(unstepped)
    opt({give(loc)})
    assert steps_of(opt, "loc") == 1


# Files and Pyro's format


def test_the_format_is_pyros() -> None:
    for name in NAMES:
        pyro.clear_param_store()
        settings = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 0.1}
        states = []
        for module in (optim, pyro.optim):
            opt = getattr(module, name)(settings)
            opt([give(param("loc"))])
            states.append(opt.get_state()["loc"])
        ours, theirs = states
        assert ours["param_groups"] == theirs["param_groups"]
        for slot, value in theirs["state"][0].items():
            assert type(ours["state"][0][slot]) is type(value)
            np.testing.assert_allclose(ours["state"][0][slot], value, rtol=1e-6)


def test_the_state_of_a_scheduler_of_pyro_is_taken_without_its_schedule() -> None:
    loc = param("loc")
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    theirs = pyro.optim.ExponentialLR(settings)
    theirs([give(loc)])
    theirs.step()
    ours = optim.Adam({"lr": 123.0})
    ours.set_state(theirs.get_state())
    ours([give(loc)])
    assert steps_of(ours, "loc") == 2
    assert ours.get_state()["loc"]["param_groups"][0]["lr"] == 0.05


def test_decoupled_decay_goes_through_state_both_ways() -> None:
    loc = param("loc", 1.0)
    settings = {"lr": 0.1, "weight_decay": 0.5, "decoupled_weight_decay": True}
    theirs, ours = pyro.optim.Adam(settings), optim.Adam(settings)
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
    theirs, loc = pyro.optim.SGD({"lr": 0.25}), param("loc")
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["file", "pyro to ours", "ours to pyro", "set_state"])
def test_going_on_from_a_file_equals_never_having_stopped(
    tmp_path: Path, name: str, way: str
) -> None:
    settings = {"SGD": {"momentum": 0.9, "dampening": 0.5}, "ClippedAdam": {"lrd": 0.9}}.get(
        name, {}
    )
    settings = {"lr": 0.1, **settings}
    rng = np.random.default_rng(0)
    grads = torch.from_numpy(rng.standard_normal((8, 2)).astype(np.float32))
    first = pyro.optim if way == "pyro to ours" else optim
    second = pyro.optim if way == "ours to pyro" else optim

    loc, whole = param("loc"), torch.zeros(2, requires_grad=True)
    stopped, never = getattr(first, name)(settings), getattr(optim, name)(settings)
    # The learning rate of the file wins, as in Pyro.
    resumed = getattr(second, name)({**settings, "lr": 123.0})
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
        np.testing.assert_allclose(loc.detach(), whole.detach(), rtol=1e-5, atol=1e-6)


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
    loc = pyro.get_param_store()["loc"].unconstrained()
    theirs = pyro.optim.Adam({"lr": 0.1})
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
        UserWarning, match="2 tensors are in no param store; their state is not saved"
    ):
        opt.save(tmp_path / "opt")
    other = optim.Adam({"lr": 0.1})
    other.load(tmp_path / "opt")
    assert list(other.get_state()) == ["loc"]


def test_state_without_a_name_is_left_out_with_a_warning() -> None:
    theirs, loc = pyro.optim.Adam({"lr": 0.1}), param("loc")
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
    with pytest.raises(mo.CheckpointError, match="'loc' has the slots"):
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


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "opt", {"version": 99, "entries": {}, "pending": {}})
    with pytest.raises(
        mo.CheckpointError, match="expected a state dict of version 1; got version 99"
    ):
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
    loc, theirs = param("loc"), pyro.optim.Adam({"lr": 0.1})
    theirs([give(loc)])
    state = theirs.get_state()
    pyro.clear_param_store()
    double = pyro.param("loc", torch.zeros(2, dtype=torch.float64)).unconstrained()
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
    np.testing.assert_allclose(*results, rtol=1e-6)


@pytest.mark.parametrize("content", [b"", b"nothing of ours", b"PK\x03\x04half a file"])
def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "opt").write_bytes(content)
    opt = optim.Adam({"lr": 0.1})
    with pytest.raises(mo.CheckpointError, match="expected a checkpoint of multiopt or of Pyro"):
        opt.load(tmp_path / "opt")
    assert opt.get_state() == {}


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return warnings.warn, ("the trap ran",)

    torch.save({"loc": Trap()}, tmp_path / "opt")
    with pytest.raises(mo.CheckpointError, match="expected a checkpoint"):
        optim.Adam({"lr": 0.1}).load(tmp_path / "opt")


def test_a_state_of_another_form_is_a_checkpoint_error() -> None:
    opt = optim.Adam({"lr": 0.1})
    with pytest.raises(
        mo.CheckpointError, match="the state of 'b' is no state of Adam in Pyro's fo"
    ):
        opt.set_state({"a": {"state": {}, "param_groups": [{"lr": 1}]}, "b": {"momentum": 1}})
    assert opt.get_state() == {}


# Copies


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_by_name(copy_of: Callable[[Any], Any]) -> None:
    opt, loc = optim.Adam({"lr": 0.5}, {"clip_norm": 1.0}), param("loc")
    fresh = copy_of(opt)
    opt({give(loc)})
    other = copy_of(opt)
    for one in (fresh, other):
        assert isinstance(one, pyro.optim.PyroOptim)
        one({give(loc), give(param("late"))})
    assert [steps_of(one, "loc") for one in (opt, fresh, other)] == [1, 1, 2]
    assert other.pt_clip_args == {"clip_norm": 1.0}


def test_an_optimizer_that_goes_is_freed_at_once() -> None:
    opt, loc = optim.Adam({"lr": 0.5}), param("loc")
    opt({give(loc)})
    slot = weakref.ref(opt._core.entry("loc").slots[0])
    gc.disable()
    try:
        del opt
        assert slot() is None
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
    new = store["loc"].unconstrained()
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


# What users do with optim_objs


@BOTH
@pytest.mark.parametrize("how", ["del", "pop", "clear", "assign"])
def test_an_entry_that_is_deleted_starts_anew(module: Any, how: str) -> None:
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


def test_optim_objs_takes_no_optimizers() -> None:
    opt, loc = optim.Adam({"lr": 0.1}), param("loc")
    with pytest.raises(TypeError, match="optim_objs takes no optimizers"):
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
    with pytest.raises(KeyError, match="'rate' is no setting; expected one of"):
        group["rate"] = 1.0
    with pytest.raises(ValueError, match="ClippedAdam: eps must be"):
        group["eps"] = -1.0
    with pytest.raises(
        ValueError, match=r"lr is 0 after 1 decays by lrd=0\.0; got 0\.5: start anew"
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
def test_a_gradient_is_clipped_in_place(module: Any) -> None:
    flat = torch.full((4,), 3.0)
    tensors = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    for i, tensor in enumerate(tensors):
        tensor.grad = flat[2 * i : 2 * i + 2]
    module.SGD({"lr": 1.0}, {"clip_value": 0.5})(tensors)
    assert flat.tolist() == [0.5] * 4


def test_an_expanded_gradient_is_replaced_by_the_clipped_one() -> None:
    loc = torch.zeros(2, requires_grad=True)
    loc.grad = torch.full((1,), 3.0).expand(2)
    optim.SGD({"lr": 1.0}, {"clip_value": 0.5})([loc])
    assert loc.grad.tolist() == [0.5, 0.5]


@BOTH
def test_clip_settings_of_any_arguments(module: Any) -> None:
    asked = []

    def clip(*names: str) -> dict[str, Any]:
        asked.append(names)
        return {"clip_value": 0.5}

    module.SGD({"lr": 1.0}, clip)({give(param("loc"))})
    assert asked == [("loc", "loc")]


def test_truth_values_and_arrays_as_torch_takes_them() -> None:
    settings = {"lr": np.array(0.5), "betas": torch.tensor([0.5, 0.5]), "maximize": np.bool_(1)}
    loc = give(param("loc"))
    optim.Adam(settings, {"clip_norm": torch.tensor(100.0)})({loc})
    np.testing.assert_allclose(loc.detach(), 0.5, rtol=1e-6)


def test_equal_settings_share_one_rule() -> None:
    opt = optim.Adam(lambda name: {"lr": 0.1})
    opt({give(param(name)) for name in "abc"})
    assert len({id(opt._core.entry(name).rule) for name in "abc"}) == 1


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


def test_an_autoguide_trains_over_a_restart(tmp_path: Path) -> None:
    data = torch.tensor([1.0, 2.0, 3.0])

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=data)

    def run(stop: int | None) -> list[float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        opt = optim.Adam({"lr": 0.1}, {"clip_norm": 10.0})
        svi = SVI(model, AutoNormal(model), opt, Trace_ELBO())
        found = []
        for i in range(20):
            if i == stop:
                opt.save(tmp_path / "opt")
                svi.optim = optim.Adam({"lr": 0.1}, {"clip_norm": 10.0})
                svi.optim.load(tmp_path / "opt")
            found.append(svi.step())
        return found

    assert run(10) == run(None)
