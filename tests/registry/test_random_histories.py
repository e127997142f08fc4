"""Whatever happens to an optimizer, in whatever order: it stays what a simple model says."""

import copy
import pickle
import shutil
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import multiopt as mo
from tests.libraries import JAX, NUMPY, STRICT, TORCH, assert_equal, engine
from tests.registry.registry_model import Misfit, Model, Saved, Stored, described

LIBRARIES = {library.id: library for library in (NUMPY, TORCH, JAX, STRICT)}
#: None is a part of another, nor of anything else in a file.
NAMES = ("first.w", "second w", "third/w", "$fourth", "__fifth__")
SHAPES = dict(zip(NAMES, [(), (0,), (3,), (2, 2), (3,)], strict=True))
DTYPES = ["float16", "float32", "float64"]
ADAM, HEAVY_BALL = mo.Adam(lr=0.1), mo.SGD(lr=0.1, momentum=0.5)
RULES: dict[str, Any] = {
    "Adam": ADAM,
    "AMSGrad": mo.Adam(lr=0.1, amsgrad=True),
    "heavy ball": HEAVY_BALL,
    "SGD": mo.SGD(lr=0.1),
    # One for each name.
    "mixed": dict(zip(NAMES, [ADAM, HEAVY_BALL, mo.SGD(lr=0.1), ADAM, ADAM], strict=True)).get,
}
AVERAGES = {"none": None, "mean": mo.Average(), "late": mo.Average(decay=0.9, start=2)}
#: How many files are kept.
FILES = 3

seeds = st.integers(0, 2**32 - 1)
#: A shape, None for that of the name, a dtype, a library and a seed.
kinds = st.tuples(
    st.sampled_from([None, None, None, *SHAPES.values()]),
    *(st.sampled_from(DTYPES), st.sampled_from(list(LIBRARIES)), seeds),
)


