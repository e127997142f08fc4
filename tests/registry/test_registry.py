"""Names: birth, clocks, pending state, forgetting, renaming, the rule by name, the report."""

import copy
import pickle
from pathlib import Path
from typing import Any

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given

import multiopt as mo
from tests.histories import History, arrays, histories
from tests.libraries import JAX, NUMPY, TORCH, Library, assert_equal


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def stepped(rule: mo.Rule | None = None, *names: str, steps: int = 1) -> mo.Optimizer:
    opt = mo.Optimizer(rule or mo.Adam(lr=0.1))
    params = {name: ones(3) for name in names}
    for _ in range(steps):
        params = opt.step(params, {name: ones(3) for name in names})
    return opt


def test_arrays_are_updated_in_place_or_returned_new(library: Library) -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.25))
    params = {"a": library.param(ones(3)), "b": library.param(ones(2))}
    result = opt.step(params, {"a": library.grad(ones(3))})
    assert list(result) == ["a", "b"]
    assert (result["a"] is params["a"]) == library.in_place
    assert type(result["a"]) is type(params["a"])
    assert result["b"] is params["b"]
    assert_equal(library.numpy(result["a"]), np.full(3, 0.75, np.float32))
    assert_equal(library.numpy(params["a"]), np.full(3, 0.75 if library.in_place else 1.0, "f4"))


def test_gradients_are_never_written(library: Library) -> None:
    opt = mo.Optimizer(
        mo.ClippedAdam(weight_decay=0.1, clip_norm=0.1), mo.Clip(norm=0.5, global_norm=0.5, value=1)
    )
    params, grad = {"a": library.param(ones(3))}, library.grad(ones(3))
    for _ in range(2):
        params = opt.step(params, {"a": grad})
    assert_equal(library.numpy(grad), ones(3))


def test_a_name_without_a_gradient_stands_still(library: Library) -> None:
    opt = mo.Optimizer(mo.Adam())
    params = {"a": library.param(ones(3)), "b": library.param(ones(3))}
    params = opt.step(params, {"a": library.grad(ones(3)), "b": None})
    assert opt.names == ("a",)
    params = opt.step(params, {"b": library.grad(ones(3))})
    assert [opt.state(name).step for name in "ab"] == [1, 1]
    assert opt.step(params, {}) == params
    assert opt.last == mo.Report()


def test_rule_and_clip_are_asked_for_once_a_name() -> None:
    asked = []

    def rule(name: str) -> mo.Rule:
        asked.append(name)
        return mo.SGD(lr=1.0 if name == "fast" else 0.5)

    def clip(name: str) -> mo.Clip | None:
        asked.append("clip " + name)
        return mo.Clip(value=0.5) if name == "slow" else None

    opt = mo.Optimizer(rule, clip)
    params = {"fast": ones(1), "slow": ones(1), "later": ones(1)}
    for _ in range(3):
        opt.step(params, {"fast": ones(1), "slow": ones(1)})
    assert asked == ["fast", "clip fast", "slow", "clip slow"]
    assert params["fast"] == 1 - 3 * 1.0
    assert params["slow"] == 1 - 3 * 0.25


def test_looking() -> None:
    opt = stepped(mo.SGD(momentum=0.5), "a", "b")
    assert opt.names == tuple(opt) == ("a", "b")
    assert len(opt) == 2
    assert "a" in opt
    assert "c" not in opt
    other = mo.Optimizer(mo.SGD(momentum=0.5), mo.Clip(norm=1.0), on_nonfinite="skip")
    other.load_state_dict(opt.state_dict())
    assert other.pending == ("a", "b")
    assert "a" not in other
    assert repr(other) == (
        "<Optimizer(SGD(lr=0.001, momentum=0.5, dampening=0.0, weight_decay=0.0, nesterov=False, "
        "maximize=False, decoupled_weight_decay=False), clip=Clip(norm=1.0, global_norm=None, "
        "value=None, eps=1e-06), on_nonfinite='skip'): 0 names, 2 pending>"
    )


