"""State from and to whole optimizers of torch."""

import random
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt.adapters.torch.state import parameter_from_torch
from multiopt.adapters.torch_optim import from_torch, read, rules_of, to_torch
from multiopt.state.document import VERSION

#: Options for which an optimizer keeps all that it may keep, and some that are only torch's.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ASGD": [{"lr": 0.1, "lambd": 0.1, "t0": 2.0}, {"weight_decay": 0.1, "foreach": True}],
    "Adadelta": [{"lr": 0.5, "rho": 0.8, "maximize": True}],
    "Adafactor": [{"lr": 0.1}, {"lr": 0.1, "eps": (1e-20, 0.1), "weight_decay": 0.1}],
    "Adagrad": [{"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}, {"fused": True}],
    "Adam": [
        {"lr": 0.1},
        {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1},
        {"lr": 0.1, "amsgrad": True, "fused": True},
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "AdamW": [{"lr": 0.1, "amsgrad": True}, {"lr": 0.1, "fused": True}],
    "Adamax": [{"lr": 0.1, "weight_decay": 0.1}],
    "Muon": [{"lr": 0.01, "nesterov": False}],
    "NAdam": [{"lr": 0.1, "momentum_decay": 0.1, "decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.1, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.1, "momentum": 0.9, "centered": True}, {"lr": 0.1}],
    "Rprop": [{"lr": 0.1}],
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
}
CASES = [
    pytest.param(name, settings, id=f"{name}({settings})")
    for name, several in SETTINGS.items()
    for settings in several
]
#: The tolerances for strangers, of spec/arithmetic.md; torch's Muon works in bfloat16.
TOLERANCE: dict[Any, dict[str, Any]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
}
ROUNDED: dict[str, dict[str, Any]] = {"Muon": {"rtol": 0.0, "atol": 1e-2}}
#: What torch rounds to its default dtype at each step, and multiopt computes again.
COMPUTED = ("eta", "mu_product")
#: Groups of torch: the second has settings of its own, the last no parameters.
GROUPS = (("matrix", "unused"), ("late", "square"), ())
STEPS = 8


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """State is what is tested here, and every engine makes the same: no kernel need be compiled."""
    monkeypatch.setenv("MULTIOPT_ENGINE", "plain")


def start(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "matrix": (3, 2),
        "unused": (2, 2),
        "late": (4, 2),
        "square": (3, 3),
    }
    if name != "Muon":
        shapes |= {"unused": (), "late": (4,)}
    torch.manual_seed(0)
    return {k: torch.randn(v, dtype=dtype).requires_grad_() for k, v in shapes.items()}


def in_torch(name: str, settings: dict[str, Any], params: dict[str, torch.Tensor]) -> Any:
    """An optimizer of torch with several groups, which differ in the learning rate."""
    groups: list[dict[str, Any]] = [{"params": [params[n] for n in names]} for names in GROUPS]
    groups[1]["lr"] = 0.05
    return getattr(torch.optim, name)(groups, **settings)


def give(params: dict[str, torch.Tensor], step: int) -> None:
    """Gradients: never one for ``unused``, at first none for ``late``."""
    torch.manual_seed(step + 1)
    for name, param in params.items():
        grad = torch.randn_like(param)
        param.grad = None if name == "unused" or (name == "late" and step < 2) else grad


NAMES = [name for names in GROUPS for name in names]


@pytest.mark.parametrize("way", ["from torch", "to torch"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_going_on_in_the_other_library_equals_never_having_switched(
    name: str,
    settings: dict[str, Any],
    dtype: torch.dtype,
    way: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    # torch keeps some numbers in its default dtype, whatever that of the parameter.
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(dtype)
    whole, params = start(name, dtype), start(name, dtype)
    first = dict(params)
    never, theirs = in_torch(name, settings, whole), in_torch(name, settings, params)
    rules = rules_of(from_torch(theirs.state_dict(), getattr(torch.optim, name), NAMES))
    ours = mo.Optimizer(rules.__getitem__)
    for step in range(STEPS):
        give(whole, step)
        never.step()
        give(params, step)
        if step == STEPS // 2:
            if way == "from torch":
                torch.save(theirs.state_dict(), tmp_path / "run")
                state = from_torch(read(tmp_path / "run"), getattr(torch.optim, name), NAMES)
                ours = mo.Optimizer(rules_of(state).__getitem__)
                ours.load_state_dict(state)
            else:
                # Other rates, which the state dict replaces.
                theirs = in_torch(name, {**settings, "lr": 9.0}, params)
                ours.save(tmp_path / "ours")
                resumed = mo.Optimizer(rules.__getitem__)
                resumed.load(tmp_path / "ours")
                torch.save(to_torch(resumed.state_dict(), theirs, NAMES), tmp_path / "run")
                theirs.load_state_dict(torch.load(tmp_path / "run", weights_only=True))
        if (step < STEPS // 2) == (way == "from torch"):
            theirs.step()
        else:
            ours.step(params)
    assert params["late"] is first["late"]
    for key, param in whole.items():
        np.testing.assert_allclose(
            params[key].detach(),
            param.detach(),
            **ROUNDED.get(name, TOLERANCE[dtype]),
            err_msg=key,
        )


def takes(name: str, dtype: torch.dtype, settings: dict[str, Any]) -> bool:
    return not (dtype.is_complex and (name in ("Adafactor", "Muon") or settings.get("fused")))


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_from_torch_and_back_is_the_same_state_dict(
    name: str, settings: dict[str, Any], dtype: torch.dtype, steps: int, tmp_path: Path
) -> None:
    if not takes(name, dtype, settings):
        return
    params = start(name, dtype)
    theirs = in_torch(name, settings, params)
    for step in range(steps):
        give(params, step)
        theirs.step()
    state = from_torch(theirs.state_dict(), getattr(mo, name), NAMES)
    opt = mo.Optimizer(rules_of(state).__getitem__)
    opt.load_state_dict(state)
    opt.save(tmp_path / "run")
    opt.load(tmp_path / "run")
    assert opt.pending == tuple(NAMES)
    fresh = in_torch(name, settings, params)
    for group in fresh.param_groups[:2]:
        group["lr"] = 9.0
    back = to_torch(opt.state_dict(), fresh, NAMES)
    expected = theirs.state_dict()
    assert back["param_groups"] == expected["param_groups"]
    assert back["state"].keys() == expected["state"].keys()
    for number, values in expected["state"].items():
        found = {k: v for k, v in back["state"][number].items() if v is not None}
        values = {k: v for k, v in values.items() if v is not None}
        assert found.keys() == values.keys()
        for key, value in values.items():
            assert found[key].dtype == value.dtype
            if key in COMPUTED:
                torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)
            else:
                assert torch.equal(found[key], value), key
    # In the end torch has it.
    fresh.load_state_dict(back)


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view])
def test_slots_that_are_views_with_a_bit_are_what_they_show(view: Any, tmp_path: Path) -> None:
    z = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    theirs = torch.optim.SGD([("z", z)], lr=0.5, momentum=0.5)
    z.grad = torch.ones_like(z)
    theirs.step()
    buffer = view(torch.tensor([1 + 2j, 3 - 1j]))
    assert buffer.is_conj() or buffer.is_neg()
    theirs.state[z]["momentum_buffer"] = buffer
    torch.save(theirs.state_dict(), tmp_path / "run.pt")
    for state_dict in (theirs.state_dict(), read(tmp_path / "run.pt")):
        state = from_torch(state_dict, torch.optim.SGD)
        assert state["entries"]["z"]["slots"]["momentum_buffer"].tolist() == buffer.tolist()


def sgd(**settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """One of torch after one step of two parameters in one group."""
    params = {"a": torch.zeros(2, requires_grad=True), "b": torch.zeros(3, requires_grad=True)}
    opt = torch.optim.SGD(params.items(), **{"lr": 0.5, "momentum": 0.5, **settings})
    for param in params.values():
        param.grad = torch.ones_like(param)
    opt.step()
    return opt, params


def test_names_are_those_that_torch_keeps_unless_others_are_given() -> None:
    theirs, _ = sgd()
    assert list(from_torch(theirs.state_dict(), torch.optim.SGD)["entries"]) == ["a", "b"]
    state = from_torch(theirs.state_dict(), torch.optim.SGD, iter(["x", "y"]))
    assert list(state["entries"]) == ["x", "y"]
    assert list(to_torch(state, theirs, ["x", "y"])["state"]) == [0, 1]
    with pytest.raises(
        ValueError, match=r"state of \['x', 'y'\]; expected .* which has \['a', 'b'"
    ):
        to_torch(state, theirs)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a"], ValueError, r"expected 2 names, one for each .* got 1: \['a'\]"),
        (["a", "b", "c"], ValueError, r"expected 2 names, .* got 3"),
        (["a", "a"], ValueError, r"name of its own; got \['a'\] twice"),
        ("ab", TypeError, "expected a list of names, which are strings; got 'ab'"),
        ([("a", 1), ("b", 2)], TypeError, "expected a list of names, which are strings"),
        (None, ValueError, r"torch has no names .* expected names=\[...\], or an optimizer"),
    ],
)
def test_names_must_be_one_for_each_parameter(names: Any, error: Any, message: str) -> None:
    theirs, params = sgd()
    state = from_torch(theirs.state_dict(), torch.optim.SGD)
    nameless = torch.optim.SGD(params.values())
    with pytest.raises(error, match=message):
        from_torch(nameless.state_dict(), torch.optim.SGD, names)
    with pytest.raises(error, match=message):
        to_torch(state, nameless, names)


class Homemade(torch.optim.SGD):
    pass


NAMESAKE = type("SGD", (torch.optim.SGD,), {})


@pytest.mark.parametrize(
    "given",
    [
        *(torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Optimizer, Homemade),
        NAMESAKE,
        *(mo.Lion, mo.Rule, "SGD", None),
    ],
)
def test_an_optimizer_without_a_rule_is_refused(given: Any) -> None:
    theirs, _ = sgd()
    with pytest.raises(TypeError, match="expected the class of an optimizer of torch or Pyro that"):
        from_torch(theirs.state_dict(), given)


def test_there_is_no_way_to_an_optimizer_without_a_rule() -> None:
    theirs, params = sgd()
    state = from_torch(theirs.state_dict(), torch.optim.SGD)
    for odd in (
        torch.optim.LBFGS(params.items()),
        Homemade(params.items()),
        NAMESAKE(params.items()),
    ):
        with pytest.raises(TypeError, match="expected the class of an optimizer of torch or Pyro"):
            to_torch(state, odd)


@pytest.mark.parametrize("other", sorted(SETTINGS))
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_state_of_another_optimizer_is_refused(name: str, other: str) -> None:
    if {name, other} <= {"Adam", "AdamW"}:
        return
    params = start("Muon", torch.float32)
    theirs = getattr(torch.optim, name)(params.values())
    give(params, 5)
    theirs.step()
    state = theirs.state_dict()
    if name == other:
        from_torch(state, getattr(torch.optim, other), NAMES)
    else:
        with pytest.raises(mo.CheckpointError, match=r"'matrix'"):
            from_torch(state, getattr(torch.optim, other), NAMES)
        ours = from_torch(state, getattr(torch.optim, name), NAMES)
        with pytest.raises(ValueError, match=rf"'matrix' is that of the rule '{name}'; expected "):
            to_torch(ours, getattr(torch.optim, other)(params.values()), NAMES)


def test_adam_with_decoupled_decay_is_adamw() -> None:
    w = torch.ones(2, requires_grad=True)
    theirs = torch.optim.Adam([w], weight_decay=0.5, decoupled_weight_decay=True)
    state = from_torch(theirs.state_dict(), torch.optim.Adam, ["w"])
    assert rules_of(state) == {"w": mo.Adam(weight_decay=0.5, decoupled_weight_decay=True)}
    adamw = torch.optim.AdamW([w], weight_decay=0.5)
    of_adamw = from_torch(adamw.state_dict(), torch.optim.AdamW, ["w"])
    assert rules_of(of_adamw) == {"w": mo.AdamW(weight_decay=0.5)}
    # State of before Adam had the option.
    older = from_torch(torch.optim.Adam([w], weight_decay=0.5).state_dict(), mo.Adam, ["w"])
    del older["entries"]["w"]["rule"]["decoupled_weight_decay"]
    for found, decoupled in ((state, True), (of_adamw, True), (older, False)):
        for other in (torch.optim.Adam([w]), torch.optim.AdamW([w]))[: 1 + decoupled]:
            (group,) = to_torch(found, other, ["w"])["param_groups"]
            assert (group["weight_decay"], group["decoupled_weight_decay"]) == (0.5, decoupled)
    plain = from_torch(torch.optim.Adam([w]).state_dict(), torch.optim.Adam, ["w"])
    with pytest.raises(ValueError, match="'w' is that of the rule 'Adam'; expected AdamW"):
        to_torch(plain, torch.optim.AdamW([w]), ["w"])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def broken(change: Any) -> Any:
    state = sgd()[0].state_dict()
    changed = change(state)
    return state if changed is None else changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [1], "expected the state dict of a torch optimizer, .* got a list"),
        (lambda s: {"model": {}, "optimizer": s}, r"got the keys \['model', 'optimizer'\]"),
        (lambda s: s.update(state=3), "expected the state dict of a torch optimizer"),
        (lambda s: s["param_groups"].append(3), "list of numbers under 'params'; got 3"),
        (
            lambda s: s["param_groups"][0].update(params=["a", "b"]),
            "list of numbers under 'params'",
        ),
        (lambda s: s["param_groups"][0].update(params=[1, 1]), r"parameter once .* got \[1, 1\]"),
        (lambda s: s["state"].update({7: {}}), r"state of \[7\]; expected numbers of \[0, 1\]"),
        (lambda s: s["state"].update({1: 3}), "'b' is not a state of SGD"),
        (lambda s: s["state"][1].update(step=torch.tensor(-1.0)), "'b' .* a step >= 0; got -1"),
        (
            lambda s: s["state"][1].update(step=torch.tensor(float("nan"))),
            "'b' is not a state of SGD",
        ),
        (
            lambda s: s["state"][1].update(step=torch.tensor(float("inf"))),
            "'b' is not a state of SGD",
        ),
        (
            lambda s: s["state"][1].update(momentum_buffer="x"),
            "'b' is not a state of SGD .*expected a tensor under 'momentum_buffer'; got a str",
        ),
        (
            lambda s: s["state"][1].update(momentum_buffer=np.ones(2)),
            "expected a tensor under 'momentum_buffer'; got a ndarray",
        ),
        (
            lambda s: s["state"][1].update(momentum_buffer=torch.ones(2).to_sparse()),
            "'b' is not a state of SGD",
        ),
        (
            lambda s: s["state"][1].update(momentum_buffer=torch.ones(2, device="meta")),
            "'b' is not a state of SGD",
        ),
        (
            lambda s: s["param_groups"][0].update(lr=float("nan")),
            "'a' .* SGD: lr must be a finite number",
        ),
        (
            lambda s: s["param_groups"][0].update(nesterov=float("nan")),
            "'a' .* SGD: nesterov must be",
        ),
        (
            lambda s: s["state"][1].update(momentum_buffer=torch.ones(2, dtype=torch.int8)),
            "'b' is not a state of SGD",
        ),
        (
            lambda s: s["state"][1].update(more=torch.ones(2, dtype=torch.complex64)),
            "'b' is not a state of SGD",
        ),
        (lambda s: s["param_groups"][0].update(lr=nested(100_000)), "'a' is not a state of SGD"),
        (lambda s: s["state"][1].update(more=torch.ones(2)), r"'b' has the slots \['mom.*'more'\]"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "'a' .* SGD: lr must be a finite number"),
        (
            lambda s: s["param_groups"][0].update(lr="fast"),
            "'a' .* SGD: lr must be a finite number",
        ),
        (lambda s: s["param_groups"][0].update(nesterov=3), "'a' .* SGD: nesterov must be"),
        (lambda s: s["param_groups"][0].__delitem__("momentum"), r"none for \['momentum'\]"),
        (lambda s: s["param_groups"][0].update(betas=(0.9, 0.9)), r"got \['betas'\] besides"),
    ],
)
def test_a_state_dict_of_another_form_is_refused(change: Any, message: str) -> None:
    with pytest.raises(mo.CheckpointError, match=message):
        from_torch(broken(change), torch.optim.SGD, ["a", "b"])


COUNTING = sorted(SETTINGS.keys() - {"SGD", "Muon"})
#: What is no number of steps.
NO_CLOCKS: list[Any] = [
    *(1.5, -1, -1.0, float("nan"), float("inf"), 2.0**54, True, "3", None, [3], {}, 1 + 0j),
    *(np.float64(0.5), np.array([1, 2]), np.bool_(True), np.array("3")),
    *(torch.tensor(2.5), torch.tensor(float("nan")), torch.tensor(-float("inf"))),
    *(
        torch.tensor([1.0, 2.0]),
        torch.tensor([]),
        torch.tensor(True),
        torch.ones((), device="meta"),
    ),
]


def of_one(name: str, steps: int = 5) -> tuple[dict[str, Any], Any, torch.Tensor]:
    """The state dict of an optimizer of torch of one matrix, that optimizer, and the matrix."""
    w = torch.ones((2, 2), requires_grad=True)
    theirs = getattr(torch.optim, name)([("w", w)], **SETTINGS[name][-1])
    for _ in range(steps):
        w.grad = torch.ones_like(w)
        theirs.step()
    return theirs.state_dict(), theirs, w


@pytest.mark.parametrize("name", COUNTING)
def test_state_without_a_clock_is_refused_as_in_torch(name: str) -> None:
    state, theirs, _ = of_one(name)
    del state["state"][0]["step"]
    with pytest.raises(mo.CheckpointError, match=r"'w' .* under 'step', .*; got none, beside \["):
        from_torch(state, type(theirs))
    with pytest.raises(KeyError):
        theirs.load_state_dict(state)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
@pytest.mark.parametrize("clock", NO_CLOCKS, ids=repr)
def test_a_clock_is_a_whole_number(name: str, clock: Any) -> None:
    state, theirs, _ = of_one(name)
    state["state"][0]["step"] = clock
    if name == "SGD" and clock is None:
        assert from_torch(state, type(theirs))["entries"]["w"]["step"] == 1
        return
    with pytest.raises(mo.CheckpointError, match="the state of 'w' is not a state"):
        from_torch(state, type(theirs))


@pytest.mark.parametrize(
    "clock", [3, 3.0, np.int32(3), np.float64(3), np.array(3), torch.tensor(3), torch.ones(1) * 3]
)
def test_a_clock_may_be_any_number_that_is_whole(clock: Any) -> None:
    for name in ("Adam", "SGD"):
        state, theirs, _ = of_one(name)
        state["state"][0]["step"] = clock
        assert from_torch(state, type(theirs))["entries"]["w"]["step"] == 3


@pytest.mark.parametrize("name", ["Muon", "SGD"])
def test_torch_counts_no_steps_of_some(name: str) -> None:
    for steps in (0, 5):
        state, theirs, _ = of_one(name, steps)
        assert from_torch(state, type(theirs))["entries"]["w"]["step"] == min(steps, 1)


def test_the_state_of_two_parameters_is_not_that_of_one() -> None:
    state = sgd()[0].state_dict()
    for odd in (state, {**state, "param_groups": [{**state["param_groups"][0], "params": [1]}]}):
        with pytest.raises(mo.CheckpointError, match="expected the state of one parameter; got a"):
            parameter_from_torch("a", mo.SGD, odd)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", COUNTING)
def test_clocks_and_the_like_have_the_dtype_that_torch_gives_them(
    name: str, default: torch.dtype, request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(partial(torch.set_default_dtype, torch.get_default_dtype()))
    state, theirs, _ = of_one(name)
    ours = from_torch(state, type(theirs))
    ours["entries"]["w"]["step"] = 70_001
    torch.set_default_dtype(default)
    expected = of_one(name, 1)[0]["state"][0]
    found = to_torch(ours, theirs)["state"][0]
    assert found["step"] == 70_001
    for key in ("step", *COMPUTED, "mu"):
        if key in expected and not theirs.param_groups[0].get("fused"):
            assert found[key].dtype == expected[key].dtype, key


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", COUNTING)
def test_a_clock_that_float32_has_not_is_not_rounded(name: str, foreach: bool) -> None:
    """And torch goes on counting, beside a parameter with a short clock."""
    step = 2**24 + 1
    params = {n: torch.ones((2, 2), requires_grad=True) for n in ("long", "short")}
    theirs = getattr(torch.optim, name)(params.items(), lr=0.1, foreach=foreach)
    for number in range(2):
        for w in params.values():
            w.grad = torch.ones_like(w)
        theirs.step()
        if number == 0:
            state = from_torch(theirs.state_dict(), type(theirs))
            state["entries"]["long"]["step"] = step
            theirs.load_state_dict(to_torch(state, theirs))
    state = from_torch(theirs.state_dict(), type(theirs))
    assert [entry["step"] for entry in state["entries"].values()] == [step + 1, 2]


def test_a_long_clock_costs_nothing() -> None:
    w = torch.ones(2, requires_grad=True)
    theirs = torch.optim.NAdam([("w", w)])
    w.grad = torch.ones(2)
    theirs.step()
    saved = theirs.state_dict()
    saved["state"][0]["step"] = torch.tensor(1e15)
    state = to_torch(from_torch(saved, torch.optim.NAdam), theirs)["state"][0]
    assert (state["step"], state["mu_product"]) == (1e15, 0.0)


def test_settings_may_be_tensors_in_torch() -> None:
    w = torch.ones(2, requires_grad=True)
    betas = (torch.tensor(0.5), torch.tensor([0.25]).squeeze())
    for lr in (torch.tensor(0.125), torch.tensor([0.125])):
        theirs = torch.optim.Adam([("w", w)], lr=lr, betas=betas, foreach=False)
        state = from_torch(theirs.state_dict(), torch.optim.Adam)
        assert rules_of(state) == {"w": mo.Adam(lr=0.125, betas=(0.5, 0.25))}
        (group,) = to_torch(state, theirs)["param_groups"]
        assert (group["lr"], group["betas"]) == (0.125, (0.5, 0.25))


@pytest.mark.parametrize("value", [0, 1, np.True_, torch.tensor(False)])
@pytest.mark.parametrize(
    ("name", "switch"),
    [
        *[("Adam", "amsgrad"), ("AdamW", "amsgrad"), ("Adam", "maximize"), ("Muon", "nesterov")],
        *[("NAdam", "decoupled_weight_decay"), ("RMSprop", "centered"), ("SGD", "maximize")],
    ],
)
def test_switches_may_be_numbers_in_torch(name: str, switch: str, value: Any) -> None:
    w = torch.ones((2, 2), requires_grad=True)
    theirs = getattr(torch.optim, name)([("w", w)], lr=1e-3, **{switch: value})
    state = from_torch(theirs.state_dict(), getattr(torch.optim, name))
    assert rules_of(state) == {"w": getattr(mo, name)(**{"lr": 1e-3, switch: bool(value)})}
    (group,) = to_torch(state, theirs)["param_groups"]
    assert group[switch] is bool(value)


def test_older_versions_of_torch_have_fewer_settings() -> None:
    state = torch.optim.Adam([torch.ones(2, requires_grad=True)]).state_dict()
    for name in ("maximize", "decoupled_weight_decay", "foreach", "fused", "differentiable"):
        del state["param_groups"][0][name]
    assert rules_of(from_torch(state, torch.optim.Adam, ["w"])) == {"w": mo.Adam()}


def test_what_multiopt_does_not_know_stays_in_torch() -> None:
    a, b, c = (torch.zeros(2, requires_grad=True) for _ in range(3))
    groups: list[dict[str, Any]] = [{"params": [a, b], "role": "body"}, {"params": [c], "lr": 0.25}]
    theirs = torch.optim.Adam(groups, lr=0.5, fused=True)
    torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=[1.0, 2.0], total_steps=10)
    for tensor in (b, c):
        tensor.grad = torch.ones(2)
    theirs.step()
    before = theirs.state_dict()
    opt = mo.Optimizer(mo.Adam(lr=0.125))
    for _ in range(3):
        opt.step({"a": torch.zeros(2)}, {"a": torch.full((2,), 2.0)})
    after = to_torch(opt.state_dict(), theirs, ["a", "b", "c"])
    body, head = after["param_groups"]
    assert body == before["param_groups"][0] | {"lr": 0.125, "betas": (0.9, 0.999)}
    assert (body["role"], body["fused"], "max_lr" in body) == ("body", True, True)
    assert head == before["param_groups"][1]
    assert after["state"][0]["step"] == 3
    for number in (1, 2):
        for key, value in before["state"][number].items():
            assert torch.equal(after["state"][number][key], value)
            assert after["state"][number][key] is not value
    # Nothing of the torch optimizer was changed.
    assert list(theirs.state_dict()["state"]) == [1, 2]
    theirs.load_state_dict(after)
    theirs.step()


def test_names_of_one_group_must_have_one_setting() -> None:
    opt = mo.Optimizer(lambda name: mo.SGD(lr=0.5 if name == "a" else 0.25))
    params = {name: torch.zeros(2) for name in "ab"}
    opt.step(params, {name: torch.ones(2) for name in "ab"})
    tensors = [x.requires_grad_() for x in params.values()]
    with pytest.raises(ValueError, match=r"'a' and 'b' are in one group .* have lr=0.5 and 0.25"):
        to_torch(opt.state_dict(), torch.optim.SGD(tensors), ["a", "b"])
    groups = torch.optim.SGD([{"params": [x]} for x in tensors])
    first, second = to_torch(opt.state_dict(), groups, ["a", "b"])["param_groups"]
    assert (first["lr"], second["lr"]) == (0.5, 0.25)


def test_a_schedule_becomes_the_number_that_it_gave_last() -> None:
    opt = mo.Optimizer(mo.SGD(lr=lambda step: 1.0 / step))
    w = torch.zeros(2, requires_grad=True)
    for _ in range(4):
        opt.step({"w": w}, {"w": torch.ones(2)})
    assert rules_of(opt.state_dict()) == {"w": mo.SGD(lr=0.25)}
    (group,) = to_torch(opt.state_dict(), torch.optim.SGD([w]), ["w"])["param_groups"]
    assert group["lr"] == 0.25


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (mo.Adam(amsgrad="corrected"), "'w' has amsgrad='corrected', which torch does not have"),
        *(
            (rule(decoupled_weight_decay=True), "'w' has decoupled_weight_decay=True, which torch")
            for rule in (mo.SGD, mo.Adamax, mo.Adagrad, mo.Adadelta, mo.RMSprop)
        ),
        (mo.AdaBelief(), "'w' is that of the rule 'AdaBelief'; expected Adam"),
        (mo.SGD(lr=lambda step: 1.0 if step == 1 else -1.0), "'w': SGD: lr must be"),
    ],
)
def test_a_rule_that_torch_does_not_have_is_refused(rule: mo.Rule, message: str) -> None:
    opt, w = mo.Optimizer(rule), torch.zeros(2, requires_grad=True)
    opt.step({"w": w}, {"w": torch.ones(2)})
    state = opt.state_dict()
    if callable(rule.lr):  # type: ignore[attr-defined]
        state["entries"]["w"]["rule"]["lr"] = None  # as of a schedule that fails
    with pytest.raises(ValueError, match=message):
        to_torch(state, torch.optim.Adam([w]), ["w"])


