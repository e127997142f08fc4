"""State dicts: into torch's classes and back, by position and by name, saved and malformed."""

import copy
import io
from typing import Any

import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.optim_db import CLASSES
from tests.hosts.torch.training import (
    OPTIONS,
    Pair,
    assert_close,
    default_dtype,
    give,
    parameters,
    same,
)

CASES = [
    pytest.param(name, settings, id=f"{name}{number or ''}")
    for name, several in OPTIONS.items()
    for number, settings in enumerate(several)
]
#: Torch's classes that do not count steps.
CLOCKLESS = ("SGD", "Muon")


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict after it was saved and loaded."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(params: list[torch.nn.Parameter], optimizer: Any, first: int, count: int) -> None:
    for step in range(first, first + count):
        give(params, step)
        optimizer.step()


def copied(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def test_every_class_has_a_case() -> None:
    assert set(OPTIONS) == set(CLASSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_checkpoint_goes_on_at_the_same_bits(
    name: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    whole = parameters(name, dtype)
    ours = getattr(optim, name)(whole, **settings)
    steps(whole, ours, 0, 3)
    resumed = copied(whole)
    other = getattr(optim, name)(resumed)
    other.load_state_dict(saved(ours.state_dict()))
    for params, optimizer in ((whole, ours), (resumed, other)):
        steps(params, optimizer, 3, 3)
    assert same(whole, resumed)
    assert ours.param_groups[0] == {**other.param_groups[0], "params": whole}


@pytest.mark.parametrize("way", ["into torch", "from torch", "there and back"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_state_goes_into_torchs_class_and_back(
    name: str, settings: dict[str, Any], way: str
) -> None:
    never, params = parameters(name), parameters(name)
    torchs = getattr(torch.optim, name)(never, **settings)
    first, second = (optim, torch.optim) if way == "into torch" else (torch.optim, optim)
    one = getattr(first, name)(params, **settings)
    with default_dtype(torch.float64):
        steps(never, torchs, 0, 3)
        steps(params, one, 0, 3)
        state = saved(one.state_dict())
        two = getattr(second, name)(params)
        two.load_state_dict(state)
        steps(never, torchs, 3, 3)
        steps(params, two, 3, 3)
        if way == "there and back":
            back = getattr(first, name)(params)
            back.load_state_dict(saved(two.state_dict()))
            steps(never, torchs, 6, 3)
            steps(params, back, 6, 3)
    assert_close(name, params, never)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_state_has_torchs_names_shapes_and_dtypes(name: str, settings: dict[str, Any]) -> None:
    pair = Pair(name, settings, dtype=torch.float32)
    pair.step(2)
    ours, theirs = pair.ours.state_dict(), pair.peer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, its in theirs["state"].items():
        mine = ours["state"][number]
        more = {"step"} if name in CLOCKLESS else set()
        its = {key: value for key, value in its.items() if value is not None}
        assert set(mine) - more == set(its)
        for key, value in its.items():
            assert (mine[key].shape, mine[key].dtype) == (value.shape, value.dtype), key
            if name != "Muon":
                torch.testing.assert_close(mine[key], value)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_state_before_the_first_step_takes_none(name: str, settings: dict[str, Any]) -> None:
    whole, params = parameters(name), parameters(name)
    one, other = (getattr(optim, name)(some, **settings) for some in (whole, params))
    with default_dtype(torch.float64):
        state = saved(other.state_dict())
    assert list(state["state"]) == list(range(len(params)))
    for number, values in state["state"].items():
        assert values["step"] == 0
        slots = [x for key, x in values.items() if x.shape == params[number].shape and x.ndim]
        assert slots or name in ("Adafactor", "SGD") or not params[number].ndim
    assert same(whole, params)
    third = getattr(optim, name)(params)
    third.load_state_dict(state)
    steps(whole, one, 0, 3)
    steps(params, third, 0, 3)
    assert same(whole, params)
    # And torch's class begins with it too; its momentum is no mean before there is one.
    if not settings.get("dampening"):
        never, params = parameters(name), parameters(name)
        with default_dtype(torch.float64):
            theirs = getattr(torch.optim, name)(params, **settings)
            theirs.load_state_dict(state)
            peer = getattr(torch.optim, name)(never, **settings)
            steps(params, theirs, 0, 3)
            steps(never, peer, 0, 3)
        assert_close(name, params, never)


def named(seed: int = 0) -> dict[str, torch.nn.Parameter]:
    return dict(zip(("matrix", "vector", "number"), parameters("Adam", seed=seed), strict=True))


def give_by_name(params: dict[str, torch.nn.Parameter], step: int) -> None:
    for number, name in enumerate(("matrix", "vector", "number")):
        if name in params:
            give([params[name]], 10 * step + number)


def test_state_is_found_by_name_in_any_order_and_any_groups() -> None:
    whole = named()
    adam = optim.Adam(whole.items(), lr=0.1)
    for step in range(3):
        give_by_name(whole, step)
        adam.step()
    resumed = {n: torch.nn.Parameter(p.detach().clone()) for n, p in reversed(whole.items())}
    other = optim.Adam(resumed.items())
    other.load_state_dict(saved(adam.state_dict()))
    assert other.param_groups[0]["param_names"] == ["number", "vector", "matrix"]
    for step in range(3, 6):
        for params, optimizer in ((whole, adam), (resumed, other)):
            give_by_name(params, step)
            optimizer.step()
    assert same(list(whole.values()), list(reversed(resumed.values())))


@pytest.mark.parametrize("named_side", ["saved", "loading"])
def test_names_on_one_side_only_are_no_names(named_side: str) -> None:
    whole, resumed = parameters("Adam"), parameters("Adam")
    names = ("a", "b", "c")
    first = zip(names, whole, strict=True) if named_side == "saved" else whole
    second = zip(names, resumed, strict=True) if named_side == "loading" else resumed
    adam, other = optim.Adam(first), optim.Adam(second)
    steps(whole, adam, 0, 3)
    with torch.no_grad():
        for a, b in zip(resumed, whole, strict=True):
            a.copy_(b)
    other.load_state_dict(saved(adam.state_dict()))
    for params, optimizer in ((whole, adam), (resumed, other)):
        steps(params, optimizer, 3, 3)
    assert same(whole, resumed)
    # As in torch, groups without names take those of the state dict.
    assert list(other.param_groups[0]["param_names"]) == list(names)


def test_state_waits_for_a_name_that_comes_later() -> None:
    whole = named()
    adam = optim.Adam(whole.items(), lr=0.1)
    for step in range(3):
        give_by_name(whole, step)
        adam.step()
    state = saved(adam.state_dict())
    resumed = {n: torch.nn.Parameter(p.detach().clone()) for n, p in whole.items()}
    other = optim.Adam([("matrix", resumed["matrix"])])
    other.load_state_dict(state)
    # It is saved while it waits.
    again = saved(other.state_dict())
    assert list(again["pending"]) == ["vector", "number"]
    third = optim.Adam([("matrix", resumed["matrix"])])
    third.load_state_dict(again)
    third.add_param_group({"params": [("vector", resumed["vector"])], "lr": 0.1})
    third.add_param_group({"params": [("number", resumed["number"])], "lr": 0.1})
    for step in range(3, 6):
        for params, optimizer in ((whole, adam), (resumed, third)):
            give_by_name(params, step)
            optimizer.step()
    assert same(list(whole.values()), list(resumed.values()))
    assert "pending" not in third.state_dict()


def test_names_that_the_state_dict_lacks_keep_their_state() -> None:
    params = named()
    adam = optim.Adam(params.items())
    give_by_name(params, 0)
    adam.step()
    part = named()
    few = optim.Adam([("vector", part["vector"])])
    for step in range(4):
        give_by_name(part, step)
        few.step()
    adam.load_state_dict(few.state_dict())
    assert [float(adam.state[param]["step"]) for param in params.values()] == [1.0, 4.0, 1.0]


def test_no_name_in_common_is_an_error_that_says_which() -> None:
    params = parameters("SGD")
    sgd = optim.SGD(zip("abc", params, strict=True), momentum=0.5)
    steps(params, sgd, 0, 1)
    state = sgd.state_dict()
    other = optim.SGD(zip("xyz", parameters("SGD"), strict=True))
    with pytest.raises(ValueError, match=r"parameters \['a', 'b', 'c'\].*\['x', 'y', 'z'\]"):
        other.load_state_dict(state)
    state["param_groups"][0]["param_names"] = ["x", "y", "z"]
    other.load_state_dict(state)
    assert other.param_groups[0]["momentum"] == 0.5


def test_without_an_entry_of_a_parameter_it_starts_over_as_in_torch() -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(3)
    for optimizer in (pair.ours, pair.peer):
        state = copy.deepcopy(optimizer.state_dict())
        del state["state"][1]
        optimizer.load_state_dict(state)
    pair.step(2)
    pair.check()
    assert [float(pair.ours.state[param]["step"]) for param in pair.mine] == [5.0, 2.0, 5.0]


@pytest.mark.parametrize("name", CLASSES)
def test_state_dicts_of_older_versions_have_fewer_settings(name: str) -> None:
    # Newer classes of torch cannot do without any.
    missing = ["foreach", "differentiable", "capturable", "fused", "decoupled_weight_decay"]
    missing += ["maximize"] * (name not in ("Adafactor", "Muon"))
    pair = Pair(name, {"lr": 0.05})
    pair.step(2)
    for optimizer in (pair.ours, pair.peer):
        state = copy.deepcopy(optimizer.state_dict())
        for key in missing:
            state["param_groups"][0].pop(key, None)
        optimizer.load_state_dict(state)
    assert pair.ours.param_groups[0].keys() >= {"params", *pair.ours.defaults}
    pair.step(2)
    pair.check()


def test_keys_of_ones_own_stay_in_groups() -> None:
    params = parameters("SGD")
    sgd = optim.SGD([{"params": params, "role": "body", "initial_lr": 0.3}], lr=0.1)
    state = saved(sgd.state_dict())
    other = optim.SGD(parameters("SGD"))
    other.load_state_dict(state)
    assert other.param_groups[0]["role"] == "body"
    assert other.param_groups[0]["initial_lr"] == 0.3


def test_loading_changes_nothing_of_what_is_given() -> None:
    params = parameters("Adam")
    adam = optim.Adam(params, lr=0.1)
    steps(params, adam, 0, 2)
    state = copy.deepcopy(adam.state_dict())
    before = copy.deepcopy(state)
    adam.load_state_dict(state)
    steps(params, adam, 2, 2)
    assert state["param_groups"] == before["param_groups"]
    for number, values in before["state"].items():
        assert all(torch.equal(state["state"][number][key], x) for key, x in values.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slots_of_16_bit_parameters_are_never_cast_down(dtype: torch.dtype) -> None:
    whole = parameters("Adam", dtype)
    adam = optim.Adam(whole, lr=0.1)
    steps(whole, adam, 0, 3)
    state = saved(adam.state_dict())
    assert state["state"][0]["exp_avg"].dtype == torch.float32
    saved_slot = state["state"][0]["exp_avg"]
    assert not torch.equal(saved_slot.to(dtype).float(), saved_slot)
    resumed = copied(whole)
    other = optim.Adam(resumed)
    other.load_state_dict(state)
    for params, optimizer in ((whole, adam), (resumed, other)):
        steps(params, optimizer, 3, 3)
    assert same(whole, resumed)
    # torch's own state of such parameters has 16 bits, which are raised.
    theirs = torch.optim.Adam(copied(whole))
    steps(list(theirs.param_groups[0]["params"]), theirs, 0, 2)
    other.load_state_dict(theirs.state_dict())
    slot = other.state[resumed[0]]["exp_avg"]
    its = theirs.state[theirs.param_groups[0]["params"][0]]["exp_avg"]
    assert (slot.dtype, its.dtype) == (torch.float32, dtype)
    assert torch.equal(slot, its.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masters_averages_and_skips_are_in_the_state(dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {
        "lr": 0.1,
        "master_weights": True,
        "average": mo.Average(),
        "on_nonfinite": "skip",
        "clip": mo.Clip(global_norm=1.0),
    }
    whole = parameters("AdamW", dtype)
    adam = optim.AdamW(whole, **settings)

    def some(params: list[torch.nn.Parameter], optimizer: Any, first: int) -> None:
        for step in range(first, first + 4):
            give(params, step)
            if step % 4 == 1:
                params[1].grad = torch.full_like(params[1], torch.inf)
            optimizer.step()

    some(whole, adam, 0)
    assert adam.skips["1"].total == 1
    resumed = copied(whole)
    other = optim.AdamW(resumed, **settings)
    other.load_state_dict(saved(adam.state_dict()))
    some(whole, adam, 4)
    some(resumed, other, 4)
    assert same(whole, resumed)
    for number in range(3):
        mean = adam.average(str(number))
        assert mean.dtype == torch.float32
        assert torch.equal(mean, other.average(str(number)))
        assert not torch.equal(mean, whole[number].float())


def test_torchs_class_takes_a_state_dict_with_masters_and_averages() -> None:
    params = parameters("AdamW", torch.bfloat16)
    adam = optim.AdamW(params, lr=0.1, master_weights=True, average=mo.Average())
    steps(params, adam, 0, 2)
    theirs = torch.optim.AdamW(params, lr=0.1)
    theirs.load_state_dict(saved(adam.state_dict()))
    steps(params, theirs, 2, 2)
    assert theirs.state[params[0]]["step"] == 4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda s: s["param_groups"].append({}),
            ValueError,
            "different number of parameter groups",
        ),
        (
            lambda s: s["param_groups"][0]["params"].pop(),
            ValueError,
            "contains a parameter group that doesn't match the size of optimizer's group",
        ),
        (lambda s: s.pop("state"), KeyError, "state"),
        (lambda s: s.pop("param_groups"), KeyError, "param_groups"),
    ],
)
def test_what_torch_refuses_to_load_is_refused_in_its_words(
    change: Any, error: type[Exception], words: str
) -> None:
    pair = Pair("Adam", {"lr": 0.1})
    pair.step(2)
    before = copy.deepcopy(pair.ours.state_dict())
    for optimizer in (pair.ours, pair.peer):
        state = copy.deepcopy(optimizer.state_dict())
        change(state)
        with pytest.raises(error, match=words):
            optimizer.load_state_dict(state)
    assert_equal_states(pair.ours.state_dict(), before)


def assert_equal_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for number, values in other["state"].items():
        assert one["state"][number].keys() == values.keys()
        assert all(torch.equal(one["state"][number][key], x) for key, x in values.items())


def test_the_state_dict_of_another_number_of_parameters_counts_groups_as_torch_does() -> None:
    pair = Pair("Adam", {})
    more = optim.Adam([{"params": params} for params in pair.mine])
    words = []
    for optimizer in (pair.ours, pair.peer):
        with pytest.raises(ValueError, match="groups") as caught:
            optimizer.load_state_dict(more.state_dict())
        words.append(str(caught.value))
    assert words[0] == words[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["state"][1].update(exp_avg=torch.ones(7)), r"'1'.*shape \(7,\)"),
        (lambda s: s["state"][1].update(step=torch.tensor(1.5)), "'1'.*whole number"),
        (lambda s: s["state"][1].update(step=-1), "'1'.*whole number"),
        (lambda s: s["state"][1].pop("step"), "'1'.*under 'step'"),
        (lambda s: s["state"][1].pop("exp_avg"), "'1'.*has the slots"),
        (lambda s: s["state"][1].update(exp_avg=3.0), "'1'.*expected a tensor under 'exp_avg'"),
        (lambda s: s["state"][1].update(other=torch.ones(5)), "'1'.*'other'"),
        (lambda s: s["state"].update({1: [1, 2]}), "'1'"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change: Any, words: str) -> None:
    params = parameters("Adam")
    adam = optim.Adam(params, lr=0.1)
    steps(params, adam, 0, 2)
    before = copy.deepcopy(adam.state_dict())
    state = copy.deepcopy(before)
    state["param_groups"][0]["lr"] = 0.7
    change(state)
    with pytest.raises(mo.CheckpointError, match=words):
        adam.load_state_dict(state)
    assert_equal_states(adam.state_dict(), before)
    steps(params, adam, 2, 1)


def test_a_setting_out_of_range_in_a_state_dict_changes_nothing() -> None:
    params = parameters("Adam")
    adam = optim.Adam(params, lr=0.1)
    steps(params, adam, 0, 2)
    before = copy.deepcopy(adam.state_dict())
    state = copy.deepcopy(before)
    state["param_groups"][0]["lr"] = -1.0
    state["state"][0]["step"] = torch.tensor(7.0)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: Adam: lr must be"):
        adam.load_state_dict(state)
    assert_equal_states(adam.state_dict(), before)


def test_the_state_of_another_class_is_refused() -> None:
    params = parameters("SGD")
    sgd = optim.SGD(params, momentum=0.9)
    steps(params, sgd, 0, 1)
    adam = optim.Adam(params)
    with pytest.raises(mo.CheckpointError, match=r"'0'.*momentum_buffer"):
        adam.load_state_dict(sgd.state_dict())


def test_complex_state_round_trips() -> None:
    sides = []
    for first, second in ((optim, torch.optim), (torch.optim, optim), (optim, optim)):
        param = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
        one: Any = first.Adam([param], lr=0.1)
        for step in range(6):
            param.grad = torch.tensor([1.0 - step * 1j, 0.5 + 1j], dtype=torch.complex128)
            if step == 3:
                two: Any = second.Adam([param])
                two.load_state_dict(saved(one.state_dict()))
                one = two
            one.step()
        sides.append(torch.view_as_real(param.detach()))
    assert_close("Adam", [sides[0], sides[1]], [sides[2], sides[2]])


def test_a_long_clock_is_not_rounded() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    adam = optim.Adam([weight])
    weight.grad = torch.ones(2)
    adam.step()
    adam.state[weight]["step"] = torch.tensor(2.0**24)
    adam.step()
    assert adam.state_dict()["state"][0]["step"].item() == 2**24 + 1
