"""Averages of parameters over their steps."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch

import multiopt as mo
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
        with pytest.raises(KeyError, match="its loaded state is pending"):
            resumed.average("w")
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
