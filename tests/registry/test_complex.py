"""Complex parameters: as torch has it, their real and imaginary parts are elements of their own."""

from pathlib import Path
from typing import Any, Literal

import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import multiopt as mo
from tests.cases import CASES, Case
from tests.libraries import assert_equal, engine

MAKERS: dict[str, Any] = {
    "numpy": np.array,
    "torch": lambda x: torch.from_numpy(np.array(x)).requires_grad_(),
    "jax": jnp.asarray,
    "strict": lambda x: array_api_strict.asarray(np.array(x)),
}
READERS: dict[str, Any] = {
    "numpy": np.asarray,
    "torch": lambda x: x.detach().numpy(),
    "jax": np.asarray,
    "strict": np.from_dlpack,
}


def numbers(rng: np.random.Generator, dtype: str) -> np.ndarray:
    real, imaginary = rng.standard_normal((2, 3, 4))
    return np.asarray(real + 1j * imaginary, dtype)


def run(
    library: str, rule: mo.Rule, dtype: str, clip: mo.Clip | None = None, steps: int = 20
) -> tuple[mo.Optimizer, Any, np.ndarray]:
    make, read = MAKERS[library], READERS[library]
    rng = np.random.default_rng(3)
    params = {"z": make(numbers(rng, dtype))}
    opt = mo.Optimizer(rule, clip=clip)
    for _ in range(steps):
        grad = make(numbers(rng, dtype))
        grads = {"z": grad.detach() if library == "torch" else grad}
        params = opt.step(params, grads)
    return opt, params["z"], read(params["z"])


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("case", [c for c in CASES if c.rule.elementwise], ids=lambda c: c.id)
def test_the_parts_step_as_real_arrays(case: Case, dtype: str) -> None:
    opt, param, values = run("numpy", case.rule, dtype)
    real = "float32" if dtype == "complex64" else "float64"
    rng = np.random.default_rng(3)
    parts = {"z": np.array(numbers(rng, dtype)[..., None].view(real))}
    its = mo.Optimizer(case.rule)
    for _ in range(20):
        its.step(parts, {"z": np.array(numbers(rng, dtype)[..., None].view(real))})
    assert param.dtype == dtype
    assert_equal(values[..., None].view(real), parts["z"])
    for name, slot in opt.state("z").slots.items():
        assert slot.dtype == dtype
        assert slot.shape == (3, 4)
        assert_equal(slot[..., None].view(real), its.state("z").slots[name], name)


@pytest.mark.parametrize("clip", [None, mo.Clip(norm=0.5), mo.Clip(global_norm=0.5, value=0.1)])
@pytest.mark.parametrize("library", ["torch", "jax", "strict"])
def test_equal_on_every_library(library: str, clip: mo.Clip | None) -> None:
    with engine("plain"):
        opt, _, expected = run("numpy", mo.Adam(lr=0.1), "complex64", clip)
    its, param, values = run(library, mo.Adam(lr=0.1), "complex64", clip)
    assert_equal(values, expected)
    kind = {"torch": torch.Tensor, "jax": jax.Array}.get(library, object)
    assert isinstance(param, kind)
    for name, slot in opt.state("z").slots.items():
        shown = its.state("z").slots[name]
        assert isinstance(shown, kind)
        assert_equal(READERS[library](shown), slot, name)


@pytest.mark.parametrize("rule", [mo.Adam(lr=0.1), mo.SGD(lr=0.1, momentum=0.9)], ids=repr)
def test_follows_torch(rule: mo.Rule) -> None:
    rng = np.random.default_rng(3)
    w = torch.from_numpy(numbers(rng, "complex128")).requires_grad_()
    momentum = {"momentum": 0.9} if isinstance(rule, mo.SGD) else {}
    peer = getattr(torch.optim, type(rule).__name__)([w], lr=0.1, **momentum)
    for _ in range(20):
        w.grad = torch.from_numpy(numbers(rng, "complex128"))
        peer.step()
    _, _, values = run("numpy", rule, "complex128")
    np.testing.assert_allclose(values, w.detach().numpy(), rtol=1e-12)


