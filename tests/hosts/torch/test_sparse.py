"""Sparse gradients: torch's own answer, class by class."""

from typing import Any

import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.optim_db import CLASSES

#: torch says once that it does not check what sparse tensors are made of.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

TAKEN = ("Adagrad", "SGD")


def sparse(step: int, shape: tuple[int, int] = (4, 3)) -> torch.Tensor:
    """A gradient of two rows, one of them twice, as an embedding gives it."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.tensor([[step % 4, 2, 2]])
    values = torch.randn(3, shape[1], generator=generator)
    return torch.sparse_coo_tensor(rows, values, shape)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "maximize": True}),
        ("Adagrad", {"lr": 0.1}),
        ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
        ("Adagrad", {"lr": 0.1, "maximize": True}),
    ],
)
def test_classes_that_take_them(name: str, settings: dict[str, Any]) -> None:
    sides = []
    for library in (optim, torch.optim):
        table, bias = torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(3))
        optimizer = getattr(library, name)([table, bias], **settings)
        for step in range(5):
            table.grad, bias.grad = sparse(step), torch.full((3,), 1.0 + step)
            optimizer.step()
            assert table.grad.is_sparse
        sides.append((table.detach(), bias.detach()))
    torch.testing.assert_close(*sides, rtol=1e-5, atol=1e-6)


def test_an_embedding_is_trained() -> None:
    sides = []
    for library in (optim, torch.optim):
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(10, 4, sparse=True)
        optimizer = library.SGD(embedding.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            embedding(torch.tensor([step, step + 1, step])).square().sum().backward()
            optimizer.step()
        sides.append(embedding.weight.detach())
    torch.testing.assert_close(*sides)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(TAKEN)))
def test_classes_that_take_none_say_so_in_torchs_words(name: str) -> None:
    words = []
    for library in (optim, torch.optim):
        dense, table = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        optimizer = getattr(library, name)([dense, table])
        dense.grad, table.grad = torch.ones(4, 3), sparse(0)
        for _ in range(2):
            with pytest.raises(RuntimeError) as caught:
                optimizer.step()
        words.append(str(caught.value))
        assert torch.equal(dense, torch.ones(4, 3))
    assert words[0] == words[1]


def test_adagrad_takes_them_without_a_penalty_only() -> None:
    words = []
    for library in (optim, torch.optim):
        table = torch.nn.Parameter(torch.ones(4, 3))
        table.grad = sparse(0)
        with pytest.raises(RuntimeError) as caught:
            library.Adagrad([table], weight_decay=0.1).step()
        words.append(str(caught.value))
    assert words[0] == words[1]


def test_any_optimizer_of_the_rule_takes_them() -> None:
    class Mine(optim.SGD):
        pass

    for make in (lambda p: optim.Optimizer(p, mo.SGD(lr=1.0)), lambda p: Mine(p, lr=1.0)):
        table = torch.nn.Parameter(torch.zeros(4, 3))
        table.grad = sparse(0)
        make([table]).step()
        assert torch.equal(table, -sparse(0).to_dense())
    table.grad = sparse(0)
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        optim.Optimizer([table], mo.Lion()).step()


def test_a_clip_and_skips_see_the_dense_gradient() -> None:
    table = torch.nn.Parameter(torch.zeros(4, 3))
    sgd = optim.SGD([table], lr=1.0, clip=mo.Clip(norm=0.5), on_nonfinite="skip")
    table.grad = sparse(1)
    sgd.step()
    torch.testing.assert_close(table.detach().norm(), torch.tensor(0.5))
    assert sgd.last.norms["0"] == pytest.approx(sparse(1).to_dense().norm().item())
    table.grad = sparse(1) * torch.inf
    sgd.step()
    assert sgd.last.skipped == ("0",)


def test_sparse_parameters_are_refused() -> None:
    table = sparse(0).requires_grad_()
    sgd = optim.SGD([table])
    table.grad = sparse(0)
    with pytest.raises(TypeError, match="'0'"):
        sgd.step()