@pytest.mark.parametrize(
    "words", [{"name": "adam"}, {"name": "Rule"}, {}, {"name": "Mine"}, {"name": ["Adam"]}]
)
def test_a_rule_that_is_not_multiopts_is_refused(words: dict[str, Any]) -> None:
    entry = {"rule": words, "step": 0, "slots": {}}
    state = {"version": VERSION, "entries": {"w": entry}, "pending": {}}
    with pytest.raises(ValueError, match=r"'w' has the rule .*; expected one of multiopt's"):
        rules_of(state)


def test_names_with_equal_settings_share_a_rule() -> None:
    rules = rules_of(from_torch(sgd()[0].state_dict(), torch.optim.SGD))
    assert rules["a"] is rules["b"]


def test_a_shape_of_another_parameter_is_refused() -> None:
    state = from_torch(sgd()[0].state_dict(), torch.optim.SGD)
    params = [torch.zeros(2, requires_grad=True), torch.zeros((3, 1), requires_grad=True)]
    with pytest.raises(ValueError, match=r"'momentum_buffer' of parameter 'b' has shape \(3,\)"):
        to_torch(state, torch.optim.SGD(params, momentum=0.5), ["a", "b"])
    matrix = torch.ones((2, 2), requires_grad=True)
    muon = torch.optim.Muon([("w", matrix)])
    matrix.grad = torch.ones((2, 2))
    muon.step()
    state = from_torch(muon.state_dict(), torch.optim.Muon)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of parameter 'w' has shape \(2, 2\)"):
        to_torch(state, torch.optim.Muon([("w", torch.ones((4, 1), requires_grad=True))]))
    state["entries"]["w"]["slots"] = {}
    with pytest.raises(ValueError, match="parameter 'w' has the slots"):
        to_torch(state, muon)


