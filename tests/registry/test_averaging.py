"""Averages of parameters over their steps."""

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optax
import pytest
import torch

import multiopt as mo
from multiopt.rules.rule import NONNEGATIVE, number
from multiopt_kernels.cpu.group import CompiledGroup
from tests.libraries import NUMPY, Library, assert_equal, engine

AVERAGES = [
    mo.Average(),
    mo.Average(start=4),
    mo.Average(decay=0.9),
    mo.Average(decay=0.99, start=3),
    mo.Average(decay=lambda step: 1 - 0.5 / step),
]


def run(
    library: Library, average: Any, steps: int = 12
) -> tuple[mo.Optimizer, list[dict[str, np.ndarray]]]:
    """The optimizer, and the parameters after each step; ``late`` comes at the fifth."""
    opt = mo.Optimizer(mo.Adam(lr=0.1), average=average)
    rng = np.random.default_rng(0)
    params = {name: library.param(rng.standard_normal((3, 4))) for name in ("w", "late")}
    trail = []
    with engine(library.engine):
        for step in range(steps):
            names = ["w", "late"] if step >= 4 else ["w"]
            grads = {name: library.grad(rng.standard_normal((3, 4))) for name in names}
            params = opt.step(params, grads)
            trail.append({name: library.numpy(x).copy() for name, x in params.items()})
    return opt, trail


@pytest.mark.parametrize("average", AVERAGES, ids=repr)
def test_it_is_the_weighted_mean(average: mo.Average) -> None:
    opt, trail = run(NUMPY, average)
    for name, born in (("w", 0), ("late", 4)):
        first = born + int(average.start) - 1
        history = np.array([params[name] for params in trail[first:]])
        k = np.arange(len(history), 0, -1) - 1
        if callable(average.decay):
            continue  # its weights change with the step
        weights = average.decay ** k.astype(float)
        expected = np.tensordot(weights / weights.sum(), history, 1)
        np.testing.assert_allclose(opt.average(name), expected, rtol=1e-12)


def test_exponential_averages_are_optax_s() -> None:
    opt, trail = run(NUMPY, mo.Average(decay=0.9))
    ema = optax.ema(0.9, debias=True)
    state = ema.init(np.zeros((3, 4)))
    for params in trail:
        value, state = ema.update(params["w"], state)
    np.testing.assert_allclose(opt.average("w"), value, rtol=1e-5)


@pytest.mark.parametrize("average", AVERAGES, ids=repr)
def test_equal_on_every_library(library: Library, average: mo.Average) -> None:
    if "float64" not in library.dtypes:
        pytest.skip(f"{library.id} has no float64")
    (opt, trail), (there, trail_there) = run(NUMPY, average), run(library, average)
    for name in ("w", "late"):
        assert_equal(trail[-1][name], trail_there[-1][name], name)
        assert_equal(opt.average(name), library.numpy(there.average(name)), name)


def test_a_mean_of_noisy_iterates_is_closer() -> None:
    rng = np.random.default_rng(1)
    w = {"w": np.full(50, 3.0)}
    opt = mo.Optimizer(mo.SGD(lr=0.1), average=mo.Average(start=200))
    for _ in range(3000):
        opt.step(w, {"w": w["w"] + rng.standard_normal(50)})
    assert np.linalg.norm(opt.average("w")) < 0.2 * np.linalg.norm(w["w"])


def test_by_name() -> None:
    asked: list[str] = []

    def average(name: str) -> mo.Average | None:
        asked.append(name)
        return mo.Average() if name == "w" else None

    opt, trail = run(NUMPY, average)
    assert sorted(asked) == ["late", "w"]
    np.testing.assert_allclose(opt.average("w"), np.mean([p["w"] for p in trail], axis=0))
    with pytest.raises(KeyError, match="no average of parameter 'late': none is kept"):
        opt.average("late")


