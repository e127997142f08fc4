"""Gradients that are not finite: who is skipped, how often, and how often is too often."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multiopt as mo
from tests.libraries import Library

GOOD, BAD = np.ones(2), np.array([1.0, np.inf])


def step(opt: mo.Optimizer, params: dict[str, np.ndarray], **grads: np.ndarray) -> None:
    opt.step(params, grads)


def start(limit: int | None = None) -> tuple[mo.Optimizer, dict[str, np.ndarray]]:
    opt = mo.Optimizer(mo.SGD(lr=1.0), on_nonfinite="skip", max_consecutive_skips=limit)
    return opt, {"a": np.zeros(2), "b": np.zeros(2)}


def test_skips_are_counted_by_name_and_a_run_ends_with_an_update(library: Library) -> None:
    opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
    params = {name: library.param(GOOD) for name in "ab"}
    counts = []
    for a, b in [(GOOD, BAD), (GOOD, BAD), (BAD, GOOD), (GOOD, BAD)]:
        params = opt.step(params, {"a": library.grad(a), "b": library.grad(b)})
        counts.append(opt.skips)
    assert counts == [
        {"b": (1, 1)},
        {"b": (2, 2)},
        {"b": (2, 0), "a": (1, 1)},
        {"b": (3, 1), "a": (1, 0)},
    ]
    assert isinstance(opt.skips["b"], mo.Skips)
    assert (opt.skips["b"].total, opt.skips["b"].consecutive) == (3, 1)


def test_a_name_that_takes_no_part_keeps_its_run() -> None:
    opt, params = start()
    step(opt, params, a=GOOD, b=BAD)
    step(opt, params, a=GOOD)
    opt.step({"a": params["a"]}, {"a": GOOD})
    assert opt.skips == {"b": mo.Skips(1, 1)}
    step(opt, params, a=GOOD, b=BAD)
    assert opt.skips == {"b": mo.Skips(2, 2)}


def test_names_never_seen_count_too() -> None:
    opt, params = start(limit=2)
    step(opt, params, a=GOOD, b=BAD)
    step(opt, params, b=BAD)
    assert opt.names == ("a",)
    assert opt.skips == {"b": mo.Skips(2, 2)}
    with pytest.raises(ValueError, match="the gradient of 'b' has"):
        step(opt, params, b=BAD)
    step(opt, params, b=GOOD)
    assert opt.names == ("a", "b")  # type: ignore[comparison-overlap]  # after a step
    assert opt.skips == {"b": mo.Skips(2, 0)}


def test_the_limit_raises_and_nothing_has_changed() -> None:
    opt, params = start(limit=1)
    step(opt, params, a=GOOD, b=BAD)
    before, state = {n: x.copy() for n, x in params.items()}, pickle.dumps(opt.state_dict())
    last, skips, steps = opt.last, opt.skips, opt.steps
    for _ in range(2):
        message = "the gradient of 'b' has .* in more than 1 steps in a row.*learning rate"
        with pytest.raises(ValueError, match=message):
            step(opt, params, a=GOOD, b=BAD)
        assert all((params[n] == before[n]).all() for n in params)
        assert pickle.dumps(opt.state_dict()) == state
        assert (opt.last, opt.skips, opt.steps) == (last, skips, steps)
    # Below the limit for one name is no matter of another.
    step(opt, params, a=BAD, b=GOOD)
    assert opt.skips == {"a": mo.Skips(1, 1), "b": mo.Skips(1, 0)}
    with pytest.raises(ValueError, match="'a' has"):
        step(opt, params, a=BAD, b=BAD)
    step(opt, params, a=GOOD, b=BAD)


def test_the_message_names_all_that_are_beyond_the_limit() -> None:
    opt, params = start(limit=1)
    step(opt, params, a=BAD, b=BAD)
    with pytest.raises(ValueError, match="'a', 'b' has"):
        step(opt, params, a=BAD, b=BAD)


def test_without_a_limit_skipping_goes_on() -> None:
    opt, params = start()
    for _ in range(100):
        step(opt, params, a=GOOD, b=BAD)
    assert opt.skips == {"b": mo.Skips(100, 100)}


def test_forget_drops_the_counts_and_rename_moves_them() -> None:
    opt, params = start()
    step(opt, params, a=GOOD, b=BAD)
    step(opt, params, a=BAD, b=BAD)
    opt.rename({"a": "c", "b": "d"})
    assert opt.skips == {"d": mo.Skips(2, 2), "c": mo.Skips(1, 1)}
    with pytest.raises(ValueError, match="two parameters would be called 'd'"):
        opt.rename({"c": "d"})
    opt.forget("d")
    assert opt.skips == {"c": mo.Skips(1, 1)}
    opt.forget("c")
    assert opt.skips == {}
    with pytest.raises(KeyError, match="'c'"):
        opt.forget("c")


def test_copies_have_their_own_counts() -> None:
    opt, params = start(limit=3)
    step(opt, params, a=GOOD, b=BAD)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        step(other, {n: x.copy() for n, x in params.items()}, b=BAD)
        assert other.skips == {"b": mo.Skips(2, 2)}
    assert opt.skips == {"b": mo.Skips(1, 1)}
    opt.skips.clear()
    assert opt.skips == {"b": mo.Skips(1, 1)}


@pytest.mark.parametrize("policy", ["propagate", "raise"])
def test_other_policies_skip_nothing_and_take_no_limit(policy: Any) -> None:
    with pytest.raises(ValueError, match=f"on_nonfinite='{policy}'; expected on_nonfinite='skip'"):
        mo.Optimizer(mo.SGD(), on_nonfinite=policy, max_consecutive_skips=1)
    assert mo.Optimizer(mo.SGD(), on_nonfinite=policy).skips == {}


@pytest.mark.parametrize("limit", [0, -1, 1.0, True, "1"])
def test_what_is_no_limit_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_consecutive_skips must be an integer >= 1"):
        mo.Optimizer(mo.SGD(), on_nonfinite="skip", max_consecutive_skips=limit)


def test_counts_are_saved_and_loaded_with_their_names(tmp_path: Path) -> None:
    opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
    bad, good = np.array([np.nan]), np.ones(1)
    params = {"a": np.ones(1), "b": np.ones(1), "never": np.ones(1)}
    opt.step(params, {"a": good, "b": bad, "never": bad})
    opt.step(params, {"a": bad, "b": good, "never": bad})
    expected = {"a": (1, 1), "b": (1, 0), "never": (2, 2)}
    assert opt.skips == expected
    opt.save(tmp_path / "run")
    resumed = mo.Optimizer(mo.SGD(), on_nonfinite="skip", max_consecutive_skips=2)
    resumed.load(tmp_path / "run")
    assert resumed.skips == expected
    assert all(isinstance(counts, mo.Skips) for counts in resumed.skips.values())
    with pytest.raises(ValueError, match="'never'"):
        resumed.step(params, {"never": bad})
    # A name that is loaded has the counts that were saved with it, or none.
    other = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
    other.step(params, {"b": bad})
    report = other.load(tmp_path / "run", names=["a", "never"], rename={"a": "b"})
    assert report.unused == {"b": "it was not asked for"}
    assert other.skips == {"b": (1, 1), "never": (2, 2)}
    fresh = mo.Optimizer(mo.SGD())
    fresh.step({"b": np.ones(1)}, {"b": good})
    other.load_state_dict(fresh.state_dict())
    assert other.skips == {"never": (2, 2)}


@pytest.mark.parametrize("skips", [[], {"a": 1}, {"a": [1]}, {"a": [1, 2]}, {"a": [-1, -1]}])
def test_counts_that_are_none_are_refused(skips: Any) -> None:
    state = mo.Optimizer(mo.SGD()).state_dict()
    with pytest.raises(mo.CheckpointError, match="skips"):
        mo.Optimizer(mo.SGD()).load_state_dict({**state, "skips": skips})


@pytest.mark.parametrize("clip", [None, mo.Clip(norm=9.0), mo.Clip(global_norm=9.0)])
def test_an_update_ends_a_run_that_was_loaded_where_nothing_is_skipped(clip: Any) -> None:
    opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip")
    params = {"a": np.ones(1), "b": np.ones(1)}
    bad, good = np.array([np.nan]), np.ones(1)
    for _ in range(3):
        opt.step(params, {"a": bad, "b": bad})
    other = mo.Optimizer(mo.SGD(), clip)
    other.step({"a": params["a"]}, {"a": good})
    other.load_state_dict(opt.state_dict())
    for _ in range(2):
        other.step({"a": params["a"]}, {"a": good})
    assert other.skips == {"a": (3, 0), "b": (3, 3)}
