"""What else a torch.optim.Optimizer does: closures, hooks, groups, copies."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch.optim import optimizer as base

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.optim_db import CLASSES
from tests.hosts.torch.training import OPTIONS, Pair, assert_close, give, parameters, same


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    sgd = optim.SGD([weight], lr=0.25)
    seen = []

    def closure() -> torch.Tensor:
        sgd.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        seen.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        assert sgd.step(closure) is not None
        loss = sgd.step(closure=closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == 1.0
    assert weight.item() == 0.5
    assert seen == [True, True]
    assert sgd.step() is None


def test_an_error_in_a_closure_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    adam = optim.Adam([weight])
    weight.grad = torch.ones(1)

    def closure() -> None:
        raise ArithmeticError("of the model")

    with pytest.raises(ArithmeticError):
        adam.step(closure)
    assert weight.item() == 2.0
    adam.step()
    assert adam.state[weight]["step"] == 1


def test_hooks_of_one_optimizer_and_of_all_run_in_torchs_order() -> None:
    def order(optimizer: Any, params: list[torch.nn.Parameter]) -> list[str]:
        seen: list[str] = []
        handles = [
            base.register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
            base.register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
            optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
            optimizer.register_step_post_hook(lambda *_: seen.append("after")),
            optimizer.register_state_dict_pre_hook(lambda _: seen.append("state before")),
            optimizer.register_state_dict_post_hook(lambda *_: seen.append("state after")),
            optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load before")),
            optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load after")),
        ]
        give(params, 0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        return seen

    pair = Pair("Adam", {})
    ours, theirs = order(pair.ours, pair.mine), order(pair.peer, pair.theirs)
    assert ours == theirs
    assert len(ours) == 8


def test_hooks_may_change_what_they_see() -> None:
    params = parameters("SGD")
    sgd = optim.SGD(params, lr=0.5, momentum=0.5)
    calls = []
    sgd.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: calls.append(1) or 7.0), {}))
    give(params, 0)
    assert sgd.step() == 7.0
    assert calls == [1]
    sgd.register_state_dict_post_hook(lambda o, state: {**state, "more": 1})
    assert sgd.state_dict()["more"] == 1

    def halved(o: Any, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    sgd.register_load_state_dict_pre_hook(halved)
    given = sgd.state_dict()
    sgd.load_state_dict(given)
    assert sgd.param_groups[0]["lr"] == 0.25
    assert given["param_groups"][0]["lr"] == 0.5


def test_a_hook_before_the_step_may_set_gradients_and_rates() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    sgd = optim.SGD([weight], lr=1.0)

    def hook(o: Any, args: Any, kwargs: Any) -> None:
        weight.grad = torch.ones(2)
        o.param_groups[0]["lr"] = 0.25

    sgd.register_step_pre_hook(hook)
    sgd.step()
    assert weight.tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("name", CLASSES)
def test_a_group_that_is_added_later(name: str) -> None:
    settings = OPTIONS[name][-1]
    pair = Pair(name, settings, lambda params: params[:1])
    pair.step(3)
    for optimizer, params in ((pair.ours, pair.mine), (pair.peer, pair.theirs)):
        optimizer.add_param_group({"params": iter(params[1:]), "lr": 0.05})
    pair.step(3)
    pair.check()
    assert [float(pair.ours.state[param]["step"]) for param in pair.mine[:2]] == [6.0, 3.0]


@pytest.mark.parametrize(
    "group",
    [
        [torch.nn.Parameter(torch.ones(1))],
        {"params": {torch.nn.Parameter(torch.ones(1))}},
        {"params": [3.0]},
        {"params": [torch.ones(1, requires_grad=True) * 2]},
        {"params": [("w", torch.nn.Parameter(torch.ones(1)))]},
        {"params": [("w", torch.nn.Parameter(torch.ones(1))), torch.nn.Parameter(torch.ones(1))]},
        "the same",
    ],
    ids=["list", "set", "number", "not a leaf", "named", "half named", "twice"],
)
def test_a_group_that_torch_refuses(group: Any) -> None:
    pair = Pair("SGD", {})
    words = []
    for optimizer in (pair.ours, pair.peer):
        given = {"params": optimizer.param_groups[0]["params"][0]} if group == "the same" else group
        given = dict(given) if isinstance(given, dict) else given
        with pytest.raises((TypeError, ValueError)) as caught:
            optimizer.add_param_group(given)
        words.append((caught.type, str(caught.value)))
        assert len(optimizer.param_groups) == 1
    assert words[0] == words[1]
    pair.step()
    pair.check()


def test_names_for_groups_that_do_not_name_their_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": iter(others[:1])},
    ]
    adam = optim.AdamW(groups, names=model.named_parameters())
    adam.add_param_group({"params": others[1]})
    names = [group["param_names"] for group in adam.param_groups]
    assert names == [["0.weight", "1.weight"], ["0.bias"], ["1.bias"]]
    model(torch.ones(2)).sum().backward()
    adam.step()
    assert sorted(adam.last.updated) == sorted(name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"names has none for parameters of the shapes \[\(4,\)\]"):
        adam.add_param_group({"params": torch.nn.Parameter(torch.ones(4))})
    assert len(adam.param_groups) == 3


def test_names_beside_parameters_that_have_names() -> None:
    model = torch.nn.Linear(2, 1)
    groups = [{"params": model.named_parameters(prefix="a")}]
    sgd = optim.SGD(groups, names=model.named_parameters())
    assert sgd.param_groups[0]["param_names"] == ["a.weight", "a.bias"]


def test_gradients_are_cleared_as_in_torch() -> None:
    pair = Pair("SGD", {})
    pair.step()
    for set_to_none in (False, True):
        for optimizer, params in ((pair.ours, pair.mine), (pair.peer, pair.theirs)):
            optimizer.zero_grad(set_to_none=set_to_none)
            grads: list[Any] = [param.grad for param in params]
            assert all(g is None if set_to_none else g.eq(0).all() for g in grads)
    pair.step()
    pair.check()


def test_parameters_without_a_gradient_are_left_alone() -> None:
    pair = Pair("Adam", {"weight_decay": 0.1})
    for params, optimizer in ((pair.mine, pair.ours), (pair.theirs, pair.peer)):
        frozen = params[2].requires_grad_(False)
        optimizer.step()
        give(params[:1], 0)
        optimizer.step()
        assert frozen.grad is None
    pair.check()
    assert set(map(id, pair.ours.state)) == {id(p) for p in pair.mine[:2]}


@pytest.mark.parametrize("name", CLASSES)
def test_the_text_is_torchs(name: str) -> None:
    pair = Pair(name, OPTIONS[name][0])
    assert repr(pair.ours) == repr(pair.peer)


def through_pickle(objects: Any) -> Any:
    return pickle.loads(pickle.dumps(objects))


def through_a_file(objects: Any) -> Any:
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [through_pickle, through_a_file, copy.deepcopy])
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_goes_on_at_the_same_bits_by_itself(name: str, copied: Any) -> None:
    params = parameters(name)
    ours = getattr(optim, name)(params, **OPTIONS[name][-1])
    for step in range(3):
        give(params, step)
        ours.step()
    others, other = copied((params, ours))
    assert type(other) is type(ours)
    # torch's own constructor of copies adds it.
    assert other.defaults == {"differentiable": False, **ours.defaults}
    for step in range(3, 6):
        give(params, step)
        ours.step()
    assert not same(params, others)
    for step in range(3, 6):
        give(others, step)
        other.step()
    assert same(params, others)
    other.add_param_group({"params": parameters(name, seed=3)})
    assert len(ours.param_groups) == 1


def test_a_copy_has_the_settings_of_the_core_and_no_hooks_as_in_torch() -> None:
    params = parameters("SGD")
    ours = optim.SGD(
        params, clip=mo.Clip(norm=0.5), on_nonfinite="skip", average=mo.Average(), lr=0.1
    )
    ours.register_step_post_hook(lambda *_: pytest.fail("a hook was copied"))
    others, other = copy.deepcopy((params, ours))
    give(others, 0)
    others[1].grad = torch.full_like(others[1], torch.nan)
    other.step()
    assert other.last.skipped == ("1",)
    assert other.last.norms["0"] > 0.5
    assert torch.equal(other.average("0"), others[0])


def test_step_twice_in_a_step_is_refused() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    # A schedule is the caller's code.
    sgd: Any = optim.Optimizer([weight], mo.SGD(lr=lambda step: sgd.step() or 1.0))
    weight.grad = torch.ones(1)
    with pytest.raises(ValueError, match="step: a step, or another change of this optimizer, has"):
        sgd.step()
    assert weight.item() == 0.0


def test_a_gradient_of_another_dtype_changes_nothing() -> None:
    weight, bias = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    sgd = optim.SGD([("weight", weight), ("bias", bias)], lr=1.0)
    weight.grad = torch.ones(2)
    bias.grad_dtype = None
    bias.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="'bias'"):
        sgd.step()
    assert weight.tolist() == bias.tolist() == [0.0, 0.0]
    bias.grad = torch.ones(2)
    sgd.step()
    assert sgd.last.updated == ("weight", "bias")


def test_a_backward_pass_that_needs_a_value_from_before_the_step_raises() -> None:
    for make in (optim.SGD, torch.optim.SGD):
        weight = torch.nn.Parameter(torch.ones(2))
        loss = weight.square().sum()
        weight.grad = torch.ones(2)
        make([weight], lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_parameters_of_several_dtypes() -> None:
    dtypes = [torch.float64, torch.float32, torch.complex64, torch.float32]
    sides = []
    for make in (optim.Adam, torch.optim.Adam):
        params = [torch.nn.Parameter(torch.arange(4.0).add(n).to(d)) for n, d in enumerate(dtypes)]
        adam = make(params, lr=0.1)
        for step in range(5):
            for number, param in enumerate(params):
                param.grad = torch.full_like(param, 1.0 / (1 + step + number))
            adam.step()
        sides.append([param.detach() for param in params])
        assert adam.state[params[2]]["exp_avg"].dtype == torch.complex64
    assert_close(
        "Adam",
        [torch.view_as_real(x) if x.is_complex() else x for x in sides[0]],
        [torch.view_as_real(x) if x.is_complex() else x for x in sides[1]],
    )
