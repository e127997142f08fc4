"""Compiled kernels: which rules have one, when they are compiled again, and what a step costs."""

import math
import os
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import multiopt as mo
from multiopt_kernels import engines
from multiopt_kernels.cpu import team
from multiopt_kernels.cpu.shares import borders
from tests.cases import CASES, Case
from tests.libraries import assert_equal, engine

ROOT = Path(__file__).parents[2]


def engine_of(rule: mo.Rule, dtype: str) -> Any:
    """What updates NumPy arrays by a rule; None if the rule itself does."""
    return engines._engine_of(rule, dtype, dtype, False)


#: Those whose coefficients need a function of the host.
GIVEN = (mo.NAdam, mo.ASGD, mo.AdagradRMSProp)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_rule_has_a_kernel(case: Case, dtype: str) -> None:
    found = engine_of(case.rule, dtype)
    assert isinstance(found.kernel, team.Kernel)
    assert found.host_coefficients == isinstance(case.rule, GIVEN)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_coefficients_of_the_host_are_those_of_the_kernel(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for uniform in (True, False):
        if not uniform:
            monkeypatch.setattr(engines, "traced_scalars", lambda rule: None)
        monkeypatch.setattr(engines, "_engines", {})
        opt = mo.Optimizer(case.rule)
        params = {name: np.linspace(-1, 1, 9, dtype=np.float32) for name in "abc"}
        with engine("compiled"):
            for names in ("abc", "ab", "a", "abc"):
                opt.step({n: params[n] for n in names}, {n: np.cos(params[n]) for n in names})
        results.append(params)
    for name in "abc":
        assert_equal(results[0][name], results[1][name], name)


class Odd(mo.SGD):
    """A rule of somebody else's, to be given an update."""


def with_update(update: Any) -> mo.Rule:
    kind = type("Own", (Odd,), {"update": property(lambda self: update)})
    rule: mo.Rule = kind(lr=0.1)
    return rule


def halved(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return param - c.lr * (grad / 2.0), slots


def not_elementwise(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return param - c.lr * (grad - xp.mean(grad)), slots


@pytest.mark.parametrize("update", [halved, not_elementwise])
def test_what_cannot_be_traced_runs_as_it_stands(update: Any) -> None:
    rule = with_update(update)
    assert engine_of(rule, "float32") is None
    results = []
    for name in ("compiled", "blocks", "plain"):
        w, opt = np.linspace(-1, 1, 5000, dtype=np.float32), mo.Optimizer(rule)
        with engine(name):
            for _ in range(3):
                opt.step({"w": w}, {"w": np.sin(w)})
        results.append(w)
    assert_equal(results[0], results[2])
    assert_equal(results[1], results[2])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_formulas_are_told_apart_and_equal_ones_share_a_kernel(dtype: str) -> None:
    def scaled_by(number: float) -> mo.Rule:
        return with_update(lambda xp, p, g, s, c: (p - c.lr * (number * g), s))

    first = engine_of(scaled_by(0.5), dtype)
    assert engine_of(scaled_by(0.25), dtype).kernel is not first.kernel
    assert engine_of(scaled_by(-0.5), dtype).kernel is not first.kernel
    assert engine_of(scaled_by(0.5), dtype).kernel is first.kernel


PROGRAM = """
    import sys
    import numpy as np
    import multiopt as mo
    from my_rule import Mine
    w = np.ones(3, np.float32)
    mo.Optimizer(Mine(lr=1.0)).step({"w": w}, {"w": np.ones(3, np.float32)})
    print(w[0], "numba" in sys.modules)
"""

RULE = """
    import multiopt as mo
    from my_helper import ONE, direction

    def update(xp, param, grad, slots, c):
        return param - c.lr * (ONE * direction(grad)), slots

    class Mine(mo.SGD):
        update = property(lambda self: update)
"""

HELPER = """
    ONE = NUMBER

    def direction(grad):
        return EXPRESSION
"""


def test_an_edited_rule_is_compiled_again_and_ten_runs_leave_one_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def run(expression: str, number: str = "1.0") -> list[str]:
        for name, text in (("my_rule", RULE), ("my_helper", HELPER), ("program", PROGRAM)):
            source = textwrap.dedent(text).replace("EXPRESSION", expression)
            source = source.replace("NUMBER", number)
            (tmp_path / f"{name}.py").write_text(source)
        path = os.pathsep.join(map(str, (ROOT, ROOT / "backends", tmp_path)))
        environment = {
            **os.environ,
            "MULTIOPT_CACHE_DIR": str(cache),
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [sys.executable, str(tmp_path / "program.py")]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        return result.stdout.split()

    assert run("grad") == ["0.0", "True"]
    files = sorted(cache.iterdir())
    for _ in range(3):
        # From the disk, without Numba.
        assert run("grad") == ["0.0", "False"]
    assert sorted(cache.iterdir()) == files
    # The rule's own file stays as it is; a function that it calls is another, or a number.
    assert run("grad + grad") == ["-1.0", "True"]
    assert run("grad", number="3.0") == ["-2.0", "True"]
    assert run("grad") == ["0.0", "False"]


#: A function of a user's that needs Numba's runtime, and an overload that kernels need as well.
THEIRS = """
@numba.njit
def theirs(n):
    return np.arange(min(n, 10)).sum()
assert theirs(20) == 45
from numba.core.runtime.nrt import rtsys
assert type(rtsys.library).__module__.startswith("numba.")
"""
OURS = """
w = np.zeros(3)
mo.Optimizer(mo.SGD(lr=0.5), mo.Clip(norm=10.0)).step({"w": w}, {"w": np.ones(3)})
assert w.tolist() == [-0.5] * 3
"""


@pytest.mark.parametrize("first", [THEIRS, OURS], ids=["first theirs", "first ours"])
def test_functions_of_users_are_compiled_as_ever(first: str, tmp_path: Path) -> None:
    program = "import numba, numpy as np, multiopt as mo\n" + first + THEIRS + OURS + THEIRS
    env = {**os.environ, "MULTIOPT_CACHE_DIR": str(tmp_path), "MULTIOPT_ENGINE": "compiled"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "backends")))
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir())


def test_a_step_needs_next_to_no_memory() -> None:
    size = 1_000_000
    for name in ("compiled", "blocks"):
        with engine(name):
            for clip in (None, mo.Clip(norm=1.0), mo.Clip(global_norm=1.0, value=0.5)):
                opt = mo.Optimizer(mo.Adam(), clip)
                params, grads = {"w": np.ones(size)}, {"w": np.ones(size)}
                for _ in range(2):
                    opt.step(params, grads)
                tracemalloc.start()
                opt.step(params, grads)
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
                # A copy of the parameter would be 8 MB.
                assert peak < 4e6, (name, clip)


def test_norms_of_many_small_gradients_need_next_to_no_memory() -> None:
    params, grads = ({f"w{k}": np.ones(10) for k in range(30_000)} for _ in range(2))
    opt = mo.Optimizer(mo.SGD(), mo.Clip(norm=1.0), threads=2)
    for _ in range(2):
        opt.step(params, grads)
    tracemalloc.start()
    opt.step(params, grads)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # An exact sum for each would be 26 MB.
    assert peak < 8e6


def test_shares_of_the_work_cover_every_block_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.choice([0, 1, 10, 4095, 4096, 4097, 100_000, 1_000_000], rng.integers(1, 20))
        shares = int(rng.integers(1, 40))
        done = [[] for _ in sizes]  # type: list[list[int]]
        for k0, b0, k1, b1 in borders(sizes, shares).tolist():
            for k in range(k0, k1 + 1 if b1 > 0 else k1):
                last = -(-int(sizes[k]) // 4096)
                done[k] += range(b0 if k == k0 else 0, min(b1, last) if k == k1 else last)
        for size, blocks in zip(sizes.tolist(), done, strict=True):
            assert blocks == list(range(-(-size // 4096)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {"large": (700_001,), "matrix": (300, 1000), "small": (10,), "empty": (0,)}
    start = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    grads = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    clips = {"large": mo.Clip(norm=1.0), "matrix": mo.Clip(global_norm=2.0, value=0.01)}

    def run(name: str, threads: int | None) -> dict[str, np.ndarray]:
        params = {name: x.copy() for name, x in start.items()}
        with engine(name):
            opt = mo.Optimizer(mo.AdamW(), clips.get, threads=threads)
            for _ in range(3):
                opt.step(params, grads)
        return params

    expected = run("plain", None)
    for name, param in run("compiled", threads).items():
        assert_equal(param, expected[name], name)


@pytest.mark.parametrize("rule", [mo.Adam(), mo.LAMB()], ids=lambda rule: type(rule).__name__)
def test_work_is_divided_again_when_it_is_other_work(rule: mo.Rule) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (200_001,), "b": (70_000,), "c": (300, 300), "d": (10,), "e": (100_000,)}
    start = {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    everything, some = list(shapes), ["a", "c", "d"]
    # The same names twice, in another order, some of them, and as many others.
    turns = [everything, everything, everything[::-1], some, some, ["b", "c", "e"], everything]

    def run(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        rng = np.random.default_rng(1)
        params = {name: x.copy() for name, x in start.items()}
        with engine(name):
            opt = mo.Optimizer(rule, mo.Clip(value=1.0), threads=2)
            for names in turns:
                grads = {n: rng.standard_normal(shapes[n]).astype("f4") for n in names}
                opt.step({n: params[n] for n in names}, grads)
            # A name that comes back with another size, in the row that it had.
            opt.forget("a")
            params["a"] = rng.standard_normal(400_000).astype("f4")
            grads = {n: rng.standard_normal(x.shape).astype("f4") for n, x in params.items()}
            opt.step(params, grads)
            opt.step(params, grads)
        return params, grads

    for got, expected in zip(run("compiled"), run("plain"), strict=True):
        for name, x in got.items():
            assert_equal(x, expected[name], name)


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_a_number_of_threads_is_an_integer_from_one(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be an integer >= 1 or None"):
        mo.Optimizer(mo.Adam(), threads=threads)


def test_an_unknown_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIOPT_ENGINE", "steam")
    with pytest.raises(
        ValueError, match="MULTIOPT_ENGINE is 'steam'; expected compiled, blocks or"
    ):
        mo.Optimizer(mo.Adam()).step({"w": np.ones(1)}, {"w": np.ones(1)})


@pytest.mark.parametrize("make", [lambda x: x.copy(), lambda x: torch.from_numpy(x.copy())])
def test_without_a_look_at_objects_python_looks(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    # As where torch has no table of DLPack functions, or Python is not CPython.
    grads = [np.random.default_rng(i).standard_normal(50).astype("f4") for i in range(4)]

    def run() -> np.ndarray:
        params = {"a": make(np.ones(50, np.float32)), "b": make(np.ones(50, np.float32))}
        opt = mo.Optimizer(mo.Adam(), mo.Clip(norm=1.0))
        for grad in grads:
            opt.step(params, {"a": make(grad), "b": make(-grad)})
        return np.concatenate([np.asarray(x) for x in params.values()])

    expected = run()
    monkeypatch.setattr("multiopt_numpy.backend._look", lambda: None)
    monkeypatch.setattr("multiopt_torch.backend._look", lambda: None)
    assert_equal(run(), expected)


class Rate(NamedTuple):
    lr: float


class SwitchedRate(NamedTuple):
    lr: float
    on: bool


def plainly(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    return param - c.lr * grad, slots


def over_the_mean(xp: Any, param: Any, grad: Any, slots: Any, c: Any) -> Any:
    if c.on:
        grad = grad / xp.mean(xp.abs(grad))
    return param - c.lr * grad, slots


@pytest.mark.parametrize("name", ["compiled", "blocks"])
@pytest.mark.parametrize(
    ("numbers", "update"),
    [
        (lambda h, step: Rate(h.lr / (1 - h.momentum**step)), plainly),
        (lambda h, step: Rate(math.pow(h.momentum, step)), plainly),
        (lambda h, step: Rate(h.lr / math.sqrt(step)), plainly),
        (lambda h, step: Rate(h.lr if step < 3 else h.momentum), plainly),
        (lambda h, step: Rate(min(h.lr, h.momentum)), plainly),
        (lambda h, step: SwitchedRate(h.lr, h.momentum != 0.9), over_the_mean),
    ],
    ids=["**", "pow", "sqrt", "branch", "min", "a switch that cannot be traced"],
)
def test_coefficients_of_any_kind_give_equal_results(name: str, numbers: Any, update: Any) -> None:
    body = {
        "slots": (),
        "update": property(lambda self: update),
        "scalars": classmethod(lambda cls, h, step: numbers(h, step)),
    }
    rule_class: Any = type("Own", (mo.SGD,), body)

    def rule(name: str) -> mo.Rule:
        own: mo.Rule = rule_class(
            lr=0.1 if name == "a" else 0.2, momentum=0.9 + 0.01 * (name > "a")
        )
        return own

    def run(name: str) -> dict[str, np.ndarray]:
        opt, params = mo.Optimizer(rule), {"a": np.linspace(1, 2, 50)}
        with engine(name):
            for step in range(40):
                if step == 3:
                    params["b"] = np.linspace(3, 4, 50)
                opt.step(params, {key: np.sin(x) for key, x in params.items()})
        return params

    expected = run("plain")
    for key, param in run(name).items():
        assert_equal(param, expected[key], key)