def test_slots_have_the_names_of_torch_and_the_form_of_the_parameter(library: Library) -> None:
    rules = {
        mo.Adam(amsgrad=True): ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        mo.AdamW(): ["exp_avg", "exp_avg_sq"],
        mo.ClippedAdam(): ["exp_avg", "exp_avg_sq"],
        mo.SGD(momentum=0.9): ["momentum_buffer"],
        mo.SGD(): [],
    }
    for rule, slots in rules.items():
        opt = mo.Optimizer(rule)
        params = opt.step({"w": library.param(ones(2, 3))}, {"w": library.grad(ones(2, 3))})
        state = opt.state("w")
        assert list(state.slots) == slots
        for slot in state.slots.values():
            assert isinstance(params["w"], type(slot))
            assert slot.shape == params["w"].shape
            assert slot.device == params["w"].device


def test_a_state_is_a_snapshot(library: Library) -> None:
    opt = mo.Optimizer(mo.Adam())
    params = opt.step({"w": library.param(ones(3))}, {"w": library.grad(ones(3))})
    before = library.numpy(opt.state("w").slots["exp_avg"]).copy()
    snapshots = [
        opt.state("w").slots["exp_avg"],
        opt.state_dict()["entries"]["w"]["slots"]["exp_avg"],
    ]
    opt.step(params, {"w": library.grad(ones(3))})
    for snapshot in snapshots:
        assert_equal(library.numpy(snapshot), before)
    if library.in_place:
        after = library.numpy(opt.state("w").slots["exp_avg"]).copy()
        opt.state("w").slots["exp_avg"][...] = 7.0
        opt.state_dict()["entries"]["w"]["slots"]["exp_avg"][...] = 7.0
        assert_equal(library.numpy(opt.state("w").slots["exp_avg"]), after)


def test_a_rule_that_keeps_what_it_was_lent_keeps_a_copy() -> None:
    class Remembering(mo.SGD):
        slots = ("param", "grad")

        @property
        def update(self) -> Any:
            return lambda xp, p, g, slots, c: (p + g, (p, xp.reshape(g, (3,))))

    opt, w, grad = mo.Optimizer(Remembering()), ones(3), ones(3)
    opt.step({"w": w}, {"w": grad})
    grad[...] = 5.0
    assert_equal(w, 2 * ones(3))
    assert_equal(opt.state("w").slots["grad"], ones(3))
    assert_equal(opt.state("w").slots["param"], ones(3))


def test_a_rule_may_leave_a_slot_as_it_is(library: Library) -> None:
    class Resting(mo.SGD):
        slots = ("rest",)

        @property
        def update(self) -> Any:
            return lambda xp, p, g, slots, c: (p - g, slots)

    opt, params = mo.Optimizer(Resting()), {"w": library.param(ones(3))}
    for _ in range(3):
        params = opt.step(params, {"w": library.grad(ones(3))})
    assert_equal(library.numpy(params["w"]), -2 * ones(3))
    assert_equal(library.numpy(opt.state("w").slots["rest"]), 0 * ones(3))


# Pending state


def test_loaded_state_waits_for_its_parameter_and_survives_saving(library: Library) -> None:
    state = stepped(None, "a", "b", "c", steps=3).state_dict()
    opt = mo.Optimizer(mo.Adam(lr=0.1))
    opt.load_state_dict(state)
    assert opt.pending == ("a", "b", "c")
    params = opt.step({"b": library.param(ones(3))}, {"b": library.grad(ones(3))})
    assert opt.pending == ("a", "c")  # type: ignore[comparison-overlap]  # after a step
    assert opt.state("b").step == 4
    assert opt.last.new == ("b",)

    again = mo.Optimizer(mo.Adam(lr=0.1))
    again.load_state_dict(opt.state_dict())
    assert sorted(again.pending) == ["a", "b", "c"]
    for name in "ac":
        entry, was = again.state_dict()["pending"][name], state["entries"][name]
        assert (entry["rule"], entry["step"]) == (was["rule"], was["step"])
        for slot, array in was["slots"].items():
            assert_equal(entry["slots"][slot], array)
    opt.step(params, {"b": library.grad(ones(3))})


def test_loading_a_seen_name_replaces_its_state_at_once_and_leaves_others() -> None:
    early, late = stepped(None, "a"), stepped(None, "a", "b", steps=5)
    late.load_state_dict(early.state_dict())
    assert late.pending == ()
    assert late.state("a").step == 1
    assert_equal(late.state("a").slots["exp_avg"], early.state("a").slots["exp_avg"])
    assert late.state("b").step == 5