def test_skipped_steps_do_not_count() -> None:
    w, opt = {"w": np.zeros(1)}, mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average())
    opt = mo.Optimizer(mo.SGD(lr=1.0), on_nonfinite="skip", average=mo.Average())
    for grad in (-1.0, np.nan, -2.0):
        opt.step(w, {"w": np.array([grad])})
    assert opt.average("w").item() == 2.0  # of 1 and 3


def test_the_average_is_a_copy() -> None:
    opt, _ = run(NUMPY, mo.Average())
    opt.average("w")[...] = 7
    assert (opt.average("w") != 7).all()


@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "deepcopy"])
def test_it_is_saved_with_the_state(how: str, tmp_path: Path) -> None:
    def make() -> mo.Optimizer:
        return mo.Optimizer(mo.Adam(lr=0.1), average=mo.Average(start=2))

    def go_on(opt: mo.Optimizer, w: dict[str, np.ndarray]) -> None:
        for step in range(3):
            opt.step(w, {"w": np.sin(w["w"] + step)})

    opt, w = make(), {"w": np.linspace(-1, 1, 5)}
    go_on(opt, w)
    resumed, its = make(), {"w": w["w"].copy()}
    if how == "state_dict":
        resumed.load_state_dict(opt.state_dict())
    elif how == "file":
        opt.save(tmp_path / "file")
        resumed.load(tmp_path / "file")
        assert_equal(resumed.average("w"), opt.average("w"))
        resumed.save(tmp_path / "again")
        resumed = make()
        resumed.load(tmp_path / "again")
    else:
        resumed = pickle.loads(pickle.dumps(opt)) if how == "pickle" else copy.deepcopy(opt)
    go_on(opt, w)
    go_on(resumed, its)
    assert_equal(resumed.average("w"), opt.average("w"))
    opt.load_state_dict(resumed.state_dict())
    assert_equal(resumed.average("w"), opt.average("w"))


def test_state_without_an_average_begins_one() -> None:
    w, plain = {"w": np.ones(2)}, mo.Optimizer(mo.SGD(lr=0.5))
    plain.step(w, {"w": np.ones(2)})
    opt = mo.Optimizer(mo.SGD(lr=0.5), average=mo.Average())
    for _ in range(2):
        opt.load_state_dict(plain.state_dict())
        opt.step(w, {"w": np.ones(2)})
        assert_equal(opt.average("w"), w["w"])


@pytest.mark.parametrize("average", [None, lambda name: None])
def test_averages_that_nobody_keeps_are_refused(average: Any) -> None:
    opt, _ = run(NUMPY, mo.Average())
    other = mo.Optimizer(mo.Adam(), average=average)
    with pytest.raises(ValueError, match="averages of 'w', 'late'"):
        other.load_state_dict(opt.state_dict())
    assert other.pending == ()


def test_forget_and_rename() -> None:
    opt, _ = run(NUMPY, mo.Average())
    kept = opt.average("w")
    opt.rename({"w": "v"})
    assert_equal(opt.average("v"), kept)
    opt.forget("v")
    with pytest.raises(KeyError, match="no average of parameter 'v'"):
        opt.average("v")
    opt.step({"v": np.zeros(2)}, {"v": np.ones(2)})
    assert opt.average("v").shape == (2,)


def test_half_precision_is_averaged_in_float32() -> None:
    w = {"w": np.ones(2, np.float16)}
    opt = mo.Optimizer(mo.SGD(lr=0.5), average=mo.Average())
    for _ in range(3):
        opt.step(w, {"w": np.ones(2, np.float16)})
    assert opt.average("w").dtype == np.float32
    assert opt.average("w").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decay": 0.0}, "decay must be a number > 0 and <= 1"),
        ({"decay": 1.1}, "decay must be a number > 0 and <= 1"),
        ({"start": 0}, "start must be an integer >= 1"),
        ({"start": 1.5}, "start must be an integer >= 1"),
    ],
)
def test_wrong_values_are_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        mo.Average(**arguments)


