"""accelerate prepares the optimizers, accumulates, clips, and saves their state."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

import multiopt as mo
import multiopt.adapters.torch as multiopt_optim
from tests.hosts.training import assert_equal, assert_near, batches, mse_loss, network

EPOCHS = 4


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Forget what accelerate keeps for a whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def configured(optim: ModuleType) -> tuple[Any, Any, Any]:
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 20)


def trained(
    optim: ModuleType,
    epochs: int = EPOCHS,
    load: Path | None = None,
    save: Path | None = None,
    **settings: Any,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    model, optimizer, scheduler, loader = accelerator.prepare(*configured(optim), batches())
    if load is not None:
        accelerator.load_state(load)
    for _ in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(mse_loss(model(inputs), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                assert not optimizer.step_was_skipped
    if save is not None:
        accelerator.save_state(save)
    return accelerator.unwrap_model(model, keep_fp32_wrapper=False), optimizer.optimizer


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_follows_torch_where_only_the_import_changed(precision: str) -> None:
    ours, theirs = (
        trained(optim, mixed_precision=precision)[0] for optim in (multiopt_optim, torch.optim)
    )
    assert_near(ours, theirs)


def test_trains_as_a_loop_of_its_own_does() -> None:
    model, optimizer, scheduler = configured(multiopt_optim)
    for _ in range(EPOCHS):
        for index, (inputs, targets) in enumerate(batches()):
            (mse_loss(model(inputs), targets) / 2).backward()
            if index % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert_equal(trained(multiopt_optim), (model, optimizer))


def test_a_resumed_run_is_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    _, optimizer = trained(multiopt_optim, EPOCHS // 2, save=tmp_path)
    saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    torch.testing.assert_close(saved["state"], optimizer.state_dict()["state"], rtol=0.0, atol=0.0)
    assert {int(state["step"]) for state in saved["state"].values()} == {3 * EPOCHS // 2}
    resumed = trained(multiopt_optim, EPOCHS // 2, load=tmp_path)
    assert_equal(resumed, trained(multiopt_optim))


@pytest.mark.parametrize(
    ("before", "after"), [(torch.optim, multiopt_optim), (multiopt_optim, torch.optim)]
)
def test_the_import_may_change_at_a_checkpoint(
    before: ModuleType, after: ModuleType, tmp_path: Path
) -> None:
    trained(before, EPOCHS // 2, save=tmp_path)
    resumed, _ = trained(after, EPOCHS // 2, load=tmp_path)
    assert_near(resumed, trained(torch.optim)[0])


def test_an_optimizer_of_named_arrays_is_registered(tmp_path: Path) -> None:
    """accelerate does not know ``multiopt.Optimizer``: it takes it, and leaves its state out."""
    accelerator, optimizer = accelerate.Accelerator(cpu=True), mo.Optimizer(mo.Adam())
    params = dict(network().named_parameters())
    grads = {name: torch.ones_like(param) for name, param in params.items()}
    optimizer.step(params, grads)
    assert accelerator.prepare(optimizer) is optimizer
    accelerator.save_state(tmp_path / "without")
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["random_states_0.pkl"]

    accelerator.register_for_checkpointing(optimizer)
    accelerator.save_state(tmp_path / "with")
    optimizer.step(params, grads)
    accelerator.load_state(tmp_path / "with")
    expected = mo.Optimizer(mo.Adam())
    expected.step(dict(network().named_parameters()), grads)
    for name in params:
        assert optimizer.state(name).step == 1
        slots, others = (one.state(name).slots for one in (optimizer, expected))
        torch.testing.assert_close(slots, others, rtol=0.0, atol=0.0)
