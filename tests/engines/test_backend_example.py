"""The backend and the engine in ``docs/backends.md``: they run, with the numbers of NumPy."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyro.optim
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import multiopt as mo
from multiopt import backend
from multiopt.adapters import pyro as drop_in
from multiopt.engine import Group
from multiopt.reference import ReferenceGroup
from multiopt.rules import Rule
from multiopt_kernels import engines
from multiopt_kernels.host import HostGroup
from tests.cases import CASES, Case
from tests.histories import History, assert_same_run, histories
from tests.libraries import JAX, NUMPY, TORCH, Library, assert_equal, engine

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"

RULES = [case for case in CASES if case.rule_class in (mo.SGD, mo.AdamW, mo.NAdam)][::3]


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the page shows, known to the library."""
    code, _, _, engine_ = blocks()
    module = ModuleType("vectors")
    monkeypatch.setitem(sys.modules, "vectors", module)
    monkeypatch.setattr(backend, "PACKAGES", {**backend.PACKAGES})
    for text in (code, engine_):
        exec(compile(text, str(PAGE), "exec"), module.__dict__)
    backend.PACKAGES["vectors"] = "vectors"  # type: ignore[index]
    forget_backends()
    yield module
    forget_backends()


def forget_backends() -> None:
    """Let each be found again, by name and by type: or a test would know two of a library."""
    backend.backend_named.cache_clear()
    backend._backend_by_type.clear()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_what_the_page_does_with_it(vectors: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks()[1]
    exec(compile(code, str(PAGE), "exec"), vectors.__dict__)
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\)  # (.*)", code)


def test_it_keeps_the_promises_that_the_page_checks(vectors: Any) -> None:
    exec(compile(blocks()[2], str(PAGE), "exec"), vectors.__dict__)


@pytest.mark.parametrize("name", ["compiled", "blocks", "plain", "the page's"])
@pytest.mark.parametrize("case", RULES, ids=lambda case: case.id)
def test_it_equals_numpy(case: Case, name: str, vectors: Any, tmp_path: Path) -> None:
    if name == "the page's":
        name, vectors.BACKEND = "plain", vectors.PlainBackend("vectors")
    rng = np.random.default_rng(0)
    clip = mo.Clip(norm=2.0, global_norm=2.5, value=0.6)
    start = {"a": rng.standard_normal(5), "b": rng.standard_normal(3).astype("f4")}
    ours = {n: vectors.Vector(x.tolist(), x.dtype.char) for n, x in start.items()}
    numpys = {n: x.copy() for n, x in start.items()}
    with engine(name):
        opt, other = mo.Optimizer(case.rule, clip), mo.Optimizer(case.rule, clip)
        for step in range(4):
            grads = {n: rng.standard_normal(len(x)).astype(x.dtype) for n, x in start.items()}
            if step == 2:
                del grads["a"]
            given = {n: vectors.Vector(x.tolist(), x.dtype.char) for n, x in grads.items()}
            assert opt.step(ours, given) == ours
            other.step(numpys, grads)
            if step == 1:
                opt.save(tmp_path / "state")
                opt = mo.Optimizer(case.rule, clip)
                opt.load(tmp_path / "state")
    for n, x in numpys.items():
        assert_equal(np.asarray(ours[n]), x)
        for slot, array in other.state(n).slots.items():
            assert type(opt.state(n).slots[slot]) is vectors.Vector
            assert_equal(np.asarray(opt.state(n).slots[slot]), array)


@pytest.fixture
def plain(vectors: Any, monkeypatch: pytest.MonkeyPatch) -> type[HostGroup]:
    """The engine of the page, for all arrays in the memory of the host."""
    group: type[HostGroup] = vectors.PlainGroup

    def made(backend: Any, layout: Any, rule: Rule, has_masters: bool, *_: Any, **__: Any) -> Group:
        kind = group if rule.elementwise else ReferenceGroup
        return kind(backend, layout, rule, has_masters)

    monkeypatch.setattr(engines, "group", made)
    return group


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories(dtypes=("float16", "float32", "float64")))
@pytest.mark.parametrize("library", [NUMPY, TORCH, JAX], ids=lambda library: library.id)
def test_its_engine_equals_the_reference(
    library: Library, history: History, plain: type[HostGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = history.run(library)
    kinds = {type(group) for group in actual[0]._registry._groups.values()}
    assert kinds <= {plain, ReferenceGroup}
    with monkeypatch.context() as patch:
        patch.setattr(engines, "group", lambda *of, **_: ReferenceGroup(*of[:4]))
        expected = history.run(NUMPY)
    assert_same_run(actual, expected, library)


def test_its_engine_leaves_clipped_gradients_behind(plain: type[HostGroup]) -> None:
    w, other = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    ours, pyros = (lib.Adam({"lr": 0.1}, {"clip_norm": 0.5}) for lib in (drop_in, pyro.optim))
    for optim, x in ((ours, w), (pyros, other)):
        for _ in range(3):
            x.grad = torch.tensor([3.0, 0.0, 4.0])
            optim([x])
        torch.testing.assert_close(x.grad, torch.tensor([0.3, 0.0, 0.4]))
    torch.testing.assert_close(w, other)


def test_what_it_refuses(vectors: Any) -> None:
    opt, w = mo.Optimizer(mo.SGD()), vectors.Vector([1.0])
    with pytest.raises(ValueError, match="share memory"):
        opt.step({"a": w, "b": w}, {"a": vectors.Vector([1.0]), "b": vectors.Vector([1.0])})
    with pytest.raises(TypeError, match="dtype int64; expected"):
        opt.step({"a": vectors.Vector([1], "q")}, {"a": w})
    assert len(opt) == 0