def test_what_is_no_average_is_refused() -> None:
    with pytest.raises(TypeError, match="average must be an Average"):
        mo.Optimizer(mo.SGD(), average=0.9)  # type: ignore[arg-type]
    opt = mo.Optimizer(mo.SGD(), average=lambda name: 0.9)  # type: ignore[arg-type,return-value]
    w = {"w": np.ones(1)}
    with pytest.raises(TypeError, match=r"average callable gave 0\.9 for parameter 'w'"):
        opt.step(w, {"w": np.ones(1)})
    assert w["w"].item() == 1.0
    assert len(opt) == 0


@pytest.mark.parametrize("name", ["compiled", "blocks", "plain"])
def test_averages_of_tensors_need_no_copy_that_torch_warns_of(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", name)
    opt, w = mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average()), torch.zeros(3)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for _ in range(3):
            opt.step({"w": w}, {"w": torch.ones(3)})
    finally:
        torch.set_warn_always(before)
    assert opt.average("w").tolist() == [-2.0, -2.0, -2.0]


def test_a_step_whose_average_does_not_fit_changes_nothing() -> None:
    """SGD has no slot whose shape would be wrong first."""
    opt, its = (mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average()) for _ in range(2))
    opt.step({"w": np.zeros(3)}, {"w": np.ones(3)})
    its.load_state_dict(opt.state_dict())
    w = {"w": np.zeros(2)}
    with pytest.raises(ValueError, match=r"'average' of parameter 'w' has shape \(3,\)"):
        its.step(w, {"w": np.ones(2)})
    assert (w["w"].tolist(), its.names, its.pending, its.steps) == ([0.0, 0.0], (), ("w",), 1)


def test_an_average_that_waits_goes_with_the_state_it_came_with() -> None:
    opt, its = (mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average()) for _ in range(2))
    plain = mo.Optimizer(mo.SGD(lr=1.0))
    for each in (opt, plain):
        each.step({"w": np.zeros(3)}, {"w": np.ones(3)})
    its.load_state_dict(opt.state_dict())
    its.load_state_dict(plain.state_dict())
    assert its.state_dict()["pending_averages"] == {}


def test_a_loaded_average_of_a_name_seen_without_one_is_there_at_once_or_does_not_fit() -> None:
    source = mo.Optimizer(mo.SGD(), average=mo.Average())
    source.step({"w": np.ones(3)}, {"w": np.ones(3)})
    state = source.state_dict()
    for size in (3, 2):
        opt = mo.Optimizer(mo.SGD(), average=mo.Average())
        plain = mo.Optimizer(mo.SGD())
        plain.step({"w": np.ones(size)}, {"w": np.ones(size)})
        opt.step({"w": np.ones(size)}, {"w": np.ones(size)})
        # Its average is gone, for it came from where none was kept.
        opt.load_state_dict(plain.state_dict())
        with pytest.raises(KeyError, match="none is kept"):
            opt.average("w")
        if size == 3:
            opt.load_state_dict(state)
            assert opt.average("w").tolist() == source.average("w").tolist()
        else:
            with pytest.raises(ValueError, match="'average' of parameter 'w' has shape"):
                opt.load_state_dict(state)


def test_a_choice_that_a_failed_step_made_is_no_name_s() -> None:
    asked = []

    def average(name: str) -> mo.Average | None:
        asked.append(name)
        return None if name == "x" else mo.Average()

    opt = mo.Optimizer(mo.SGD(lr=1.0), on_nonfinite="raise", average=average)
    w, good = np.ones(2), np.ones(2)
    opt.step({"w": w}, {"w": good})
    for _ in range(2):
        with pytest.raises(ValueError, match="infinities or NaNs"):
            opt.step({"x": np.ones(2)}, {"x": np.array([1, np.nan])})
    assert asked == ["w", "x", "x"]
    opt.rename({"w": "x"})
    opt.step({"x": w}, {"x": good})
    assert opt.average("x").tolist() == [-0.5, -0.5]