def test_averages_and_masters_are_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", "blocks")
    w = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    v = torch.zeros(2, requires_grad=True)
    opt = mo.Optimizer(
        mo.Adam(), master_weights=True, average=lambda name: mo.Average() if name == "v" else None
    )
    opt.step({"w": w, "v": v}, {"w": torch.ones_like(w), "v": torch.ones_like(v)})
    theirs = torch.optim.Adam([w, v])
    with pytest.warns(UserWarning, match=r"averages and master copies, of \['v', 'w'\]") as caught:
        state = to_torch(opt.state_dict(), theirs, ["w", "v"])
    assert caught[0].filename == __file__
    assert [sorted(values) for values in state["state"].values()] == [
        ["exp_avg", "exp_avg_sq", "step"]
    ] * 2


def test_counts_of_skips_are_left_out_with_a_warning() -> None:
    w = torch.zeros(2, requires_grad=True)
    opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
    opt.step({"w": w}, {"w": torch.full((2,), torch.nan)})
    with pytest.warns(UserWarning, match=r"left out counts of skips, of \['w'\]: torch") as caught:
        to_torch(opt.state_dict(), torch.optim.SGD([w]), ["w"])
    assert caught[0].filename == __file__


def test_arrays_of_any_library_go_to_torch() -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.5))
    opt.step({"w": np.zeros(2)}, {"w": np.array([1.0, -2.0])})
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    theirs = torch.optim.Adam([w])
    theirs.load_state_dict(to_torch(opt.state_dict(), theirs, ["w"]))
    state = theirs.state_dict()["state"][0]
    np.testing.assert_array_equal(state["exp_avg"], opt.state("w").slots["exp_avg"])
    assert state["step"] == 1


