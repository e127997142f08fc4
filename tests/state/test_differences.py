"""A load says in which numbers the rules differ, for the rules of the optimizer stay."""

from typing import Any

import numpy as np
import pytest

import multiopt as mo
from multiopt.state.differences import Difference
from tests.cases import CASES, WHOLE, Case

Linear = mo.schedules.Linear


def stepped(opt: mo.Optimizer, *names: str) -> mo.Optimizer:
    grads = {name: np.full((2, 2), 0.5) for name in names}
    opt.step({name: np.ones((2, 2)) for name in names}, grads)
    return opt


def saved(rule: Any, *names: str) -> dict[str, Any]:
    return stepped(mo.Optimizer(rule), *(names or ("w",))).state_dict()


@pytest.mark.parametrize("seen", [True, False])
def test_a_number_that_differs_is_reported_and_stays(seen: bool) -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.1, eps=1e-6))
    if seen:
        stepped(opt, "w", "v")
    report = opt.load_state_dict(saved(mo.Adam(lr=0.01, betas=(0.5, 0.999)), "w", "v"))
    expected = {
        "lr": Difference(saved=0.01, here=0.1),
        "betas": Difference(saved=[0.5, 0.999], here=[0.9, 0.999]),
        "eps": Difference(saved=1e-8, here=1e-6),
    }
    assert report.differences == {"w": expected, "v": expected}
    assert opt.hyperparameters("w")["lr"] == 0.1


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("case", [*CASES, *WHOLE], ids=lambda case: case.id)
def test_equal_rules_do_not_differ(case: Case, seen: bool) -> None:
    opt = mo.Optimizer(case.rule)
    if seen:
        stepped(opt, "w")
    assert opt.load_state_dict(saved(case.rule)).differences == {}


def test_each_name_is_compared_with_its_own() -> None:
    opt = stepped(mo.Optimizer(mo.SGD(lr=0.5)), "a", "b", "c")
    opt.set_hyperparameters("b", lr=0.25)
    opt.set_hyperparameters("c", lr=Linear(0.0, 1.0, steps=4))
    state = opt.state_dict()
    other = stepped(mo.Optimizer(mo.SGD(lr=0.5)), "a", "b", "c")
    other.set_hyperparameters("c", lr=Linear(0.0, 1.0, steps=5))
    words = {"name": "Linear", "initial": 0.0, "final": 1.0}
    assert other.load_state_dict(state).differences == {
        "b": {"lr": Difference(0.25, 0.5, restored=True)},
        "c": {"lr": Difference({**words, "steps": 4}, {**words, "steps": 5}, restored=True)},
    }
    assert other.hyperparameters("b")["lr"] == 0.25
    assert other.load_state_dict(state).differences == {}


@pytest.mark.parametrize("seen", [True, False])
def test_rules_and_averages_are_compared_too(seen: bool) -> None:
    opt = stepped(mo.Optimizer(mo.Adam(lr=0.5), average=mo.Average(decay=0.5)), "w")
    other = mo.Optimizer(mo.AdamW(lr=0.5), average=mo.Average(decay=0.25))
    if seen:
        stepped(other, "w")
    assert other.load_state_dict(opt.state_dict()).differences == {
        "w": {
            "rule": Difference("Adam", "AdamW"),
            "weight_decay": Difference(0.0, 0.01),
            "average.decay": Difference(0.5, 0.25),
        }
    }


def test_a_schedule_differs_from_a_number() -> None:
    schedule = Linear(0.5, 1.0, steps=4)
    words = {"name": "Linear", "initial": 0.5, "final": 1.0, "steps": 4}
    report = mo.Optimizer(mo.SGD(lr=0.5)).load_state_dict(saved(mo.SGD(lr=schedule)))
    assert report.differences == {"w": {"lr": Difference(words, 0.5)}}
    report = mo.Optimizer(mo.SGD(lr=schedule)).load_state_dict(saved(mo.SGD(lr=0.5)))
    assert report.differences == {"w": {"lr": Difference(0.5, words)}}


def test_numbers_that_a_schedule_gave_last_are_none() -> None:
    rule = mo.SGD(lr=Linear(0.5, 1.0, steps=4), momentum=0.5)
    opt = stepped(stepped(mo.Optimizer(rule), "a"), "a", "b")
    other = stepped(mo.Optimizer(rule), "a", "b")
    assert other.load_state_dict(opt.state_dict()).differences == {}


def test_what_cannot_be_compared_is_left_out() -> None:
    state = saved(mo.SGD(lr=lambda step: 0.5))
    assert mo.Optimizer(mo.SGD(lr=lambda step: 0.25)).load_state_dict(state).differences == {}
    asked = []
    opt = mo.Optimizer(lambda name: asked.append(name) or mo.SGD(lr=0.25))
    assert opt.load_state_dict(state).differences == {}
    assert asked == []


def test_only_what_both_rules_have_is_compared() -> None:
    report = mo.Optimizer(mo.AdamW(lr=0.5)).load_state_dict(saved(mo.Adam(lr=0.25)))
    assert report.differences == {
        "w": {
            "rule": Difference("Adam", "AdamW"),
            "lr": Difference(0.25, 0.5),
            "weight_decay": Difference(0.0, 0.01),
        }
    }


def test_names_are_those_here_and_those_left_out_are_not_there() -> None:
    opt = stepped(mo.Optimizer(mo.Adam(lr=0.5)), "w")
    report = opt.load_state_dict(
        saved(mo.Adam(lr=0.25), "w", "v"), names="v", rename={"v": "guide.v"}
    )
    assert list(report.differences) == ["guide.v"]
    state = saved(mo.SGD(lr=0.25, momentum=0.5), "w")
    assert opt.load_state_dict(state, strict=False).differences == {}