def test_a_choice_that_a_failed_load_made_goes_where_its_name_is_taken() -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0), average=lambda name: None if name == "x" else mo.Average())
    w, good = np.ones(2), np.ones(2)
    opt.step({"w": w}, {"w": good})
    other = mo.Optimizer(mo.SGD(), average=mo.Average())
    other.step({"x": np.ones(2)}, {"x": good})
    with pytest.raises(ValueError, match="averages of 'x'"):
        opt.load_state_dict(other.state_dict())
    opt.rename({"w": "x"})
    opt.step({"x": w}, {"x": good})
    assert opt.average("x").tolist() == [-0.5, -0.5]


def test_a_shared_schedule_of_an_average_counts_the_steps_of_the_whole(tmp_path: Path) -> None:
    counts: list[int] = []

    def decay(step: int) -> float:
        counts.append(step)
        return 1 - 0.5 / step

    def make() -> mo.Optimizer:
        average = mo.Average(decay=mo.schedules.Shared(decay))
        return mo.Optimizer(
            mo.SGD(lr=0.1), average=lambda name: None if name == "none" else average
        )

    def steps(opt: mo.Optimizer, numbers: range) -> None:
        for k in numbers:
            name = ("a", "none", "b")[k % 3]
            opt.step({name: params[name]}, {name: np.full(2, float(k))})

    params = {name: np.ones(2) for name in ("a", "none", "b")}
    opt = make()
    steps(opt, range(7))
    opt.save(tmp_path / "run")
    kept = copy.deepcopy(params)
    steps(opt, range(7, 12))
    assert list(dict.fromkeys(counts)) == [1, 3, 4, 6, 7, 9, 10, 12]
    params, resumed = kept, make()
    resumed.load(tmp_path / "run")
    resumed.load(tmp_path / "run", names=[])
    counts.clear()
    steps(resumed, range(7, 12))
    assert list(dict.fromkeys(counts)) == [9, 10, 12]
    assert all((resumed.average(name) == opt.average(name)).all() for name in "ab")


def test_averages_of_names_without_an_entry_are_refused() -> None:
    opt = mo.Optimizer(mo.SGD(), average=mo.Average())
    opt.step({"a": np.ones(2)}, {"a": np.ones(2)})
    state = opt.state_dict()
    state["averages"]["z"] = state["averages"]["a"]
    with pytest.raises(mo.CheckpointError, match=r"averages of \['z'\]"):
        mo.Optimizer(mo.SGD(), average=mo.Average()).load_state_dict(state)


def mean_of(opt: mo.Optimizer, name: str = "w") -> list[float]:
    """An average as numbers, which is plain data whatever the library."""
    mean: list[float] = np.asarray(opt.average(name)).tolist()
    return mean


