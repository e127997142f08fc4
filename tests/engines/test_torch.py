"""What a torch user relies on: leaves, version counters, .grad, autograd's own checks."""

import numpy as np
import pytest
import torch

import multiopt as mo


def test_a_leaf_is_updated_in_place_from_its_grad() -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.5))
    w = torch.nn.Parameter(torch.ones(3))
    storage = w.data_ptr()
    (w * w).sum().backward()
    grad = w.grad
    assert opt.step({"w": w})["w"] is w
    assert w.tolist() == [0.0, 0.0, 0.0]
    assert w.is_leaf
    assert w.requires_grad
    assert w.data_ptr() == storage
    assert w.grad is grad
    assert grad is not None
    assert grad.tolist() == [2.0, 2.0, 2.0]


def test_stepping_before_a_backward_that_needs_the_old_value_raises() -> None:
    w = torch.ones(3, requires_grad=True)
    loss = (w * w).sum()
    opt, version = mo.Optimizer(mo.SGD(lr=0.5)), w._version
    opt.step({"w": w}, {"w": torch.ones(3)})
    assert w._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_leaves_move_their_version_too(dtype: torch.dtype) -> None:
    w = torch.ones(3, dtype=dtype, requires_grad=True)
    version = w._version
    mo.Optimizer(mo.SGD(lr=0.5)).step({"w": w}, {"w": torch.ones(3, dtype=dtype)})
    assert w._version > version
    assert w.tolist() == [0.5, 0.5, 0.5]


def test_a_parameter_without_a_grad_is_left_alone() -> None:
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    a.sum().backward()
    opt = mo.Optimizer(mo.SGD(lr=0.5))
    opt.step({"a": a, "b": b})
    assert opt.names == ("a",)
    assert b.item() == 1.0


@pytest.mark.parametrize("seen", [False, True])
def test_tensors_that_never_get_a_gradient_are_an_error(seen: bool) -> None:
    module, opt = torch.nn.Linear(2, 1), mo.Optimizer(mo.Adam(lr=0.1), average=mo.Average())
    module(torch.ones(2)).sum().backward()
    if seen:
        opt.step(dict(module.named_parameters()))
    before, last = {n: t.clone() for n, t in module.state_dict().items()}, opt.last
    # Detached from the parameters that have the gradients.
    with pytest.raises(
        TypeError,
        match=r"^no parameter requires a gradient or has one \(\['weight', 'bias'\]\), .*: pass "
        r"leaves, as in dict\(module.named_parameters\(\)\).*second argument$",
    ):
        opt.step(module.state_dict())
    assert opt.last == last
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert opt.step({}) == {}


def test_frozen_tensors_are_left_alone_beside_others() -> None:
    opt = mo.Optimizer(mo.SGD(lr=0.5))
    frozen, free = torch.ones(1), torch.ones(1, requires_grad=True)
    # Before the first backward, nothing has a gradient.
    opt.step({"frozen": frozen, "free": free})
    free.sum().backward()
    opt.step({"frozen": frozen, "free": free})
    assert (frozen.item(), free.item(), opt.names) == (1.0, 0.5, ("free",))
    # Set by hand.
    frozen.grad = torch.ones(1)
    opt.step({"frozen": frozen})
    assert frozen.item() == 0.5


def test_views_and_strides_are_written_where_they_lie() -> None:
    base = torch.zeros(4, 4)
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    opt.step({"w": base.T[1:3]}, {"w": torch.ones(2, 4)})
    assert base.sum().item() == -8.0
    assert base[:, 1:3].eq(-1).all()


def test_a_view_of_a_leaf_may_be_stepped_and_a_retained_gradient_be_read() -> None:
    leaf = torch.ones(2, 2, requires_grad=True)
    opt = mo.Optimizer(mo.SGD(lr=1.0))
    opt.step({"row": leaf[0]}, {"row": torch.ones(2)})
    assert leaf.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    row = leaf[1]
    row.retain_grad()
    row.sum().backward()
    opt.step({"other": row})
    assert leaf.tolist() == [[0.0, 0.0], [0.0, 0.0]]


