"""Lightning trains with the optimizers, clips, accumulates and resumes as with torch's."""

from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
import torch

import multiopt as mo
import multiopt.adapters.torch as multiopt_optim
from tests.hosts.training import ALONE, assert_equal, assert_near, batches, mse_loss, network

EPOCHS = 4


class Regression(lightning.LightningModule):
    def __init__(self, optim: ModuleType) -> None:
        super().__init__()
        self.optim, self.net = optim, network()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        inputs, targets = batch
        return mse_loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = self.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=60)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def fit(
    module: lightning.LightningModule,
    folder: Path,
    epochs: int = EPOCHS,
    checkpoint: Path | None = None,
    **settings: Any,
) -> lightning.Trainer:
    trainer = lightning.Trainer(max_epochs=epochs, default_root_dir=folder, **ALONE, **settings)
    trainer.fit(module, batches(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="plain"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"accumulate_grad_batches": 4}, id="accumulated"),
        pytest.param({"gradient_clip_val": 0.1}, id="norm clipped"),
        pytest.param(
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, id="value clipped"
        ),
    ],
)
def test_follows_torch_where_only_the_import_changed(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = Regression(multiopt_optim), Regression(torch.optim)
    for module in (ours, theirs):
        fit(module, tmp_path, **settings)
    assert_near(ours, theirs)


def test_trains_as_a_loop_of_its_own_does(tmp_path: Path) -> None:
    module, alone = Regression(multiopt_optim), Regression(multiopt_optim)
    trainer = fit(module, tmp_path, gradient_clip_val=0.1, accumulate_grad_batches=2)

    configured = alone.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        for index, batch in enumerate(batches()):
            (alone.training_step(batch, index) / 2).backward()
            if index % 2:
                torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    assert_equal((module, trainer.optimizers[0]), (alone, optimizer))


class Named(Regression):
    """With names, a rule of multiopt and its clip."""

    def configure_optimizers(self) -> Any:
        return multiopt_optim.Optimizer(
            self.named_parameters(), mo.LAMB(lr=0.01), mo.Clip(global_norm=0.1)
        )


@pytest.mark.parametrize("kind", [Regression, Named])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_is_equal_to_an_uninterrupted_one(
    kind: type[Regression], precision: Any, tmp_path: Path
) -> None:
    whole = kind(multiopt_optim)
    expected = fit(whole, tmp_path, precision=precision)

    checkpoint = tmp_path / "half.ckpt"
    half = fit(kind(multiopt_optim), tmp_path, EPOCHS // 2, precision=precision)
    half.save_checkpoint(checkpoint)
    resumed = kind(multiopt_optim)
    found = fit(resumed, tmp_path, checkpoint=checkpoint, precision=precision)

    assert_equal((resumed, found.optimizers[0]), (whole, expected.optimizers[0]))


@pytest.mark.parametrize(
    ("before", "after"), [(torch.optim, multiopt_optim), (multiopt_optim, torch.optim)]
)
def test_the_import_may_change_at_a_checkpoint(
    before: ModuleType, after: ModuleType, tmp_path: Path
) -> None:
    whole = Regression(torch.optim)
    fit(whole, tmp_path)
    checkpoint = tmp_path / "half.ckpt"
    fit(Regression(before), tmp_path, EPOCHS // 2).save_checkpoint(checkpoint)
    resumed = Regression(after)
    fit(resumed, tmp_path, checkpoint=checkpoint)
    assert_near(resumed, whole)


class Adversaries(lightning.LightningModule):
    """Two optimizers, which the module steps itself."""

    def __init__(self, optim: ModuleType) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.optim, self.net, self.critic = optim, network(), torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.critic.weight, 0.5)
        torch.nn.init.zeros_(self.critic.bias)

    def training_step(self, batch: Any, index: int) -> None:
        inputs, targets = batch
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(sign * mse_loss(self.critic(self.net(inputs)), targets))
            self.clip_gradients(optimizer, gradient_clip_val=0.1)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            self.optim.Adam(self.net.parameters(), lr=0.01, betas=(0.5, 0.9)),
            self.optim.SGD(self.critic.parameters(), lr=0.1, momentum=0.9),
        ]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


def test_optimizers_may_be_stepped_by_hand(tmp_path: Path) -> None:
    ours, theirs = Adversaries(multiopt_optim), Adversaries(torch.optim)
    for module in (ours, theirs):
        fit(module, tmp_path)
    assert_near(ours, theirs)
