"""What Pyro and its users ask of the object: arguments, calls, gradients left behind."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.optim
import pytest
import torch

import multiopt.adapters.pyro as optim
from multiopt.registry import Registry
from tests.hosts.pyro.tensors import BOTH, NAMES, PYRO, give, param


@pytest.mark.parametrize("name", NAMES)
def test_the_object_is_what_pyro_asks_for(name: str) -> None:
    factory, theirs = getattr(optim, name), getattr(pyro.optim, name)
    opt = factory({"lr": 0.1})
    assert isinstance(opt, PYRO.PyroOptim)
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
    assert loc.grad is not None
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
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "AdamW"])
def test_a_decay_that_torch_cannot_decouple_is_no_argument(module: Any, name: str) -> None:
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        getattr(module, name)({"lr": 0.1, "decoupled_weight_decay": True})({param("loc", 1.0)})


@BOTH
@pytest.mark.parametrize("lrd", [1.0, 3.0, 5.0])
def test_clipped_adam_decays_its_rate_as_pyro_tests_it(module: Any, lrd: float) -> None:
    loc, opt = param("loc"), module.ClippedAdam({"lr": 0.01, "lrd": lrd})
    for step in range(1, 5):
        opt({give(loc)})
        (group,) = opt.get_state()["loc"]["param_groups"]
        assert group["lr"] == 0.01 * lrd**step


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


@pytest.mark.parametrize("clip", [None, {"clip_norm": 1.0}], ids=["no clip", "norm"])
@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize("is_lazy", [False, True])
def test_a_complex_gradient_is_clipped_and_left_behind(
    is_lazy: bool, is_expanded: bool, clip: dict[str, Any] | None
) -> None:
    z = torch.zeros(2, dtype=torch.complex128, requires_grad=True)
    number = torch.tensor([3 + 4j if is_lazy else 3 - 4j], dtype=z.dtype)
    grad = number.expand(2) if is_expanded else number.repeat(2)
    # Pyro's own cannot clip a lazy one.
    z.grad = grad.conj() if is_lazy else grad
    optim.SGD({"lr": 1.0}, clip)([z])
    left = torch.full((2,), 3 - 4j, dtype=z.dtype) / (50**0.5 if clip else 1)
    assert z.grad is not None
    torch.testing.assert_close(z.grad.resolve_conj(), left, rtol=1e-6, atol=0)
    torch.testing.assert_close(z.detach(), -left, rtol=1e-6, atol=0)


@BOTH
def test_tensors_that_never_get_a_gradient_are_passed_over(module: Any) -> None:
    constant, loc = torch.zeros(2), give(param("loc"))
    opt = module.SGD({"lr": 1.0})
    for _ in range(2):
        opt([constant])
        opt([constant, loc])
    assert (constant.tolist(), loc.tolist()) == ([0.0, 0.0], [-2.0, -2.0])


@BOTH
def test_clip_settings_of_any_arguments(module: Any) -> None:
    asked = []

    def clip(*names: str) -> dict[str, Any]:
        asked.append(names)
        return {"clip_value": 0.5}

    module.SGD({"lr": 1.0}, clip)({give(param("loc"))})
    assert asked == [("loc", "loc")]


def test_truth_values_and_arrays_as_torch_takes_them() -> None:
    settings = {
        "lr": np.array(0.5),
        "betas": torch.tensor([0.5, 0.5]),
        "maximize": np.bool_(1),
        "amsgrad": False,
    }
    loc = give(param("loc"))
    optim.Adam(settings, {"clip_norm": torch.tensor(100.0)})({loc})
    np.testing.assert_allclose(loc.detach(), 0.5, rtol=1e-6)


@BOTH
def test_an_integer_for_a_switch(module: Any) -> None:
    loc = give(param("loc"))
    module.SGD({"lr": 0.5, "momentum": 0.9, "nesterov": 1, "maximize": 0})({loc})
    np.testing.assert_allclose(loc.detach(), -0.95)


def test_tensors_of_equal_settings_are_taken_in_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[dict[str, Any]] = []
    put = Registry.put
    monkeypatch.setattr(
        Registry, "put", lambda known, given: entered.append(given) or put(known, given)
    )
    opt = optim.Adam(lambda name: {"lr": 0.1})
    opt({give(param(name)) for name in "abc"})
    (entries,) = entered
    assert set(entries) == {"a", "b", "c"}
    assert len({id(entry.rule) for entry in entries.values()}) == 1


@BOTH
@pytest.mark.parametrize("clip", [{"clip_norm": 1.0}, {"clip_value": 0.5}])
@pytest.mark.parametrize("kind", ["one tensor", "a view of it", "a part of it", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_that_is_shared_is_clipped_once(
    module: Any, clip: dict[str, float], kind: str, dtype: torch.dtype
) -> None:
    a, b, c = (torch.zeros(3, dtype=dtype, requires_grad=True) for _ in range(3))
    shared = torch.full((4,), 5.0, dtype=dtype)
    grad = shared[:3]
    if kind == "expanded":
        grad = torch.full((1,), 5.0, dtype=dtype).expand(3)
        if module is pyro.optim:
            pytest.skip("torch writes through it")
    a.grad, b.grad, c.grad = grad, grad, torch.full((3,), 0.25, dtype=dtype)
    if kind == "a view of it":
        b.grad = grad.view(3)
    elif kind == "a part of it":
        b.grad = shared[1:]
    module.SGD({"lr": 1.0}, clip)([a, b, c])
    expected = 5.0 * 3**-0.5 / 5.0 if "clip_norm" in clip else 0.5
    if kind == "a part of it" and module is pyro.optim:
        # There the second norm is that of a gradient of which a part is clipped.
        assert a.tolist() == pytest.approx([-expected] * 3, rel=1e-2)
        return
    for tensor in (a, b):
        assert tensor.tolist() == pytest.approx([-expected] * 3, rel=1e-2)
        assert tensor.grad is not None
        assert tensor.grad.tolist() == pytest.approx([expected] * 3, rel=1e-2)
    assert c.tolist() == [-0.25] * 3


def test_gradients_that_are_shared_by_many_and_large_ones() -> None:
    tensors = [torch.zeros(300_000, requires_grad=True) for _ in range(3)]
    grad = torch.ones(300_000)
    for tensor in tensors:
        tensor.grad = grad
    optim.SGD({"lr": 1.0}, {"clip_value": 0.5})(tensors)
    for tensor in tensors:
        assert (tensor == -0.5).all()
    assert (grad == 0.5).all()
