"""``in_place=False``: new arrays come back, those that were given stay as they are."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

import multiopt as mo
from tests.histories import History, histories
from tests.libraries import NUMPY, Library, assert_equal, engine


@given(history=histories())
def test_a_history_is_the_same_and_nothing_given_is_written(
    library: Library, history: History
) -> None:
    reference = history.optimizer()
    opt = mo.Optimizer(reference.rule, reference.clip, in_place=False)
    expected, params = history.start(NUMPY), history.start(library)
    with engine(library.engine):
        for step in range(history.steps):
            grads = history.grads(library, step)
            before = {name: np.array(library.numpy(param)) for name, param in params.items()}
            after = opt.step(params, grads)
            expected = reference.step(expected, history.grads(NUMPY, step))
            for name, param in params.items():
                assert_equal(library.numpy(param), before[name], f"{name}, as it was given")
                assert_equal(library.numpy(after[name]), expected[name], name)
                assert (after[name] is param) == (name not in grads)
            params = after
    assert opt.steps == reference.steps


def views() -> dict[str, np.ndarray]:
    base = np.arange(12.0)
    fixed = base.copy()
    fixed.flags.writeable = False
    return {
        "read-only": fixed,
        "every second": base[::2],
        "backwards": base[::-1],
        "fortran": np.asfortranarray(base.reshape(3, 4)),
        "broadcast": np.broadcast_to(np.float64(2.0), (3, 2)),
        "windows": np.lib.stride_tricks.sliding_window_view(base, 3),
        "number": np.array(1.5),
        "empty": np.zeros((0, 3)),
        "big-endian": base.astype(">f8"),
    }


@pytest.mark.parametrize("engine_name", ["compiled", "blocks", "plain"])
@pytest.mark.parametrize("name", views())
def test_any_array_will_do(name: str, engine_name: str) -> None:
    param = views()[name]
    before = param.copy()
    with engine(engine_name):
        opt = mo.Optimizer(mo.SGD(lr=0.5), in_place=False)
        new = opt.step({"w": param}, {"w": np.ones(param.shape)})["w"]
    assert_equal(np.array(new, np.float64), np.array(before - 0.5, np.float64))
    assert_equal(param, before)
    assert new.flags.writeable
    assert not np.shares_memory(new, param)


def test_names_may_share_an_array() -> None:
    w = np.ones(4)
    opt = mo.Optimizer(mo.SGD(lr=0.5), in_place=False)
    params = opt.step({"a": w, "b": w, "c": w[1:]}, {"a": w, "b": 2 * w, "c": w[1:]})
    assert [params[name].tolist() for name in "abc"] == [[0.5] * 4, [0.0] * 4, [0.5] * 3]
    assert w.tolist() == [1.0] * 4


def test_a_parameter_may_be_its_own_gradient() -> None:
    w = np.array([1.0, 2.0])
    params = mo.Optimizer(mo.SGD(lr=0.5), in_place=False).step({"w": w}, {"w": w})
    assert (params["w"].tolist(), w.tolist()) == ([0.5, 1.0], [1.0, 2.0])


def test_a_loop_of_leaves_trains() -> None:
    opt = mo.Optimizer(mo.Adam(lr=0.1), in_place=False)
    first = torch.zeros(3, requires_grad=True)
    params: dict[str, Any] = {"w": first}
    for _ in range(100):
        ((params["w"] - torch.tensor([1.0, -2.0, 0.5])) ** 2).sum().backward()
        params = opt.step(params)
        assert params["w"].is_leaf
        assert params["w"].requires_grad
        assert params["w"].grad is None
    np.testing.assert_allclose(params["w"].detach(), [1.0, -2.0, 0.5], atol=0.05)
    assert first.tolist() == [0.0, 0.0, 0.0]


def test_tensors_stay_what_they_are() -> None:
    given: dict[str, Any] = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "tensor": torch.ones(2),
        "computed": torch.ones(2, requires_grad=True) * 2,
        "expanded": torch.ones(1).expand(2),
        "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    }
    opt = mo.Optimizer(mo.SGD(lr=0.5), in_place=False)
    grads = {name: torch.ones_like(x).detach().resolve_conj() for name, x in given.items()}
    new = opt.step(given, grads)
    for name, old in given.items():
        assert type(new[name]) is type(old)
        assert new[name].requires_grad == old.requires_grad
        assert new[name].is_leaf
        assert old._version == 0
        assert_equal(new[name].detach().resolve_conj(), (old - 0.5).detach().resolve_conj())


def test_who_is_skipped_keeps_the_array() -> None:
    opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip", in_place=False)
    params = {"a": np.ones(2), "b": np.ones(2)}
    new = opt.step(params, {"a": np.array([np.nan, 0.0]), "b": np.ones(2)})
    assert new["a"] is params["a"]
    assert new["b"] is not params["b"]


@pytest.mark.parametrize("wrong", [1.0, [1.0, 2.0], None, np.float64(2.0), "w", {"a": np.ones(2)}])
def test_what_is_no_array_is_refused_as_ever(wrong: Any) -> None:
    messages = []
    for in_place in (True, False):
        opt = mo.Optimizer(mo.SGD(), in_place=in_place)
        with pytest.raises(TypeError, match="parameter 'w'") as caught:
            opt.step({"w": wrong}, {"w": np.ones(2)})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "wrong",
    [
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.arange(2),
        torch.arange(2),
        torch.eye(2).to_sparse(),
        torch.ones(2, device="meta"),
    ],
    ids=["masked", "integers", "integer tensor", "sparse", "meta"],
)
def test_arrays_of_no_use_are_refused_as_ever(wrong: Any) -> None:
    messages = []
    for in_place in (True, False):
        opt = mo.Optimizer(mo.SGD(), in_place=in_place)
        with pytest.raises(TypeError, match="parameter 'w'") as caught:
            opt.step({"w": wrong}, {"w": wrong})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("at", ["shape", "schedule", "nonfinite"])
def test_an_error_leaves_everything(at: str) -> None:
    rule = mo.SGD(lr=lambda step: -1.0 if at == "schedule" and step > 1 else 0.5)
    opt = mo.Optimizer(rule, on_nonfinite="raise", in_place=False)
    params = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
    grad = np.ones(3) if at == "shape" else np.array([np.inf if at == "nonfinite" else 1.0, 1.0])
    with pytest.raises(ValueError, match="w"):
        opt.step(params, {"w": grad})
    assert (params["w"].tolist(), opt.state("w").step) == ([0.5, 0.5], 1)


def test_copies_of_the_optimizer_are_not_in_place_either() -> None:
    opt = mo.Optimizer(mo.SGD(), in_place=False)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        w = np.ones(2)
        assert other.step({"w": w}, {"w": w})["w"] is not w