def test_an_entry_wins_over_pending_state_of_its_name() -> None:
    state, old = stepped(None, "a", steps=3).state_dict(), stepped(None, "a").state_dict()
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict({**state, "pending": old["entries"]})
    assert opt.state_dict()["pending"]["a"]["step"] == 3


def test_slots_are_taken_by_name_in_whatever_order_they_come() -> None:
    opt, state = stepped(None, "a", steps=3), stepped(None, "a", steps=3).state_dict()
    slots = state["entries"]["a"]["slots"]
    state["entries"]["a"]["slots"] = dict(reversed(slots.items()))
    opt.load_state_dict(state)
    for slot, array in slots.items():
        assert_equal(opt.state("a").slots[slot], array)


def test_a_loaded_state_is_a_copy() -> None:
    state = stepped(None, "a").state_dict()
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(state)
    state["entries"]["a"]["slots"]["exp_avg"][...] = 9.0
    state["entries"]["a"]["rule"]["lr"] = 9.0
    state["entries"]["a"]["rule"]["betas"].append(9.0)
    for _ in range(2):
        pending = opt.state_dict()["pending"]["a"]
        assert (pending["slots"]["exp_avg"] != 9.0).all()
        assert pending["rule"]["lr"] == 0.1
        assert pending["rule"]["betas"] == [0.9, 0.999]
        pending["slots"]["exp_avg"][...] = 9.0
        pending["rule"]["lr"] = 9.0
        pending["rule"]["betas"].append(9.0)


def test_state_that_does_not_fit_a_seen_name_changes_nothing() -> None:
    opt = stepped(None, "a", "b")
    for change, message in (
        (
            {"shape": (4,)},
            r"slot 'exp_avg' of parameter 'a' has shape \(4,\); expected \(3,\).*forget",
        ),
        ({"dtype": np.float64}, "of parameter 'a' has dtype float64; expected float32, for a par"),
    ):
        state = stepped(None, "b", "a", steps=9).state_dict()
        given: dict[str, Any] = {"shape": 3, "dtype": "f4"} | change
        state["entries"]["a"]["slots"]["exp_avg"] = np.ones(**given)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(state)
        assert [opt.state(name).step for name in "ab"] == [1, 1]


def test_pending_state_that_does_not_fit_is_an_error_of_the_step() -> None:
    opt = mo.Optimizer(mo.Adam())
    opt.load_state_dict(stepped(None, "a").state_dict())
    w = ones(5)
    with pytest.raises(ValueError, match=r"of parameter 'a' has shape \(3,\); expected \(5,\)"):
        opt.step({"a": w}, {"a": ones(5)})
    with pytest.raises(ValueError, match=r"'a' has dtype float32; expected float64.*cast=True"):
        opt.step({"a": np.ones(3)}, {"a": np.ones(3)})
    assert_equal(w, ones(5))
    assert opt.pending == ("a",)
    opt.forget("a")
    opt.step({"a": w}, {"a": ones(5)})
    assert opt.state("a").step == 1