def test_own_gradients_and_views() -> None:
    w = torch.ones(3, 4, dtype=torch.complex64)[:, ::2].clone().requires_grad_()
    before = w._version
    (w * w.conj()).real.sum().backward()
    opt = mo.Optimizer(mo.SGD(lr=0.25))
    assert opt.step({"w": w})["w"] is w
    assert w.tolist() == [[0.5 + 0j] * 2] * 3
    assert w._version > before
    strided = np.ones((4, 6), np.complex64)[:, ::2]
    assert opt.step({"v": strided}, {"v": strided.copy()})["v"] is strided
    assert (strided == 0.75).all()


#: Views whose values are those given, and whose memory holds something else.
VIEWS: dict[str, Any] = {
    "plain": lambda x: x.clone(),
    "conjugate": lambda x: x.conj().resolve_conj().conj(),
    "negative": lambda x: torch._neg_view(-x),
    "both": lambda x: torch._neg_view((-x.conj()).resolve_conj().conj()),
}


@pytest.mark.parametrize("clip", [None, mo.Clip(norm=0.5), mo.Clip(global_norm=0.5, value=0.1)])
@pytest.mark.parametrize("shape", [(3, 4), ()])
@pytest.mark.parametrize("grad", VIEWS)
@pytest.mark.parametrize("param", VIEWS)
def test_bits_of_a_tensor_change_nothing(
    param: str, grad: str, shape: tuple[int, ...], clip: mo.Clip | None
) -> None:
    numbers = torch.randn(4, *shape, dtype=torch.complex64)

    def run(param: str, grad: str) -> tuple[mo.Optimizer, torch.Tensor]:
        opt = mo.Optimizer(mo.Adam(lr=0.1), clip, average=mo.Average())
        z = VIEWS[param](numbers[0])
        for given in numbers[1:]:
            g, before = VIEWS[grad](given), z._version
            assert opt.step({"z": z}, {"z": g})["z"] is z
            assert z._version > before
            assert torch.equal(g, given)
        return opt, z

    expected, plain = run("plain", "plain")
    opt, z = run(param, grad)
    assert (z.is_conj(), z.is_neg()) == (
        param in ("conjugate", "both"),
        param in ("negative", "both"),
    )
    assert torch.equal(z, plain)
    assert torch.equal(opt.average("z"), expected.average("z"))
    for name, slot in expected.state("z").slots.items():
        assert torch.equal(opt.state("z").slots[name], slot)


def test_a_backward_leaves_a_lazy_conjugate() -> None:
    z = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    (z.conj() * torch.tensor([1 + 2j, 3 - 1j]).conj()).real.sum().backward()
    assert z.grad is not None
    assert z.grad.is_conj()
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    opt.step({"z": z})
    assert z.tolist() == [-1 + 2j, -3 - 1j]
    opt.step({"z": z})
    assert z.tolist() == [-2 + 4j, -6 - 2j]


def test_a_parameter_may_be_a_conjugate_transpose() -> None:
    base = torch.ones(3, 2, dtype=torch.complex128) * (1 + 2j)
    w = torch.nn.Parameter(base.mH)
    assert w.is_conj()
    w.real.sum().backward()
    mo.Optimizer(mo.SGD(lr=0.5)).step({"w": w})
    assert w.tolist() == [[0.5 - 2j] * 3] * 2
    assert base.tolist() == [[0.5 + 2j] * 2] * 3


def test_an_array_and_its_conjugate_are_one_memory() -> None:
    z = torch.ones(2, dtype=torch.complex64)
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    with pytest.raises(ValueError, match="parameters 'a' and 'b' share memory"):
        opt.step({"a": z, "b": z.conj()}, {"a": z.clone(), "b": z.clone()})
    z = torch.tensor([1 + 1j])
    opt.step({"z": z}, {"z": z.conj()})
    assert z.tolist() == [2j]