class Histories(RuleBasedStateMachine):
    """An optimizer with its parameters, beside the model with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.folder, self.numbers = Path(tempfile.mkdtemp()), count()
        self.files: list[tuple[Path, dict[str, Any], Saved, dict[str, Any]]] = []
        self.params: dict[str, Any] = {}
        self.values: dict[str, np.ndarray] = {}
        self.libraries: dict[str, str] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(
        engine=st.sampled_from(["compiled", "blocks"]),
        rules=st.sampled_from(list(RULES)),
        average=st.sampled_from(list(AVERAGES)),
        masters=st.booleans(),
        names=st.permutations(NAMES),
        data=st.data(),
    )
    def begin(
        self,
        engine: str,
        rules: str,
        average: str,
        masters: bool,
        names: list[str],
        data: st.DataObject,
    ) -> None:
        self.engine, self.masters = engine, masters
        self.kind, self.average = rules, average
        self.opt, self.model = self.new(rules, average)
        for name in names[:3]:
            self.appear(name, *data.draw(kinds))
        self.take(names[:2], 0, 1.0)
        self.save({}, "not")

    def new(self, rules: str, average: str) -> tuple[mo.Optimizer, Model]:
        rule, mean = RULES[rules], AVERAGES[average]
        opt = mo.Optimizer(rule, master_weights=self.masters, average=mean)
        return opt, Model(rule, mean, self.masters)

    # Parameters

    @rule(name=st.sampled_from(NAMES), kind=kinds)
    def register(self, name: str, kind: tuple[tuple[int, ...] | None, str, str, int]) -> None:
        """A parameter appears, or takes the place of one that is forgotten."""
        if name in self.model.main.seen:
            self.forget_one(name)
        self.appear(name, *kind)

    def appear(
        self, name: str, shape: tuple[int, ...] | None, dtype: str, library: str, seed: int
    ) -> None:
        if shape is None:
            shape = SHAPES[name]
        if dtype not in LIBRARIES[library].dtypes:
            dtype = "float64"
        self.values[name] = np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
        self.libraries[name] = library
        self.params[name] = LIBRARIES[library].param(self.values[name])

    @precondition(lambda self: self.params)
    @rule(data=st.data(), library=st.sampled_from(list(LIBRARIES)))
    def move(self, data: st.DataObject, library: str) -> None:
        """Parameters go on in another library."""
        for name in data.draw(st.sets(st.sampled_from(sorted(self.params)), min_size=1)):
            if self.values[name].dtype.name in LIBRARIES[library].dtypes:
                self.libraries[name] = library
                self.params[name] = LIBRARIES[library].param(self.values[name])

    @precondition(lambda self: self.params)
    @rule(
        data=st.data(),
        seed=seeds,
        scale=st.sampled_from([1.0, 1.0, 0.0, np.nan, 1e30]),
        times=st.integers(1, 3),
    )
    def step(self, data: st.DataObject, seed: int, scale: float, times: int) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.params)), unique=True))
        for time in range(times):
            self.take(names, seed + time, scale)

    def take(self, names: list[str], seed: int, scale: float) -> None:
        """Step those that can take a gradient."""
        rng, grads = np.random.default_rng(seed), {}
        for name in names:
            value = self.values[name]
            with np.errstate(over="ignore"):
                grads[name] = np.asarray(scale * rng.standard_normal(value.shape), value.dtype)
        given: dict[str, Any] = {
            name: LIBRARIES[self.libraries[name]].grad(grad) for name, grad in grads.items()
        }
        # A gradient that is missing, one that is None, and a parameter that takes no part.
        idle = [name for name in self.params if name not in grads]
        given |= dict.fromkeys(idle[:1])
        params = {name: self.params[name] for name in (*names, *idle[:2])}
        try:
            self.model.step(self.values, grads, self.libraries)
        except Misfit:
            event("a step that does not fit")
            with engine(self.engine), pytest.raises(ValueError, match="loaded s"):
                self.opt.step(params, given)
        else:
            with engine(self.engine):
                self.params |= self.opt.step(params, given)

    # Files

    @rule(
        metadata=st.sampled_from([{}, {"epoch": 3, "loss": [0.5, None]}]),
        copied=st.sampled_from(["not", "by copy", "by pickle"]),
    )
    def save(self, metadata: dict[str, Any], copied: str) -> None:
        """Save; go on with the optimizer or with a copy of it."""
        if copied == "by copy":
            self.opt = copy.deepcopy(self.opt)
        elif copied == "by pickle":
            self.opt = pickle.loads(pickle.dumps(self.opt))
        path = self.folder / f"{next(self.numbers)}"
        self.opt.save(path, metadata)
        saved = self.model.saved()
        fresh = mo.Optimizer(lambda name: ADAM, average=lambda name: mo.Average())
        fresh.load(path)
        state = fresh.state_dict()
        assert state["steps"] == saved.steps
        assert_stored(state["pending"], saved.entries)
        assert_stored(state["pending_averages"], saved.averages)
        content = path.read_bytes()
        for name in NAMES:
            assert (name.encode() in content) == (name in self.model.names), name
        self.files = [(path, self.opt.state_dict(), saved, metadata), *self.files[: FILES - 1]]

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """Some file, into this optimizer."""
        self.load_one(data)

    @rule(
        data=st.data(),
        rules=st.none() | st.sampled_from(list(RULES)),
        average=st.none() | st.sampled_from(list(AVERAGES)),
        masters=st.none() | st.booleans(),
    )
    def restart(
        self,
        data: st.DataObject,
        rules: str | None,
        average: str | None,
        masters: bool | None,
    ) -> None:
        """Some file, into a new optimizer, of the same settings if there are no others."""
        self.kind, self.average = rules or self.kind, average or self.average
        self.masters = self.masters if masters is None else masters
        self.opt, self.model = self.new(self.kind, self.average)
        self.load_one(data)

    def load_one(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.files) - 1), "file")
        have = list(self.files[number][2].entries)
        # Rarely one that is not there.
        some = st.sampled_from([*have * 5, *NAMES])
        rename = st.dictionaries(some, st.sampled_from(NAMES))
        self.load_file(
            number,
            by_file=data.draw(st.booleans(), "by file"),
            strict=data.draw(st.booleans(), "strict"),
            cast=data.draw(st.booleans(), "cast"),
            names=data.draw(st.none() | st.none() | st.lists(some, min_size=1), "names"),
            rename=data.draw(st.none() | st.none() | rename, "rename"),
            by_callable=data.draw(st.booleans(), "by callable"),
        )

    def load_file(
        self,
        number: int,
        *,
        by_file: bool,
        strict: bool,
        cast: bool,
        names: list[str] | None = None,
        rename: dict[str, str] | None = None,
        by_callable: bool = False,
    ) -> None:
        path, state, saved, metadata = self.files[number]
        have = list(saved.entries)
        wanted = have if names is None else list(dict.fromkeys(names))
        called = rename or {}
        new = {name: called.get(name, name) for name in wanted}
        unknown = {*wanted, *(() if by_callable else called)} - set(have)

        def load() -> mo.LoadReport:
            how: Any = (lambda name: called.get(name, name)) if by_callable else rename
            options: Any = {"strict": strict, "cast": cast, "names": names, "rename": how}
            if by_file:
                return self.opt.load(path, **options)
            return self.opt.load_state_dict(state, **options)

        if unknown:
            event("a load of what is not there")
            with pytest.raises(KeyError, match="the loaded state does not contain it"):
                load()
            return
        if len(set(new.values())) < len(new):
            event("a load that makes two names one")
            with pytest.raises(ValueError, match="both would be called"):
                load()
            return
        try:
            expected = self.model.load(saved, new, strict, cast)
        except Misfit:
            event("a load that does not fit")
            with pytest.raises(mo.CheckpointError if by_file else ValueError, match="loaded s"):
                load()
            return
        event(f"a load with {', '.join(k for k, v in expected.items() if v) or 'nothing'}")
        report = load()
        assert {part: set(getattr(report, part)) for part in expected} == expected
        assert report.metadata == (metadata if by_file else {})

    @rule(name=st.sampled_from(NAMES), dtype=st.sampled_from(DTYPES), by_file=st.booleans())
    def change_dtype(self, name: str, dtype: str, by_file: bool) -> None:
        """A parameter is forgotten, and its state is loaded again for one of another dtype."""
        if name not in self.params or dtype not in LIBRARIES[self.libraries[name]].dtypes:
            return
        self.save({}, "not")
        if name in self.model.names:
            self.forget_one(name)
        with np.errstate(over="ignore"):
            self.values[name] = self.values[name].astype(dtype)
        self.params[name] = LIBRARIES[self.libraries[name]].param(self.values[name])
        self.take([name], 0, 1.0)
        if name in self.files[0][2].entries:
            self.load_file(0, by_file=by_file, strict=True, cast=True, names=[name])

    # Changes

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        if name in self.model.names:
            self.forget_one(name)
            return
        with pytest.raises(KeyError, match="neither seen nor pending"):
            self.opt.forget(name)
        with pytest.raises(KeyError, match="neither seen nor pending"):
            self.opt.rename({name: "else"})
        with pytest.raises(KeyError, match="no state"):
            self.opt.state(name)

    def forget_one(self, name: str) -> None:
        self.opt.forget(name)
        self.model.forget(name)

    @precondition(lambda self: self.model.names)
    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        """The parameters are renamed with their state; one that is in the way goes."""
        old = data.draw(st.lists(st.sampled_from(self.model.names), min_size=1, unique=True))
        new = data.draw(st.permutations(NAMES))[: len(old)]
        names = dict(zip(old, new, strict=True))
        stay = set(self.model.names) - set(old)
        if stay & set(new):
            event("a new name that is taken")
            with pytest.raises(ValueError, match="two parameters would be called"):
                self.opt.rename(names)
            return
        self.opt.rename(names)
        self.model.rename(names)
        known: tuple[dict[str, Any], ...] = (self.params, self.values, self.libraries)
        for arrays in known:
            moved = {names[name]: arrays.pop(name) for name in old if name in arrays}
            for name in new:
                arrays.pop(name, None)
            arrays |= moved

    @rule(rules=st.sampled_from(list(RULES)))
    def change_rule(self, rules: str) -> None:
        self.kind, self.opt.rule = rules, RULES[rules]
        self.model.main.change_rules(RULES[rules])

    # What holds

    @invariant()
    def is_what_the_model_says(self) -> None:
        main, means = self.model.main, self.model.means
        assert self.opt.names == tuple(main.seen)
        assert set(self.opt.pending) == set(main.pending)
        assert self.opt.steps == main.steps
        for name, value in self.values.items():
            assert_equal(LIBRARIES[self.libraries[name]].numpy(self.params[name]), value, name)
        for name, known in main.seen.items():
            state = self.opt.state(name)
            assert state.step == known.step
            assert_slots(state.slots, known.slots, known.library)
        for name, mean in means.seen.items():
            array = LIBRARIES[mean.library].numpy(self.opt.average(name))
            assert_equal(array, mean.slots["average"], name)

    @invariant()
    def shows_what_the_model_says(self) -> None:
        main, means = self.model.main, self.model.means
        state = self.opt.state_dict()
        assert state.pop("steps") == main.steps
        assert_entries(state.pop("entries"), main.seen)
        assert_stored(state.pop("pending"), main.pending)
        if self.model.keeps:
            in_order = {name: means.seen[name] for name in main.seen if name in means.seen}
            assert_entries(state.pop("averages"), in_order)
            assert_stored(state.pop("pending_averages"), means.pending)
        assert list(state) == ["version"]


def assert_entries(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name, known in expected.items():
        assert actual[name]["rule"] == described(known.rule)
        assert actual[name]["step"] == known.step
        assert_slots(actual[name]["slots"], known.slots, known.library)


def assert_stored(actual: dict[str, Any], expected: dict[str, Stored]) -> None:
    assert actual.keys() == expected.keys()
    for name, stored in expected.items():
        assert actual[name]["rule"] == stored.words
        assert actual[name]["step"] == stored.step
        assert_slots(actual[name]["slots"], stored.slots, "numpy")


def assert_slots(actual: dict[str, Any], expected: dict[str, np.ndarray], library: str) -> None:
    assert actual.keys() == expected.keys()
    for slot, array in expected.items():
        assert_equal(LIBRARIES[library].numpy(actual[slot]), array, slot)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40)