def test_slots_of_another_rule_are_an_error_as_soon_as_the_rule_is_known() -> None:
    state = stepped(mo.SGD(momentum=0.9), "a").state_dict()
    message = (
        r"'a' has the slots \['momentum_buffer'\] \(of SGD\); expected \['exp_avg', 'exp_avg_sq'\]"
    )
    known = mo.Optimizer(mo.Adam())
    with pytest.raises(ValueError, match=message):
        known.load_state_dict(state)
    assert known.pending == ()
    unknown = mo.Optimizer(lambda name: mo.Adam())
    unknown.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        unknown.step({"a": ones(3)}, {"a": ones(3)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: [], "expected a state dict with 'version', 'entries' and 'pending'"),
        (lambda s: {**s, "version": 5}, "expected version 4 or an earlier one; got version 5"),
        (lambda s: {**s, "version": True}, "expected a version between 1 and 4; got True"),
        (lambda s: {**s, "steps": 2**53 + 1}, r"expected an int from 0 to 2\^53 under 'steps'"),
        (
            lambda s: {**s, "pending": {"x": {"step": True, "slots": {}, "rule": {}}}},
            r"the state of 'x' has step True; expected an int from 0 to 2\^53",
        ),
        (
            lambda s: {**s, "pending": {"x": {"step": 1, "slots": {1: 0}, "rule": {}}}},
            "the state of 'x' has a slot or setting without a name",
        ),
        (
            lambda s: {**s, "pending": {"x": {"step": 1, "slots": {"m": 1.0}, "rule": {}}}},
            "the state of 'x' has an unusable slot: slot 'm' is 1.0, a float",
        ),
        (
            lambda s: {**s, "pending": {"x": {"step": 1, "slots": {"m": ones(1) > 0}, "rule": {}}}},
            "the state of 'x' has an unusable slot: slot 'm' has dtype bool",
        ),
        (lambda s: {**s, "entries": []}, "expected a mapping under 'entries'; got list"),
        (lambda s: {"version": 1, "entries": {}}, "expected a mapping under 'pending'; got None"),
        (
            lambda s: {**s, "pending": {1: {}}},
            "expected names under 'pending' to be strings; got 1",
        ),
        (lambda s: {**s, "pending": {"x": 3}}, "the state of 'x' has step None; expected an int"),
        (
            lambda s: {**s, "pending": {"x": {"step": -1, "slots": {}, "rule": {}}}},
            r"the state of 'x' has step -1; expected an int from 0 to 2\^53",
        ),
        (
            lambda s: {**s, "pending": {"x": {"step": 1, "slots": [], "rule": {}}}},
            "the state of 'x' needs mappings under 'slots' and 'rule'",
        ),
    ],
)
def test_a_malformed_state_dict_changes_nothing(damage: object, message: str) -> None:
    opt = stepped(None, "a")
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(damage(stepped(None, "a", steps=4).state_dict()))  # type: ignore[operator]
    assert opt.state("a").step == 1
    assert opt.pending == ()


# Forgetting, renaming, changing the rule


def test_forget_starts_over() -> None:
    opt = stepped(None, "a", "b", steps=3)
    opt.forget("a")
    assert opt.names == ("b",)
    opt.step({"a": ones(3)}, {"a": ones(3)})
    assert opt.state("a").step == 1


def test_rename_moves_state_rule_and_clip() -> None:
    opt = mo.Optimizer(lambda name: mo.SGD(lr=1.0 if name == "a" else 0.5, momentum=0.5))
    params = {"a": ones(1), "b": ones(1)}
    opt.step(params, {"a": ones(1), "b": 2 * ones(1)})
    opt.load_state_dict({**stepped(mo.SGD(momentum=0.5), "p").state_dict()})
    opt.rename({"a": "b", "b": "a", "p": "q"})
    assert opt.names == ("b", "a")
    assert opt.pending == ("q",)
    assert opt.state("b").slots["momentum_buffer"] == 1
    w = ones(1)
    opt.step({"b": w}, {"b": np.zeros(1, np.float32)})
    assert w == 1 - 1.0 * 0.5


def test_another_rule_keeps_the_clock_and_the_slots_that_fit(library: Library) -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.1))
    params = opt.step({"w": library.param(ones(3))}, {"w": library.grad(ones(3))})
    before = opt.state("w")
    opt.rule = mo.Adam(lr=0.01, amsgrad=True)
    after = opt.state("w")
    assert after.step == 1
    for slot in ("exp_avg", "exp_avg_sq"):
        assert_equal(library.numpy(after.slots[slot]), library.numpy(before.slots[slot]))
    assert_equal(library.numpy(after.slots["max_exp_avg_sq"]), 0 * ones(3))
    opt.rule = lambda name: mo.SGD(lr=0.01, momentum=0.5)
    params = opt.step(params, {"w": library.grad(ones(3))})
    assert list(opt.state("w").slots) == ["momentum_buffer"]
    with pytest.raises(TypeError, match="the rule callable gave None"):
        opt.rule = lambda name: None  # type: ignore[assignment,return-value]
    assert list(opt.state("w").slots) == ["momentum_buffer"]


def test_a_clock_starts_again_with_slots_that_are_all_new() -> None:
    # Averages that start at zero under an old clock would not be corrected: a step of 2.5 lr.
    opt = mo.Optimizer(mo.SGD(lr=0.0))
    w = {"w": np.zeros(1)}
    for _ in range(1000):
        opt.step(w, {"w": np.ones(1)})
    opt.rule = mo.Adam(lr=1.0)
    opt.step(w, {"w": np.ones(1)})
    assert w["w"] == pytest.approx(-1.0)
    opt.rule = mo.SGD(lr=1.0)
    opt.step(w, {"w": np.ones(1)})
    assert opt.state("w").step == 2