def test_the_norm_is_of_the_moduli() -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0), clip=mo.Clip(norm=1.0, eps=0.0))
    z = {"z": np.zeros(1, np.complex128)}
    opt.step(z, {"z": np.array([3 + 4j])})
    assert opt.last.norms == {"z": 5.0}
    assert z["z"].item() == pytest.approx(-0.6 - 0.8j)


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize("library", list(MAKERS))
def test_state_goes_on(library: str, by_file: bool, tmp_path: Path) -> None:
    opt, _, _ = run("numpy", mo.Adam(lr=0.1), "complex64")
    other = mo.Optimizer(mo.Adam(lr=0.1))
    if by_file:
        opt.save(tmp_path / "file")
        other.load(tmp_path / "file")
    else:
        state = opt.state_dict()
        assert state["entries"]["z"]["slots"]["exp_avg"].dtype == np.complex64
        other.load_state_dict(state)
    rng = np.random.default_rng(5)
    start, grad = numbers(rng, "complex64"), numbers(rng, "complex64")
    make, read = MAKERS[library], READERS[library]
    lent = make(grad)
    gradient = lent.detach() if library == "torch" else lent
    theirs = other.step({"z": make(start)}, {"z": gradient})["z"]
    ours = opt.step({"z": start}, {"z": grad})["z"]
    assert_equal(read(theirs), ours)


def test_averages_are_complex() -> None:
    opt = mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average())
    z = {"z": np.zeros(2, np.complex64)}
    for _ in range(3):
        opt.step(z, {"z": np.full(2, -1j, np.complex64)})
    assert opt.average("z").tolist() == [2j, 2j]


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("which", ["compiled", "blocks", "plain"])
def test_the_other_byte_order_changes_nothing(which: str, dtype: str, tmp_path: Path) -> None:
    def made(swap: bool) -> tuple[mo.Optimizer, np.ndarray]:
        rng = np.random.default_rng(3)
        order: Literal["S", "="] = "S" if swap else "="
        z = numbers(rng, dtype)
        z = z.astype(z.dtype.newbyteorder(order))
        opt = mo.Optimizer(mo.Adam(lr=0.1), clip=mo.Clip(norm=0.5), average=mo.Average())
        for _ in range(3):
            opt.step({"z": z}, {"z": numbers(rng, dtype).astype(z.dtype)})
        opt.save(tmp_path / order)
        # Loaded state may have it too.
        state = opt.state_dict()
        for part in ("entries", "averages"):
            slots = state[part]["z"]["slots"]
            state[part]["z"]["slots"] = {k: x.astype(z.dtype) for k, x in slots.items()}
        opt.load_state_dict(state)
        opt.step({"z": z}, {"z": numbers(rng, dtype).astype(z.dtype)})
        return opt, z

    with engine(which):
        (expected, native), (opt, z) = made(swap=False), made(swap=True)
    assert z.dtype == native.dtype.newbyteorder()
    assert_equal(z.astype(dtype), native)
    assert_equal(opt.average("z"), expected.average("z"))
    for name, slot in expected.state("z").slots.items():
        assert_equal(opt.state("z").slots[name], slot, name)
    assert (tmp_path / "S").read_bytes() == (tmp_path / "=").read_bytes()


def test_a_real_gradient_is_no_complex_one() -> None:
    opt = mo.Optimizer(mo.SGD())
    with pytest.raises(TypeError, match="has dtype float32; expected complex64"):
        opt.step({"z": np.zeros(2, np.complex64)}, {"z": np.zeros(2, np.float32)})
    opt.step({"z": np.zeros(2, np.complex64)}, {"z": np.zeros(2, np.complex64)})
    with pytest.raises(TypeError, match="has dtype complex128; expected complex64"):
        opt.step({"z": np.zeros(2, complex)}, {"z": np.zeros(2, complex)})
    with pytest.raises(ValueError, match=r"has shape \(3,\); expected \(2,\)"):
        opt.step({"z": np.zeros(3, np.complex64)}, {"z": np.zeros(3, np.complex64)})


def test_rules_of_whole_parameters_refuse_it() -> None:
    z = np.zeros(2, np.complex64)
    with pytest.raises(ValueError, match="parameter 'z' is complex"):
        mo.Optimizer(mo.LAMB()).step({"z": z}, {"z": z.copy()})
    opt = mo.Optimizer(mo.Adam())
    opt.step({"z": z}, {"z": z.copy()})
    # LAMB has the slots of Adam.
    with pytest.raises(ValueError, match="parameter 'z' is complex"):
        opt.rule = mo.LAMB()
    assert opt.rule == mo.Adam()