@pytest.mark.parametrize("name", ["compiled", "blocks", "plain"])
def test_the_mean_of_16_bits_is_of_what_the_rule_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of a parameter whose changes are too small for it moves all the same."""
    monkeypatch.setenv("MULTIOPT_ENGINE", name)
    for masters in (False, True):
        opt = mo.Optimizer(mo.SGD(lr=2.0**-14), average=mo.Average(), master_weights=masters)
        w = {"w": np.ones(2, np.float16)}
        for _ in range(2):
            opt.step(w, {"w": np.ones(2, np.float16)})
        assert w["w"].tolist() == [1.0, 1.0]
        # Without a master copy both steps begin at 1.
        assert mean_of(opt) == [1 - (1.5 if masters else 1.0) * 2.0**-14] * 2


@pytest.mark.parametrize("name", ["compiled", "blocks", "plain"])
def test_the_count_goes_on_where_the_clock_starts_over(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", name)

    asked: list[int] = []
    w = {"w": np.zeros(1), "v": np.zeros(1)}
    seen, counts = [], []

    def make(rule: mo.Rule) -> mo.Optimizer:
        return mo.Optimizer(rule, average=mo.Average(decay=lambda k: asked.append(k) or 1.0))

    def step(opt: mo.Optimizer, *names: str) -> None:
        asked.clear()
        opt.step({n: w[n] for n in names}, {n: np.ones(1) for n in names})
        counts.append(tuple(asked))
        seen.append(w["w"].item())

    opt = make(mo.SGD(lr=1.0))
    step(opt, "w", "v")
    step(opt, "w")
    opt.rule = mo.Adam(lr=0.5)
    assert opt.state("w").step == 0
    step(opt, "w", "v")
    assert (opt.state("w").step, opt.state_dict()["averages"]["w"]["step"]) == (1, 3)
    np.testing.assert_allclose(opt.average("w"), np.mean(seen), rtol=1e-14)
    opt.set_hyperparameters(lr=0.25)
    step(opt, "w", "v")
    opt.save(tmp_path / "file")
    resumed = make(mo.Adam(lr=0.25))
    resumed.load(tmp_path / "file")
    step(resumed, "w", "v")
    np.testing.assert_allclose(resumed.average("w"), np.mean(seen), rtol=1e-14)
    # Each is asked for its own steps: w has taken two when v has taken one.
    assert counts == [(1,), (2,), (3, 2), (4, 3), (5, 4)]


def test_a_schedule_out_of_its_range_changes_nothing() -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average(decay=lambda k: 3.0 - k))
    w = {"w": np.zeros(1)}
    with pytest.raises(ValueError, match=r"parameter 'w': Average: decay must be .* got 2.0 at st"):
        opt.step(w, {"w": np.ones(1)})
    assert (w["w"].item(), opt.names, opt.steps) == (0.0, (), 0)


def test_an_array_that_a_step_returns_is_no_average(library: Library) -> None:
    """At the first step the average is the parameter, which is the caller's."""
    if library.id.startswith("jax"):
        pytest.skip("arrays that nobody writes")
    opt = mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average())
    with engine(library.engine):
        w = opt.step({"w": library.param(np.zeros(2))}, {"w": library.grad(np.ones(2))})["w"]
        with torch.no_grad():
            w[0] = 7.0
        assert library.numpy(opt.average("w")).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    "rule",
    [mo.Muon(lr=0.1), mo.Adafactor(lr=0.1), mo.LAMB(lr=0.1)],
    ids=lambda rule: repr(rule)[:5],
)
def test_averages_of_rules_that_treat_a_parameter_as_a_whole(rule: mo.Rule) -> None:
    opt, plain = mo.Optimizer(rule, average=mo.Average()), mo.Optimizer(rule)
    w, v = ({"w": np.linspace(-1, 1, 6).reshape(2, 3)} for _ in range(2))
    seen = []
    for _ in range(4):
        opt.step(w, {"w": np.sin(w["w"])})
        plain.step(v, {"w": np.sin(v["w"])})
        seen.append(w["w"].copy())
    assert_equal(w["w"], v["w"])
    np.testing.assert_allclose(opt.average("w"), np.mean(seen, axis=0), rtol=1e-12)
    assert opt.state("w").slots.keys() == plain.state("w").slots.keys()
    assert opt.state_dict()["entries"].keys() == plain.state_dict()["entries"].keys()
    with pytest.raises(ValueError, match=f"for {type(rule).__name__} treats"):
        opt.step({"z": np.zeros((2, 3), complex)}, {"z": np.ones((2, 3), complex)})