def test_the_results_are_copies() -> None:
    theirs, params = sgd()
    state = from_torch(theirs.state_dict(), torch.optim.SGD)
    buffer = theirs.state[params["a"]]["momentum_buffer"]
    buffer.fill_(7.0)
    assert state["entries"]["a"]["slots"]["momentum_buffer"].tolist() == [1.0, 1.0]
    back = to_torch(state, theirs)
    back["state"][0]["momentum_buffer"].fill_(9.0)
    back["param_groups"][0]["lr"] = 9.0
    assert state["entries"]["a"]["slots"]["momentum_buffer"].tolist() == [1.0, 1.0]
    assert (buffer.tolist(), theirs.param_groups[0]["lr"]) == ([7.0, 7.0], 0.5)


# Files


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return self.mark.mkdir, ()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    state = sgd()[0].state_dict()
    path = tmp_path / "run.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert read(path)["param_groups"] == state["param_groups"]
    state["param_groups"][0]["lr"] = Trap(tmp_path / "the trap ran")
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(mo.CheckpointError, match=r"run.pt: expected a checkpoint that torch.load"):
        read(path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize(
    "odd",
    [np.array([1, "a"], object), np.zeros(2, [("a", "i4"), ("b", "O")]), len, sgd],
)
def test_objects_beside_the_state_are_refused(tmp_path: Path, odd: Any) -> None:
    torch.save({"odd": odd}, tmp_path / "run.pt")
    with pytest.raises(
        mo.CheckpointError, match=r"one that needs \S+, which is neither\. Nothing was run: save"
    ):
        read(tmp_path / "run.pt")


def test_numpy_numbers_and_arrays_of_them_may_be_beside_the_state(tmp_path: Path) -> None:
    codes = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]
    kept = {code: np.ones((), code)[()] for code in codes}
    arrays = {code: np.arange(6).astype(code).reshape(2, 3) for code in codes}
    odd = [np.empty((0, 3)), np.array(2.0), np.ones((3, 2)).T, np.arange(3, dtype=">i4")]
    torch.save([kept, arrays, odd], tmp_path / "run.pt")
    kept_back, arrays_back, odd_back = read(tmp_path / "run.pt")
    pairs = [(kept_back[code], kept[code]) for code in codes]
    pairs += [(arrays_back[code], arrays[code]) for code in codes]
    for found, given in [*pairs, *zip(odd_back, odd, strict=True)]:
        assert isinstance(found, np.ndarray) == isinstance(given, np.ndarray)
        assert (found.dtype, found.shape) == (given.dtype.newbyteorder("="), given.shape)
        assert np.array_equal(found, given)