def test_a_buffer_that_is_new_is_not_dampened_as_in_torch() -> None:
    opt, w = mo.Optimizer(mo.SGD(lr=1.0)), {"w": np.zeros(1)}
    opt.step(w, {"w": np.ones(1)})
    opt.rule = mo.SGD(lr=1.0, momentum=0.9, dampening=0.5)
    for _ in range(2):
        opt.step(w, {"w": np.ones(1)})
    assert w["w"] == pytest.approx(-(1.0 + 1.0 + 1.4))


def test_another_clip_for_all_names() -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    w: dict[str, Any] = {"a": np.zeros(1), "b": np.zeros(1)}
    grads = {"a": np.ones(1), "b": np.ones(1)}
    opt.step(w, grads)
    opt.clip = lambda name: mo.Clip(value=0.5) if name == "a" else None
    opt.step(w, grads)
    assert (w["a"], w["b"]) == (-1.5, -2.0)
    with pytest.raises(TypeError, match="clip must be a Clip"):
        opt.clip = 0.5  # type: ignore[assignment]
    opt.clip = None
    opt.step(w, grads)
    assert w["a"] == -2.5


@pytest.mark.parametrize("name", ["lr", "on_nonfinite", "rules"])
def test_an_attribute_that_does_not_exist_is_an_error(name: str) -> None:
    opt = mo.Optimizer(mo.Adam())
    with pytest.raises(AttributeError, match=name):
        setattr(opt, name, 1)


def test_an_optimizer_is_true_and_its_copy_is_deep() -> None:
    opt = mo.Optimizer(mo.Adam())
    assert opt
    opt.step({"w": ones(3)}, {"w": ones(3)})
    other = copy.copy(opt)
    opt.step({"w": ones(3)}, {"w": ones(3)})
    assert (opt.state("w").step, other.state("w").step) == (2, 1)


def test_a_torch_parameter_dict_will_do() -> None:
    params = torch.nn.ParameterDict({"w": torch.ones(2)})
    params["w"].grad = torch.ones(2)
    mo.Optimizer(mo.SGD(lr=0.5)).step(params)  # type: ignore[arg-type]
    assert params["w"].tolist() == [0.5, 0.5]


def test_none_is_no_gradient_whatever_the_name() -> None:
    opt, w = mo.Optimizer(mo.SGD(lr=1.0)), {"w": ones(1)}
    opt.step(w, {"w": ones(1), "other": None})
    assert opt.names == ("w",)


def test_a_schedule_is_not_asked_for_a_skipped_name() -> None:
    asked = []
    opt = mo.Optimizer(mo.SGD(lr=lambda step: asked.append(step) or 0.1), on_nonfinite="skip")
    opt.step({"w": ones(3)}, {"w": NAN})
    assert asked == []


def test_a_schedule_that_fails_loses_no_state(tmp_path: Path) -> None:
    rates = [0.5, 0.25]
    opt = mo.Optimizer(mo.SGD(lr=lambda step: rates[step - 1], momentum=0.9))
    state = stepped(mo.SGD(momentum=0.9), "w", steps=9).state_dict()
    opt.load_state_dict(state)
    with pytest.raises(
        ValueError, match="parameter 'w': SGD: the schedule of lr gave no number at s"
    ):
        opt.step({"w": ones(3)}, {"w": ones(3)})
    rates[:] = [0.5] * 10
    opt.step({"w": ones(3)}, {"w": ones(3)})
    rates.clear()
    opt.save(tmp_path / "run")
    assert opt.state_dict()["entries"]["w"]["rule"]["lr"] is None


def test_slots_of_torch_are_copied_on_the_way_in_and_out() -> None:
    opt = mo.Optimizer(mo.SGD(momentum=0.5))
    opt.step({"w": torch.ones(3)}, {"w": torch.ones(3)})
    state = opt.state_dict()
    other = mo.Optimizer(mo.SGD(momentum=0.5))
    other.load_state_dict(state)
    state["entries"]["w"]["slots"]["momentum_buffer"].fill_(9.0)
    assert (other.state_dict()["pending"]["w"]["slots"]["momentum_buffer"] == 1).all()
    other.step({"w": torch.ones(3)}, {"w": torch.zeros(3)})
    assert other.state("w").slots["momentum_buffer"].tolist() == [0.5] * 3