def tail(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    """Step by the only coefficient, and count steps in a slot that has an average's name."""
    (rate,) = c
    return param - rate * grad, (slots[0] + rate * grad,)


@dataclass(frozen=True)
class Tail(mo.Rule):
    """A rule whose names are those of an average too."""

    decay: float = number(0.5, NONNEGATIVE)
    start: float = number(1.0, NONNEGATIVE)
    since: float = number(0.0, NONNEGATIVE)
    average: float = number(0.0, NONNEGATIVE)

    slots: ClassVar = ("average",)
    update: ClassVar = staticmethod(tail)

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        return dict(share=h.decay + h.average + 0.0 * (step + h.start + h.since))


@dataclass(frozen=True)
class Fixed(mo.Rule):
    """A rule without hyperparameters."""

    slots: ClassVar = ()
    update: ClassVar = staticmethod(lambda xp, param, grad, slots, c: (param - c.lr * grad, slots))

    @classmethod
    def scalars(cls, h: Any, step: Any) -> dict[str, Any]:
        return dict(lr=1.0)


@pytest.mark.parametrize("rule", [Tail(), Fixed()], ids=repr)
@pytest.mark.parametrize("name", ["compiled", "blocks", "plain"])
def test_a_rule_of_ones_own_and_its_average_keep_apart(
    name: str, rule: mo.Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", name)
    opt, plain = mo.Optimizer(rule, average=mo.Average(decay=0.5, start=2)), mo.Optimizer(rule)
    w, v = {"a": np.ones(3), "b": np.ones(2)}, {"a": np.ones(3), "b": np.ones(2)}
    expected = np.zeros(3)
    for k in range(5):
        names = "ab" if k % 2 else "a"
        for each, params in ((opt, w), (plain, v)):
            each.step({n: params[n] for n in names}, {n: np.cos(params[n]) for n in names})
        count = max(k, 1)
        share = 0.5 / (1 - 0.5**count)
        expected = w["a"].copy() if count == 1 else expected + share * (w["a"] - expected)
    for n in "ab":
        assert_equal(w[n], v[n])
        ours, theirs = opt.state(n), plain.state(n)
        assert ours.step == theirs.step
        assert ours.slots.keys() == theirs.slots.keys()
        for slot, array in theirs.slots.items():
            assert_equal(ours.slots[slot], array)
    assert opt.hyperparameters("a") == plain.hyperparameters("a")
    np.testing.assert_allclose(opt.average("a"), expected, rtol=1e-13)
    assert opt.rule == rule
    if name == "compiled":
        group, _ = opt._registry.row_of("a")
        assert type(group).__name__ == "CompiledGroup"


@pytest.mark.parametrize("name", ["compiled", "blocks", "plain"])
def test_numbers_and_rules_change_as_without_an_average(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", name)

    def run(average: Any) -> tuple[mo.Optimizer, dict[str, np.ndarray]]:
        opt = mo.Optimizer(mo.Adam(lr=0.5), average=average)
        params = {n: np.linspace(-1, 1, 4) for n in "abc"}

        def step(names: str) -> None:
            opt.step({n: params[n] for n in names}, {n: np.sin(params[n]) for n in names})

        step("ab")
        opt.set_hyperparameters("a", lr=0.25, betas=(0.5, lambda k: 0.9))
        step("abc")
        opt.set_hyperparameters(lr=0.125)
        step("abc")
        opt.set_hyperparameters("b", amsgrad=True)
        opt.clip = mo.Clip(norm=0.5)
        step("abc")
        opt.rule = lambda n: mo.SGD(momentum=0.5) if n == "a" else mo.AdamW(lr=lambda k: 0.1 / k)
        step("ac")
        return opt, params

    (opt, w), (plain, v) = run(lambda n: mo.Average() if n != "b" else None), run(None)
    for n in "abc":
        assert_equal(w[n], v[n])
        assert opt.hyperparameters(n) == plain.hyperparameters(n)
        assert opt.state(n).step == plain.state(n).step
    counts = {n: one["step"] for n, one in opt.state_dict()["averages"].items()}
    assert counts == {"a": 5, "c": 4}


def test_an_averaged_rule_runs_as_the_rule_does() -> None:
    """The kernel computes the coefficients of both."""
    opt = mo.Optimizer(mo.Adam(), average=mo.Average(decay=0.9))
    opt.step({"w": np.ones(2, np.float32)}, {"w": np.ones(2, np.float32)})
    group = opt._registry.row_of("w")[0]
    assert type(group) is CompiledGroup
    assert not group._host_coefficients
    assert [type(group) for group in opt._registry._groups.values()] == [CompiledGroup]
