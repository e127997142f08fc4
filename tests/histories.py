"""Random lives of parameters: rules, clips, shapes, dtypes, values, and which step has which."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

import multiopt as mo
from multiopt import rules as registered
from tests.cases import options
from tests.libraries import NUMPY, Library, assert_equal, engine

#: Sizes on both sides of a block of the compiled engine, and of several.
SIZES = [0, 1, 2, 3, 10, 17, 4095, 4096, 4097, 9000, 40_000]


@dataclass
class Life:
    """One parameter: how it begins, and its gradient at each step, None where it has none."""

    rule: mo.Rule
    clip: mo.Clip | None
    start: np.ndarray
    grads: list[np.ndarray | None]


@dataclass
class History:
    """Parameters by name."""

    lives: dict[str, Life]

    @property
    def steps(self) -> int:
        return len(next(iter(self.lives.values())).grads)

    def optimizer(self) -> mo.Optimizer:
        return mo.Optimizer(lambda name: self.lives[name].rule, lambda name: self.lives[name].clip)

    def start(self, library: Library) -> dict[str, Any]:
        return {name: library.param(life.start) for name, life in self.lives.items()}

    def grads(self, library: Library, step: int) -> dict[str, Any]:
        return {
            name: library.grad(grad)
            for name, life in self.lives.items()
            if (grad := life.grads[step]) is not None
        }

    def run(
        self, library: Library, order: Callable[[list[str]], list[str]] = list
    ) -> tuple[mo.Optimizer, dict[str, np.ndarray]]:
        """Live the history on one library."""
        opt, params = self.optimizer(), self.start(library)
        with engine(library.engine):
            for step in range(self.steps):
                grads = self.grads(library, step)
                params = opt.step({n: params[n] for n in order(list(params))}, grads)
        return opt, {name: library.numpy(param) for name, param in params.items()}


def arrays(opt: mo.Optimizer, library: Library) -> Iterator[tuple[str, np.ndarray]]:
    """Every slot of an optimizer, in NumPy, with a word for messages."""
    for name in sorted(opt.names):
        for slot, array in opt.state(name).slots.items():
            yield f"{slot} of {name}", library.numpy(array)


def assert_same_run(
    actual: tuple[mo.Optimizer, dict[str, np.ndarray]],
    expected: tuple[mo.Optimizer, dict[str, np.ndarray]],
    library: Library,
    reference: Library = NUMPY,
) -> None:
    for name, param in expected[1].items():
        assert_equal(actual[1][name], param, f"parameter {name}")
    for (what, a), (_, b) in zip(
        arrays(actual[0], library), arrays(expected[0], reference), strict=True
    ):
        assert_equal(a, b, what)
    for name in expected[0].names:
        assert actual[0].state(name).step == expected[0].state(name).step


def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, kind: str) -> np.ndarray:
    """Numbers of a kind: moderate, over the whole exponent range, or with all special values."""
    x = rng.standard_normal(shape)
    if kind != "moderate":
        info = ml_dtypes.finfo(dtype)
        exponents = rng.uniform(info.minexp - info.nmant, info.maxexp - 3, shape)
        x = np.asarray(x * np.exp2(exponents))
    x = np.asarray(x, dtype)
    if kind == "special":
        tiny = ml_dtypes.finfo(dtype).smallest_subnormal
        specials = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, tiny, -tiny], dtype)
        chosen = rng.random(shape) < 0.2
        x = np.where(chosen, rng.choice(specials, shape), x)
    return x


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers in another place: with gaps, in Fortran order."""
    if layout == "strided":
        memory = np.zeros([2 * n for n in x.shape], x.dtype)
        every_other: tuple[Any, ...] = (slice(None, None, 2),) * x.ndim
        view = memory[..., *every_other]
        view[...] = x
        return view
    return np.array(x, order="F" if layout == "fortran" else "C")


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.one_of(
        st.just(()),
        st.sampled_from(SIZES).map(lambda n: (n,)),
        st.lists(st.integers(0, 7), min_size=2, max_size=3).map(tuple),
    )


#: The rules whose results are equal everywhere.
EQUAL = [getattr(mo, name) for name in registered.__all__ if name not in ("Rule", "Muon")]


def rules(choices: bool = True) -> st.SearchStrategy[mo.Rule]:
    return elementwise_rules(choices) | whole_rules(choices)


def whole_rules(choices: bool = True) -> st.SearchStrategy[mo.Rule]:
    return drawn([rule for rule in EQUAL if not per_element(rule)], choices)


def elementwise_rules(choices: bool = True) -> st.SearchStrategy[mo.Rule]:
    return drawn([rule for rule in EQUAL if per_element(rule)], choices)


def drawn(rules: list[type[mo.Rule]], choices: bool) -> st.SearchStrategy[mo.Rule]:
    return st.one_of([options(rule, choices=choices).map(partial(make, rule)) for rule in rules])


def make(rule: type[mo.Rule], options: dict[str, Any]) -> mo.Rule:
    return rule(**options)


def per_element(rule: type[mo.Rule]) -> bool:
    return rule().elementwise


def clips() -> st.SearchStrategy[mo.Clip | None]:
    bound = st.sampled_from([None, 0.0, 1e-3, 1.0, 1e30])
    eps = st.sampled_from([0.0, 1e-6])
    return st.one_of(
        st.none(), st.builds(mo.Clip, norm=bound, global_norm=bound, value=bound, eps=eps)
    )


@st.composite
def histories(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    kinds: tuple[str, ...] = ("moderate", "wide", "special"),
    choices: bool = True,
) -> History:
    """Parameters that come late, pause and leave; the large ones live short."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.one_of(st.integers(1, 8), st.just(50)))
    names = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=5, unique=True))
    common = draw(clips())
    lives = {}
    for name in names:
        shape, dtype = draw(shapes()), draw(st.sampled_from(dtypes))
        kind = draw(st.sampled_from(kinds))
        layout = draw(st.sampled_from(["plain", "strided", "fortran", "broadcast"]))
        born, gone = sorted(draw(st.tuples(st.integers(0, n), st.integers(1, n))))
        if born == gone:
            born = 0
        start = laid_out(fill(rng, shape, dtype, "moderate"), layout)
        grads: list[np.ndarray | None] = []
        for step in range(n):
            if not born <= step < gone or rng.random() < 0.15:
                grads.append(None)
            elif layout == "broadcast":
                grads.append(np.broadcast_to(fill(rng, (), dtype, kind), shape))
            else:
                grads.append(laid_out(fill(rng, shape, dtype, kind), layout))
        clip = common if draw(st.booleans()) else draw(clips())
        lives[name] = Life(draw(rules(choices)), clip, start, grads)
    return History(lives)
