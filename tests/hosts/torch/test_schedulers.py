"""Every scheduler of torch, over an optimizer of ours and over torch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

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

#: By class of a scheduler, ways to make it for an optimizer of two groups.
SCHEDULERS: dict[str, list[Callable[[Any], Any]]] = {
    "LambdaLR": [
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
        lambda o: lr_scheduler.LambdaLR(
            o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]
        ),
    ],
    "MultiplicativeLR": [lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8)],
    "StepLR": [lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5)],
    "MultiStepLR": [lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3)],
    "ConstantLR": [lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=4)],
    "LinearLR": [lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=6)],
    "ExponentialLR": [lambda o: lr_scheduler.ExponentialLR(o, 0.8)],
    "PolynomialLR": [lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0)],
    "CosineAnnealingLR": [lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7, eta_min=1e-3)],
    "CosineAnnealingWarmRestarts": [
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2)
    ],
    "CyclicLR": [
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
        lambda o: lr_scheduler.CyclicLR(
            o, base_lr=[0.01, 0.02], max_lr=[0.1, 0.2], step_size_up=2, mode="exp_range", gamma=0.9
        ),
    ],
    "OneCycleLR": [
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=14),
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=[0.2, 0.1], total_steps=14, three_phase=True, anneal_strategy="linear"
        ),
    ],
    "ReduceLROnPlateau": [
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        lambda o: lr_scheduler.ReduceLROnPlateau(
            o, mode="max", patience=0, min_lr=[0.02, 0.03], cooldown=1
        ),
    ],
    "SequentialLR": [
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.ConstantLR(o, factor=0.1, total_iters=2),
                lr_scheduler.ExponentialLR(o, 0.9),
            ],
            milestones=[4],
        )
    ],
    "ChainedScheduler": [
        lambda o: lr_scheduler.ChainedScheduler(
            [
                lr_scheduler.ConstantLR(o, factor=0.1, total_iters=4),
                lr_scheduler.ExponentialLR(o, 0.9),
            ],
            optimizer=o,
        )
    ],
    "SWALR": [lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=4)],
}
CASES = [
    pytest.param(make, id=f"{name}{number or ''}")
    for name, several in SCHEDULERS.items()
    for number, make in enumerate(several)
]
#: Losses that rise and fall, for plateaus.
LOSSES = (1.0, 0.9, 0.9, 0.95, 0.97, 0.96, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def test_there_is_a_case_for_every_scheduler() -> None:
    bases = {"LRScheduler"}
    assert set(lr_scheduler.__all__) - bases | {"SWALR"} == set(SCHEDULERS)


def grouped(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]


def advance(scheduler: Any, step: int) -> None:
    plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    scheduler.step(*([LOSSES[step % len(LOSSES)]] if plateau else []))


@pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning")
@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize(
    ("name", "settings"), [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.1})]
)
def test_every_scheduler_over_ours_and_over_torchs(
    name: str, settings: dict[str, Any], make: Callable[[Any], Any]
) -> None:
    pair = Pair(name, settings, grouped)
    ours, theirs = make(pair.ours), make(pair.peer)
    seen = set()
    for step in range(12):
        pair.step()
        pair.check(f"step {step}")
        for a, b in zip(pair.ours.param_groups, pair.peer.param_groups, strict=True):
            assert {**a, "params": 0} == {**b, "params": 0}
        seen.add(pair.ours.param_groups[0]["lr"])
        advance(ours, step)
        advance(theirs, step)
    assert len(seen) > 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"ASGD"}))
def test_every_class_under_a_scheduler(name: str) -> None:
    settings = OPTIONS[name][-1]
    pair = Pair(name, settings, grouped)
    schedulers = [lr_scheduler.ExponentialLR(o, 0.7) for o in (pair.ours, pair.peer)]
    for _ in range(8):
        pair.step()
        for scheduler in schedulers:
            scheduler.step()
    pair.check()
    # The rates matter, except that only the first of Rprop does.
    if name != "Rprop":
        constant = Pair(name, settings, grouped)
        constant.step(8)
        assert not same(pair.mine, constant.mine)


def test_asgd_uses_the_rate_of_the_step_and_torch_that_of_the_step_before() -> None:
    settings = {"lr": 0.1, "lambd": 0.1, "t0": 2.0}
    pair = Pair("ASGD", settings)
    scheduler = lr_scheduler.StepLR(pair.ours, step_size=2, gamma=0.5)
    for step in range(8):
        give(pair.mine, step)
        pair.ours.step()
        scheduler.step()
        # At the end of a step torch works out the rate of the next one from the group.
        pair.peer.param_groups[0]["lr"] = pair.ours.param_groups[0]["lr"]
        give(pair.theirs, step)
        with default_dtype(pair.dtype):
            pair.peer.step()
    pair.check()
    assert pair.ours.param_groups[0]["lr"] == 0.1 / 2**4


def test_momentum_and_betas_follow() -> None:
    for name, key in (("SGD", "momentum"), ("Adam", "betas")):
        one, other = parameters(name), parameters(name)
        settings = {"lr": 0.1, **({"momentum": 0.5} if name == "SGD" else {})}
        ours, core = getattr(optim, name)(one, **settings), getattr(optim, name)(other, **settings)
        scheduler = lr_scheduler.OneCycleLR(ours, max_lr=0.2, total_steps=8)
        values = []
        for step in range(6):
            # The numbers by hand.
            core.param_groups[0].update({k: ours.param_groups[0][k] for k in ("lr", key)})
            values.append(ours.param_groups[0][key])
            for params, optimizer in ((one, ours), (other, core)):
                give(params, step)
                optimizer.step()
            scheduler.step()
        assert len(set(values)) > 3
        assert same(one, other)


def test_a_scheduler_goes_on_from_its_state() -> None:
    def begin() -> tuple[list[torch.nn.Parameter], optim.Optimizer, Any]:
        params = parameters("Adam")
        adam = optim.Adam(grouped(params), lr=0.1)
        return params, adam, lr_scheduler.OneCycleLR(adam, max_lr=0.2, total_steps=12)

    one, ours, scheduler = begin()
    for step in range(10):
        if step == 5:
            other, second, resumed = begin()
            second.load_state_dict(ours.state_dict())
            resumed.load_state_dict(scheduler.state_dict())
            with torch.no_grad():
                for a, b in zip(other, one, strict=True):
                    a.copy_(b)
        give(one, step)
        ours.step()
        scheduler.step()
        if step >= 5:
            give(other, step)
            second.step()
            resumed.step()
    assert same(one, other)


def test_a_thousand_groups_with_rates_of_their_own() -> None:
    params = [[torch.nn.Parameter(torch.ones(2)) for _ in range(1000)] for _ in range(2)]
    groups = [
        [{"params": [p], "lr": 0.01 * (n % 7)} for n, p in enumerate(some)] for some in params
    ]
    ours, theirs = optim.Adam(groups[0]), torch.optim.Adam(groups[1])
    schedulers = [lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
    for step in range(4):
        for some, optimizer, scheduler in zip(params, (ours, theirs), schedulers, strict=True):
            give(some, step)
            optimizer.step()
            scheduler.step()
    assert_close("Adam", params[0], params[1])
