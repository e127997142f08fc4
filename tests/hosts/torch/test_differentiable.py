"""``differentiable=True``: gradients through a step, as torch's own test of it takes them."""

from typing import Any

import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.optim_db import CLASSES
from tests.hosts.torch.training import assert_close, default_dtype

DIFFERENTIABLE = sorted(set(CLASSES) - {"Adafactor", "Muon"})

#: Settings and state as in torch's test: every slot at the clock 10, where there is one.
STATES: dict[str, list[tuple[dict[str, Any], tuple[str, ...]]]] = {
    "ASGD": [({"lr": 0.9}, ("ax",))],
    "Adadelta": [({"lr": 0.9, "weight_decay": 0.1}, ("square_avg", "acc_delta"))],
    "Adagrad": [({"lr": 0.9}, ("sum",))],
    "Adam": [
        ({"lr": 0.9, "amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        ({"lr": 0.9, "weight_decay": 0.1}, ("exp_avg", "exp_avg_sq")),
    ],
    "AdamW": [({"lr": 0.9, "amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))],
    "Adamax": [({"lr": 0.9}, ("exp_avg", "exp_inf"))],
    "NAdam": [
        ({"lr": 0.9}, ("exp_avg", "exp_avg_sq")),
        ({"lr": 0.9, "decoupled_weight_decay": True}, ("exp_avg", "exp_avg_sq")),
    ],
    "RAdam": [({"lr": 0.9, "weight_decay": 0.1}, ("exp_avg", "exp_avg_sq"))],
    "RMSprop": [
        (
            {"lr": 0.9, "maximize": True, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
            ("square_avg", "momentum_buffer", "grad_avg"),
        )
    ],
    "Rprop": [({"lr": 0.9}, ("prev", "step_size"))],
    "SGD": [
        ({"lr": 0.9}, ()),
        ({"lr": 0.9, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, ("momentum_buffer",)),
    ],
}
CASES = [
    pytest.param(name, settings, slots, id=f"{name}{number or ''}")
    for name, several in STATES.items()
    for number, (settings, slots) in enumerate(several)
]
#: Classes of torch that overwrite what the gradient of a later step needs.
OVERWRITES = ("Adamax", "Rprop")


def test_every_class_has_a_case() -> None:
    assert sorted(STATES) == DIFFERENTIABLE


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.rand(shape, generator=generator, dtype=torch.float64)
    return values.requires_grad_()


def stepped(
    make: Any,
    p: torch.Tensor,
    grad: torch.Tensor,
    settings: dict[str, Any],
    names: tuple[str, ...],
    *slots: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """torch's ``_diff_fn``: a step of a clone whose state is given, and all that depends on it."""
    p = p.clone()
    p.grad = grad
    optimizer = make([p], **settings, differentiable=True)
    state: dict[str, Any] = {name: slot.clone() for name, slot in zip(names, slots, strict=True)}
    kind = make.__name__
    if kind != "SGD":
        state["step"] = torch.tensor(10.0)
    if kind == "NAdam":
        # What follows from the clock.
        one = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        peer = torch.optim.NAdam([one], lr=0.9)
        for _ in range(10):
            one.grad = torch.ones_like(one)
            peer.step()
        state["mu_product"] = peer.state[one]["mu_product"]
    if kind == "ASGD":
        state["eta"], state["mu"] = (
            torch.tensor(0.9 / (1 + 1e-4 * 0.9 * 10) ** 0.75),
            torch.ones(()),
        )
    optimizer.state[p].update(state)
    optimizer.step()
    return (p, *(optimizer.state[p][name] for name in names))


@pytest.mark.parametrize(("name", "settings", "slots"), CASES)
def test_gradients_through_a_step(
    name: str, settings: dict[str, Any], slots: tuple[str, ...]
) -> None:
    p, grad = random(10, seed=0), random(10, seed=1)
    # A variance is not negative.
    values = [
        random(10, seed=2 + k, scale=0.01 if slot == "grad_avg" else 1.0)
        for k, slot in enumerate(slots)
    ]
    inputs = (p, grad, *values)
    with default_dtype(torch.float64):

        def ours(p: torch.Tensor, grad: torch.Tensor, *values: torch.Tensor) -> Any:
            return stepped(getattr(optim, name), p, grad, settings, slots, *values)

        assert torch.autograd.gradcheck(ours, inputs)
        sides: list[list[torch.Tensor]] = []
        for library in (optim, torch.optim):
            out = stepped(getattr(library, name), p, grad, settings, slots, *values)
            total = torch.stack([x.sin().sum() for x in out if x.requires_grad]).sum()
            # A zero of ours may have no path at all.
            found = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
            sides.append([*out, *found])
    assert_close(name, sides[0], sides[1])
    assert any(x.grad_fn is not None for x in out)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_several_steps_are_differentiated_through(name: str) -> None:
    """The loss after three steps, by the parameter before them and by what gradients are of."""
    sides: list[list[torch.Tensor]] = []
    with default_dtype(torch.float64):
        for library in (optim, torch.optim):
            start, data = random(4, seed=5), random(4, seed=6)
            p = start.clone()
            optimizer = getattr(library, name)([p], differentiable=True, lr=0.1)
            for step in range(3):
                p.grad = (data * (1 + step)).cos()
                optimizer.step()
            loss = (p - 1).square().sum()
            if library is torch.optim and name in OVERWRITES:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(loss, (start, data))
                # Its parameter is right.
                assert_close(name, sides[0][:1], [p])
                return
            sides.append([p, *torch.autograd.grad(loss, (start, data))])
    assert_close(name, sides[0], sides[1])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_numbers_are_those_of_a_step_without_a_graph(name: str) -> None:
    # So many that roots of torch which are not exact would show.
    plain = torch.nn.Parameter(random(1000, seed=3).detach())
    p = plain.detach().clone()
    one, other = (
        getattr(optim, name)([plain], lr=0.1),
        getattr(optim, name)([p], lr=0.1, differentiable=True),
    )
    for step in range(3):
        plain.grad = p.grad = random(1000, seed=step).detach()
        one.step()
        other.step()
    assert torch.equal(plain, p)
    for key, value in one.state[plain].items():
        assert torch.equal(value, other.state[p][key]), key


def test_a_leaf_is_refused_as_in_torch_and_nothing_changes() -> None:
    leaf, clone = torch.nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True).clone()
    leaf.grad = clone.grad = torch.ones(2)
    words = []
    for library in (optim, torch.optim):
        with pytest.raises(RuntimeError) as caught:
            library.SGD([clone, leaf], lr=0.5, differentiable=True).step()
        words.append(str(caught.value).splitlines()[0])
    assert words[0] == words[1]
    # torch has stepped the first.
    assert clone.tolist() == [0.5, 0.5]


def test_state_is_saved_and_loaded_as_torch_does() -> None:
    sides: list[list[torch.Tensor]] = []
    with default_dtype(torch.float64):
        for library in (optim, torch.optim):
            p = random(3, seed=0).detach()
            p.grad = random(3, seed=1).detach()
            one = library.Adam([p], lr=0.1, differentiable=True)
            one.step()
            two = library.Adam([p], differentiable=True)
            two.load_state_dict(one.state_dict())
            two.step()
            sides.append([p, two.state[p]["exp_avg"]])
            assert two.state[p]["step"] == 2
    assert_close("Adam", sides[0], sides[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": mo.Clip(norm=1.0)},
        {"average": mo.Average()},
        {"on_nonfinite": "skip"},
        {"on_nonfinite": "raise"},
        {"master_weights": True},
        {"max_consecutive_skips": 3},
        {"process_group": "world"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_step_within_a_graph_cannot_do_is_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"differentiable=True cannot be combined with {name}="):
        optim.Adam([torch.nn.Parameter(torch.ones(2))], differentiable=True, **settings)
    optim.Adam([torch.nn.Parameter(torch.ones(2))], differentiable=True, on_nonfinite="propagate")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_sparse_gradients_within_a_graph() -> None:
    p = torch.ones(3)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([2.0]), (3,))
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optim.Adam([p], differentiable=True).step()
    optim.SGD([p], lr=0.5, differentiable=True).step()
    assert p.tolist() == [1.0, 0.0, 1.0]
