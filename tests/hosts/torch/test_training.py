"""Whole trainings: torch's MNIST example, scaled gradients, averaged weights, compiled steps."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

import multiopt as mo
import multiopt.adapters.torch as optim
from tests.hosts.torch import mnist


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What users have."""
    monkeypatch.setenv("MULTIOPT_ENGINE", "compiled")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of torch's that do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_torchs_mnist_example_with_another_import(one_thread: None) -> None:
    ours, ours_tested = mnist.main(optim)
    theirs, theirs_tested = mnist.main(torch.optim)
    # Differences of rounding grow, for a network is trained.
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-5)
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours_tested == pytest.approx(theirs_tested, rel=1e-2)
    assert ours_tested[-1] < 2.0


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def data(step: int) -> torch.Tensor:
    return torch.randn((16, 4), generator=torch.Generator().manual_seed(step))


def loss_of(net: torch.nn.Module, step: int) -> torch.Tensor:
    x = data(step)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def close(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_gradient_scaler_skips_what_overflows_and_unscales_the_rest() -> None:
    sides = []
    for library in (optim, torch.optim):
        net = model()
        adam = library.AdamW(net.parameters(), lr=0.01)
        scheduler = lr_scheduler.ExponentialLR(adam, 0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        scales = []
        for step in range(8):
            adam.zero_grad()
            scaler.scale(loss_of(net, step)).backward()
            if step in (3, 4):
                grad: Any = next(net.parameters()).grad
                grad[0, 0] = torch.inf if step == 3 else torch.nan
            if step % 2:
                scaler.unscale_(adam)
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(adam)
            scaler.update()
            scheduler.step()
            scales.append(scaler.get_scale())
        sides.append((net, scales, [float(v["step"]) for v in adam.state.values()]))
    (ours, *rest), (theirs, *others) = sides
    assert rest == others
    assert rest[1] == [6.0] * 4
    close(ours, theirs)


def test_averaged_weights() -> None:
    sides = []
    for library in (optim, torch.optim):
        net = torch.nn.Sequential(model(), torch.nn.BatchNorm1d(1))
        sgd = library.SGD(net.parameters(), lr=0.05, momentum=0.9)
        scheduler = lr_scheduler.CosineAnnealingLR(sgd, T_max=4)
        averaged = swa_utils.AveragedModel(net)
        constant = swa_utils.SWALR(sgd, swa_lr=0.02, anneal_epochs=2)
        for step in range(8):
            sgd.zero_grad()
            loss_of(net, step).backward()
            sgd.step()
            if step >= 4:
                averaged.update_parameters(net)
                constant.step()
            else:
                scheduler.step()
        swa_utils.update_bn([data(step) for step in range(4)], averaged)
        sides.append(averaged)
    close(*sides)
    assert sides[0].n_averaged == 4


# torch's compiler looks whether a loss has one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step(backend: str) -> None:
    sides = []
    for compiled in (True, False):
        net = model()
        adam = optim.Adam(net.parameters(), lr=0.01, clip=mo.Clip(global_norm=1.0))
        scheduler = lr_scheduler.ExponentialLR(adam, 0.9)

        def train(x: torch.Tensor, net: Any = net, adam: Any = adam) -> torch.Tensor:
            adam.zero_grad()
            loss: torch.Tensor = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            adam.step()
            return loss.detach()

        step = torch.compile(train, backend=backend) if compiled else train
        losses = []
        for number in range(4):
            losses.append(step(data(number)).item())
            scheduler.step()
        sides.append((net, losses))
        assert adam.state[next(net.parameters())]["step"] == 4
    torch._dynamo.reset()
    assert sides[0][1] == pytest.approx(sides[1][1], rel=1e-5)
    close(sides[0][0], sides[1][0])


def test_a_compiled_model_keeps_its_names() -> None:
    net = model()
    wrapped: Any = torch.compile(net, backend="eager")
    adam = optim.Adam(wrapped.named_parameters())
    loss_of(net, 0).backward()
    adam.step()
    assert adam.last.updated[0] == "_orig_mod.0.weight"
    torch._dynamo.reset()


def test_steps_with_other_optimizers_in_one_training() -> None:
    """A model and its copy in one process: neither sees the other's state."""
    sides = []
    for library in (optim, torch.optim):
        net = model()
        matrices = [p for p in net.parameters() if p.ndim == 2]
        others = [p for p in net.parameters() if p.ndim != 2]
        optimizers = [library.SGD(matrices, lr=0.1), library.AdamW(others, lr=0.1)]
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
        sides.append(net)
    close(*sides)


def test_training_goes_on_from_a_file_at_the_same_bits(tmp_path: Any) -> None:
    def begin() -> tuple[Any, Any, Any]:
        net = model()
        adam = optim.AdamW(net.named_parameters(), lr=0.05, clip=mo.Clip(global_norm=0.5))
        return net, adam, lr_scheduler.CosineAnnealingWarmRestarts(adam, T_0=3)

    def some(parts: tuple[Any, Any, Any], first: int) -> None:
        net, adam, scheduler = parts
        for step in range(first, first + 4):
            adam.zero_grad()
            loss_of(net, step).backward()
            adam.step()
            scheduler.step()

    whole = begin()
    some(whole, 0)
    torch.save([part.state_dict() for part in whole], tmp_path / "run.pt")
    some(whole, 4)
    resumed = begin()
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    some(resumed, 4)
    pairs = zip(whole[0].parameters(), resumed[0].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    again = copy.deepcopy(resumed)
    assert again[1].param_groups[0]["lr"] == resumed[1].param_groups[0]["lr"]


def test_gradients_that_are_added_up() -> None:
    sides = []
    for library in (optim, torch.optim):
        net = model()
        adam = library.Adam(net.parameters(), lr=0.01)
        for step in range(6):
            loss_of(net, step).backward()
            if step % 3 == 2:
                adam.step()
                adam.zero_grad(set_to_none=False)
        sides.append(net)
    close(*sides)