def test_slots_of_jax_outlive_a_donated_copy() -> None:
    opt = mo.Optimizer(mo.SGD(momentum=0.5))
    params = opt.step({"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    opt.state_dict()["entries"]["w"]["slots"]["momentum_buffer"].delete()
    opt.step(params, {"w": jnp.ones(3)})


def test_the_generic_backend_keeps_to_its_device() -> None:
    device = array_api_strict.Device("device1")
    array = array_api_strict.ones(3, dtype=array_api_strict.float32, device=device)
    opt = mo.Optimizer(mo.Adam())
    params = opt.step({"w": array}, {"w": array})
    opt.load_state_dict(opt.state_dict())
    opt.rule = mo.Adam(amsgrad=True)
    params = opt.step(params, {"w": array})
    assert params["w"].device == device
    assert {slot.device for slot in opt.state("w").slots.values()} == {device}


@pytest.mark.parametrize("rule", [mo.SGD(), mo.Adam(), mo.AdamW(weight_decay=0), mo.ClippedAdam()])
def test_a_decay_that_is_off_is_not_computed(library: Library, rule: mo.Rule) -> None:
    # 0 * infinity is NaN, which would spread to the slots.
    opt = mo.Optimizer(rule)
    params = opt.step({"w": library.param(np.inf * ones(1))}, {"w": library.grad(ones(1))})
    assert library.numpy(params["w"]) == np.inf
    assert all(np.isfinite(library.numpy(slot)) for slot in opt.state("w").slots.values())


# Schedules


def test_a_schedule_counts_the_steps_of_its_name() -> None:
    seen = []

    def lr(step: int) -> float:
        seen.append(step)
        return 1.0 / step

    opt = mo.Optimizer(mo.SGD(lr=lr))
    a, b = np.zeros(1), np.zeros(1)
    opt.step({"a": a}, {"a": np.ones(1)})
    opt.step({"a": a, "b": b}, {"a": np.ones(1), "b": np.ones(1)})
    assert seen == [1, 2, 1]
    assert (a.item(), b.item()) == (-1.5, -1.0)


def test_a_momentum_schedule_keeps_its_buffer_through_zero() -> None:
    opt = mo.Optimizer(
        mo.SGD(lr=1.0, momentum=lambda step: 0.0 if step == 2 else 0.5, nesterov=True)
    )
    w = np.zeros(1)
    for _ in range(3):
        opt.step({"w": w}, {"w": np.ones(1)})
    assert opt.state("w").slots["momentum_buffer"] == 1.5
    assert w == -(1.5 + 1.0 + 1.75)


def test_any_number_may_be_scheduled() -> None:
    halves = lambda step: 0.5  # noqa: E731
    scheduled = [
        mo.SGD(lr=halves, momentum=halves, dampening=halves, weight_decay=halves),
        mo.Adam(lr=halves, betas=(halves, halves), eps=halves, weight_decay=halves),
        mo.AdamW(lr=halves, betas=(halves, halves), eps=halves, weight_decay=halves),
        mo.ClippedAdam(
            lr=halves,
            betas=(halves, halves),
            eps=halves,
            weight_decay=halves,
            clip_norm=halves,
            lrd=halves,
        ),
        mo.Adagrad(
            lr=halves,
            lr_decay=halves,
            weight_decay=halves,
            initial_accumulator_value=halves,
            eps=halves,
        ),
        mo.Adadelta(lr=halves, rho=halves, eps=halves, weight_decay=halves),
        mo.AdagradRMSProp(eta=halves, delta=halves, t=halves),
    ]
    for rule in scheduled:
        numbers = {name: (0.5, 0.5) if name == "betas" else 0.5 for name in rule.ranges}
        constant = type(rule)(**numbers)
        assert rule.at(3) == constant
        assert rule.coefficients(3) == constant.coefficients(3)


@pytest.mark.parametrize(
    "rule",
    [
        mo.SGD(momentum=0.9, dampening=0.5),
        mo.Adam(),
        mo.AdamW(),
        mo.ClippedAdam(lrd=0.9),
        mo.Adagrad(lr_decay=0.3, initial_accumulator_value=0.1),
        mo.Adadelta(),
        mo.Rprop(),
        mo.AdagradRMSProp(delta=0.3),
        mo.NAdam(),
        mo.RAdam(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_coefficients_take_arrays_of_steps(rule: mo.Rule) -> None:
    steps = np.array([1, 2, 3, 10, 1000, 123456])
    together = rule.coefficients(steps)
    for i, step in enumerate(steps):
        for array, number in zip(together, rule.coefficients(int(step)), strict=True):
            assert np.broadcast_to(array, steps.shape)[i] == number


# on_nonfinite and the report


NAN = np.array([1.0, np.nan, 1.0], np.float32)


def test_skip_leaves_names_alone_and_out_of_the_norm(library: Library) -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0), mo.Clip(global_norm=1.0, eps=0.0), on_nonfinite="skip")
    params = {name: library.param(ones(3)) for name in "abc"}
    opt.load_state_dict(stepped(mo.SGD(), "b").state_dict())
    grads = {"a": library.grad(3 * ones(3)), "b": library.grad(NAN), "c": library.grad(4 * ones(3))}
    params = opt.step(params, grads)
    assert opt.last.skipped == ("b",)
    assert opt.last.updated == opt.last.new == ("a", "c")
    assert list(opt.last.global_norms.values()) == [pytest.approx(5 * 3**0.5)]
    assert_equal(library.numpy(params["b"]), ones(3))
    assert opt.names == ("a", "c")
    assert opt.pending == ("b",)
    params = opt.step(params, {"a": library.grad(np.inf * ones(3)), "b": library.grad(ones(3))})
    assert [opt.state(name).step for name in "abc"] == [1, 2, 1]


def test_propagate_uses_what_comes(library: Library) -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    params = opt.step({"w": library.param(ones(3))}, {"w": library.grad(NAN)})
    assert_equal(library.numpy(params["w"]), np.array([0.0, np.nan, 0.0], np.float32))


def test_the_report(library: Library) -> None:
    clips = {
        "norm": mo.Clip(norm=1.0),
        "wide": mo.Clip(norm=100.0),
        "value": mo.Clip(value=0.5),
        "loose": mo.Clip(value=5.0),
        "free": None,
    }
    opt = mo.Optimizer(mo.SGD(), lambda name: clips[name])
    params = {name: library.param(ones(4)) for name in clips}
    opt.step(params, {name: library.grad(ones(4)) for name in clips})
    assert opt.last.updated == opt.last.new == tuple(clips)
    assert opt.last.clipped == ("norm", "value")
    assert opt.last.norms == {"norm": 2.0, "wide": 2.0}
    opt.step(params, {"free": library.grad(ones(4))})
    assert opt.last == mo.Report(updated=("free",))


# Copies


@given(history=histories(kinds=("moderate",)))
def test_a_deepcopy_goes_on_alike(library: Library, history: History) -> None:
    opt, _ = history.run(library)
    other = copy.deepcopy(opt)
    name, life = next(iter(history.lives.items()))
    results = []
    for optimizer in (opt, other):
        params = optimizer.step({name: library.param(life.start)}, {name: library.grad(life.start)})
        results.append(library.numpy(params[name]))
    one, two = results
    assert_equal(one, two)
    for (what, a), (_, b) in zip(arrays(other, library), arrays(opt, library), strict=True):
        assert_equal(a, b, what)


def test_pickle_keeps_everything(library: Library) -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.1), mo.Clip(norm=1.0), on_nonfinite="skip")
    params = {"a": library.param(ones(3))}
    params = opt.step(params, {"a": library.grad(ones(3))})
    other = pickle.loads(pickle.dumps(opt))
    assert repr(other) == repr(opt)
    assert other.last.norms == opt.last.norms
    again = {"a": library.param(library.numpy(params["a"]))}
    params = opt.step(params, {"a": library.grad(ones(3))})
    again = other.step(again, {"a": library.grad(ones(3))})
    assert_equal(library.numpy(again["a"]), library.numpy(params["a"]))


def test_two_libraries_share_nothing_but_the_clock() -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.1))
    for library in (NUMPY, TORCH, JAX):
        opt.step({"w": library.param(ones(3))}, {"w": library.grad(ones(3))})
        assert isinstance(opt.state("w").slots["exp_avg"], type(library.grad(ones(3))))
    assert opt.state("w").step == 3