class Stubborn(torch.Tensor):
    """A tensor that refuses to be copied to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.Tensor.copy_:
            raise TypeError("no")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_cannot_tear_a_step() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2).as_subclass(Stubborn)}
    mo.Optimizer(mo.SGD(lr=1.0)).step(params, {name: torch.ones(2) for name in params})
    assert [params[name].tolist() for name in "ab"] == [[0.0, 0.0]] * 2


class Silent(torch.Tensor):
    """A tensor that says nothing at all."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise RuntimeError("no")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_subclass_has_no_say_in_a_step(dtype: torch.dtype) -> None:
    w, grad = torch.ones(2, dtype=dtype), torch.full((2,), 0.25, dtype=dtype)
    opt = mo.Optimizer(
        mo.SGD(lr=1.0), mo.Clip(norm=100.0), on_nonfinite="raise", master_weights=True
    )
    for _ in range(2):
        opt.step({"w": w.as_subclass(Silent)}, {"w": grad.as_subclass(Silent)})
    assert w.tolist() == [0.5, 0.5]
    w.requires_grad_().grad = grad.as_subclass(Silent)
    opt.step({"w": w})
    assert w.tolist() == [0.25, 0.25]
    opt.step({"w": w.detach().as_subclass(Silent), "v": w}, {"w": None, "v": grad})
    with pytest.raises(TypeError, match="no parameter requires a gradient or has one"):
        opt.step({"w": w.detach().as_subclass(Silent)})


def test_a_step_inside_a_compiled_function_keeps_its_bits() -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(100_000).astype("f4"), rng.standard_normal((4, 100_000))
    plain, inside = mo.Optimizer(mo.Adam(lr=0.1)), mo.Optimizer(mo.Adam(lr=0.1))

    @torch.compile(backend="eager")
    def step(params: dict[str, torch.Tensor], grad: torch.Tensor) -> torch.Tensor:
        return inside.step(params, {"w": grad})["w"].sum()

    w, params = start.copy(), {"w": torch.from_numpy(start.copy())}
    for grad in grads.astype("f4"):
        plain.step({"w": w}, {"w": grad})
        step(params, torch.from_numpy(grad))
    assert (params["w"].numpy() == w).all()


def test_changes_inside_a_compiled_function_are_left_alone_by_the_compiler() -> None:
    opt, w = mo.Optimizer(mo.SGD(lr=1.0), average=mo.Average()), torch.ones(2)

    @torch.compile(backend="eager")
    def train(grad: torch.Tensor) -> None:
        opt.set_hyperparameters(lr=0.5)
        opt.clip = mo.Clip(value=0.5)
        opt.step({"w": w}, {"w": grad})

    train(torch.ones(2))
    train(torch.ones(2))
    assert w.tolist() == [0.5, 0.5]
    assert opt.average("w").tolist() == [0.625, 0.625]


def test_a_gradient_may_carry_a_graph_and_a_negative_bit() -> None:
    w = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    assert grad.grad_fn is not None
    opt = mo.Optimizer(mo.SGD(lr=0.25))
    opt.step({"w": w}, {"w": grad})
    assert w.tolist() == [0.25, 0.25]
    negative = torch.complex(torch.zeros(2), torch.ones(2)).conj().imag
    assert negative.is_neg()
    opt.step({"w": w}, {"w": negative})
    assert w.tolist() == [0.5, 0.5]


def test_a_tensor_may_be_resized_away_and_swapped_between_steps() -> None:
    w = torch.ones(3, requires_grad=True)
    opt = mo.Optimizer(mo.SGD(lr=1.0, momentum=0.5))
    opt.step({"w": w}, {"w": torch.ones(3)})
    w.data = torch.full((3,), 5.0)
    opt.step({"w": w}, {"w": torch.zeros(3)})
    assert w.tolist() == [4.5, 4.5, 4.5]


def test_inference_tensors_step_inside_inference_mode() -> None:
    with torch.inference_mode():
        w = torch.ones(2)
        mo.Optimizer(mo.SGD(lr=1.0)).step({"w": w}, {"w": torch.ones(2)})
        assert w.tolist() == [0.0, 0.0]


def test_default_dtype_and_deterministic_mode_change_nothing() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            w = torch.ones(3, dtype=torch.float32)
            opt = mo.Optimizer(mo.Adam(lr=0.1), mo.Clip(norm=0.5, value=0.2))
            opt.step({"w": w}, {"w": torch.ones(3, dtype=torch.float32)})
            results.append(w.numpy())
        finally:
            torch.set_default_dtype(torch.float32)
    one, other = results
    np.testing.assert_array_equal(one, other)