class Allowed:
    """Of a user, who has allowed it, and what torch says NumPy numbers need."""


@pytest.fixture
def allowances() -> Iterator[list[Any]]:
    allowed: list[Any] = [
        *(Allowed, np.dtype, np.ndarray, np.dtypes.Float64DType, np.float64().__reduce__()[0]),
        (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    ]
    with torch.serialization.safe_globals(allowed):
        yield torch.serialization.get_safe_globals()


def test_what_users_allow_is_allowed_before_and_after(
    tmp_path: Path, allowances: list[Any]
) -> None:
    torch.save([Allowed(), np.arange(3), np.float64(2.0)], tmp_path / "run.pt")
    for _ in range(3):
        own, array, number = read(tmp_path / "run.pt")
        assert (type(own), array.tolist(), number) == (Allowed, [0, 1, 2], 2.0)
        assert set(torch.serialization.get_safe_globals()) == set(allowances)


def test_arrays_may_be_anywhere_and_twice(tmp_path: Path) -> None:
    array = np.arange(3.0)
    shared = [array, (1, (array, "text"))]
    torch.save({"a": shared, "b": OrderedDict(c=shared), "d": {4, 5}}, tmp_path / "run.pt")
    found = read(tmp_path / "run.pt")
    assert found["a"] is found["b"]["c"]
    assert found["a"][0] is found["a"][1][1][0]
    assert found["a"][0].tolist() == [0.0, 1.0, 2.0]
    assert found["a"][0].flags.writeable
    assert (found["a"][1][1][1], found["d"]) == ("text", {4, 5})


def test_numbers_of_numpy_1_are_read(tmp_path: Path) -> None:
    torch.save([np.arange(3), np.float32(0.5)], tmp_path / "new", pickle_protocol=2)
    with zipfile.ZipFile(tmp_path / "new") as new, zipfile.ZipFile(tmp_path / "old", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    array, number = read(tmp_path / "old")
    assert (array.tolist(), number, number.dtype) == ([0, 1, 2], 0.5, np.float32)


def test_what_cannot_be_read_is_said_in_our_words(tmp_path: Path) -> None:
    opt = mo.Optimizer(mo.SGD())
    opt.step({"w": np.zeros(2)}, {"w": np.ones(2)})
    opt.save(tmp_path / "ours")
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "model")
    (tmp_path / "text").write_text("nothing of torch")
    for name, message in {
        "ours": "got a file of safetensors: if multiopt wrote it, use Optimizer.load",
        "model": "got one that needs torch.nn.modules.linear.Linear, which is neither",
        "text": "it is damaged, or of another kind",
    }.items():
        with pytest.raises(mo.CheckpointError, match=f"{name}: expected .*{message}") as caught:
            read(tmp_path / name)
        # Neither here nor in what the traceback shows does torch advise to run the code.
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        for words in ("weights_only` set to", "False", "allowlist", "safe_globals"):
            assert words not in str(caught.value)


def test_damaged_arrays_are_a_checkpoint_error_or_arrays(tmp_path: Path) -> None:
    path, drawn = tmp_path / "run.pt", random.Random(0)
    kept = [np.arange(3, dtype=dtype) for dtype in ("f4", "i8", "u1")]
    torch.save([kept, np.int64(3)], path, _use_new_zipfile_serialization=False)
    whole, refused = path.read_bytes(), 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for place in drawn.sample(range(len(damaged)), 2):
            damaged[place] = drawn.randrange(256)
        path.write_bytes(damaged)
        try:
            repr(read(path))
        except mo.CheckpointError:
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_a_checkpoint_error_or_a_state(tmp_path: Path, zipped: bool) -> None:
    path, drawn = tmp_path / "run.pt", random.Random(0)
    torch.save(sgd()[0].state_dict(), path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        damaged = bytearray(whole[: drawn.randrange(len(whole))] if drawn.random() < 0.2 else whole)
        for place in drawn.sample(range(len(damaged)), min(2, len(damaged))):
            damaged[place] = drawn.randrange(256)
        path.write_bytes(damaged)
        try:
            from_torch(read(path), torch.optim.SGD, ["a", "b"])
        except mo.CheckpointError:
            refused += 1
    assert refused > 50


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")
