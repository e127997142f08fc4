"""What only a GPU can show, beside the tests that run on it through the ``library`` fixture."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import multiopt as mo
from tests.libraries import assert_equal

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    """Make torch raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clip", [None, mo.Clip(value=0.5)], ids=["no clip", "value"])
@pytest.mark.parametrize("rule", [mo.Adam(amsgrad=True), mo.SGD(momentum=0.9)], ids=["Adam", "SGD"])
def test_a_step_without_norms_never_waits(rule: mo.Rule, clip: mo.Clip | None) -> None:
    opt = mo.Optimizer(rule, clip)
    params = {name: torch.ones(1000, device="cuda") for name in "ab"}
    grads = {name: torch.ones(1000, device="cuda") for name in "ab"}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step(params, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_leaf_is_updated_in_place_and_its_version_moves() -> None:
    w = torch.ones(3, device="cuda", requires_grad=True)
    loss, storage = (w * w).sum(), w.data_ptr()
    mo.Optimizer(mo.SGD(lr=0.5)).step({"w": w}, {"w": torch.ones(3, device="cuda")})
    assert w.data_ptr() == storage
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_on_another_device() -> None:
    w = torch.ones(3, device="cuda")
    with pytest.raises(
        TypeError, match=r"gradient of 'w' has device cpu; expected cuda:0.*move it"
    ):
        mo.Optimizer(mo.Adam()).step({"w": w}, {"w": torch.ones(3)})


def test_a_name_moves_to_the_device_and_back() -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(1000), rng.standard_normal((6, 1000))
    moving, staying = mo.Optimizer(mo.Adam(lr=0.1)), mo.Optimizer(mo.Adam(lr=0.1))
    here, there = start.copy(), torch.from_numpy(start.copy())
    for step, grad in enumerate(grads):
        there = there.to("cuda" if step % 2 else "cpu")
        moving.step({"w": there}, {"w": torch.from_numpy(grad).to(there.device)})
        assert moving.state("w").slots["exp_avg"].device == there.device
        staying.step({"w": here}, {"w": grad})
    assert_equal(there.cpu().numpy(), here)


def test_memory_under_two_names() -> None:
    w = torch.ones(6, device="cuda")
    with pytest.raises(ValueError, match="parameters 'a' and 'b' share memory"):
        mo.Optimizer(mo.Adam()).step({"a": w[:4], "b": w[2:]}, {"a": w[:4] * 2, "b": w[2:] * 2})


def test_a_step_is_not_captured_into_a_graph() -> None:
    w, grad = torch.ones(3, device="cuda"), torch.ones(3, device="cuda")
    opt = mo.Optimizer(mo.SGD(lr=0.5, momentum=0.5))
    opt.step({"w": w}, {"w": grad})
    new = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for params in ({"w": w}, {"new": new}):
            with pytest.raises(TypeError, match="is on cuda:0 while a graph is captured there"):
                opt.step(params, dict.fromkeys(params, grad))
        doubled = 2 * grad
    graph.replay()
    assert doubled.tolist() == [2.0, 2.0, 2.0]
    assert w.tolist() == [0.5, 0.5, 0.5]
    opt.step({"w": w}, {"w": grad})
    assert w.tolist() == [-0.25, -0.25, -0.25]
