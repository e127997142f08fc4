"""Loaded state that waits under names like those that start without state: a step warns, once."""

import warnings
from typing import Any

import numpy as np
import pytest

import multiopt as mo

SAVED = ["layer.w", "layer.b", "out.w"]


def state_of(names: list[str]) -> dict[str, Any]:
    opt = mo.Optimizer(mo.Adam())
    arrays = {name: np.ones(2) for name in names}
    opt.step(arrays, arrays)
    return opt.state_dict()


def step(opt: mo.Optimizer, *names: str) -> None:
    arrays = {name: np.ones(2) for name in names}
    opt.step(arrays, {name: np.ones(2) for name in names})


@pytest.mark.parametrize(
    ("saved", "named", "remedy"),
    [
        ("module.{}", "{}", "rename=lambda name: name.removeprefix('module.')"),
        ("{}", "module.{}", "rename=lambda name: 'module.' + name"),
        ("_orig_mod.{}", "{}", "rename=lambda name: name.removeprefix('_orig_mod.')"),
        ("a.b.{}", "{}", "rename=lambda name: name.removeprefix('a.b.')"),
    ],
)
def test_a_prefix_is_noticed_and_the_remedy_helps(saved: str, named: str, remedy: str) -> None:
    state = state_of([saved.format(name) for name in SAVED])
    names = [named.format(name) for name in SAVED]
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state)
    with pytest.warns(UserWarning, match="start without state") as caught:
        step(opt, *names)
    (warning,) = caught
    assert remedy in str(warning.message)
    assert warning.filename == __file__
    rename = eval(remedy.removeprefix("rename="))
    again = mo.Optimizer(mo.Adam())
    again.load_state_dict(state, rename=rename)
    step(again, *names)
    assert not again.pending
    assert {again.state(name).step for name in names} == {2}


def test_a_wrapper_in_the_middle_is_noticed() -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state_of(["net._orig_mod.w", "net._orig_mod.b"]))
    with pytest.warns(UserWarning, match=r"name\.replace\('_orig_mod\.', ''\)"):
        step(opt, "net.w", "net.b")


def test_names_without_a_common_change_are_listed() -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state_of(["x.w", "y.b"]))
    with pytest.warns(UserWarning, match=r"rename=\{'x.w': 'w', \.\.\.\}"):
        step(opt, "w", "b")


def test_it_is_said_once_after_each_load() -> None:
    opt, state = mo.Optimizer(mo.Adam()), state_of(["module.w", "module.b"])
    opt.load_state_dict(state)
    with pytest.warns(UserWarning, match="'w'"):
        step(opt, "w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(opt, "w", "b")
    opt.load_state_dict(state)
    opt.forget("b")
    with pytest.warns(UserWarning, match="'b'"):
        step(opt, "b")


def test_late_names_are_noticed_too() -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state_of(["module.w", "loc"]))
    step(opt, "loc")
    with pytest.warns(UserWarning, match="'w'"):
        step(opt, "w")


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        (["encoder.w"], ["decoder.w"]),
        (["module.w"], ["module.w", "w"]),
        (["ww"], ["w"]),
        (["w."], ["w"]),
        (["a.w", "late"], ["a.w", "b.w"]),
    ],
)
def test_other_names_are_no_cause(saved: list[str], named: list[str]) -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state_of(saved))
    step(opt, *named)


def test_as_an_error_it_changes_nothing() -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state_of(["module.w"]))
    w = np.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="module"):
            opt.step({"w": w}, {"w": np.ones(2)})
    assert (w.tolist(), opt.names, opt.pending) == ([1.0, 1.0], (), ("module.w",))
