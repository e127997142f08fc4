"""transformers' Trainer trains with the optimizers, given to it or made by it, and resumes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import multiopt.adapters.torch as multiopt_optim
from tests.hosts.training import assert_equal, assert_near

STEPS = 8

#: The gradient of the biases of keys is a rounding error, which eps keeps from being scaled up.
SETTINGS = {"lr": 0.01, "eps": 1e-6}

Way: TypeAlias = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    disable_progress_bar()
    yield
    enable_progress_bar()


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences to learn by heart."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def language_model() -> Any:
    """A model with dropouts, which draw numbers, and an embedding that is used twice."""
    set_seed(0)
    size = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def given(optim: ModuleType, model: torch.nn.Module) -> dict[str, Any]:
    """An optimizer and a scheduler of the user."""
    optimizer = optim.AdamW(model.parameters(), **SETTINGS)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))}


def made(optim: ModuleType, model: torch.nn.Module, **more: Any) -> dict[str, Any]:
    """An optimizer that Trainer makes, with a group that decays and one that does not."""
    return {"optimizer_cls_and_kwargs": (optim.AdamW, {**SETTINGS, **more})}


def made_with_names(optim: ModuleType, model: torch.nn.Module) -> dict[str, Any]:
    return made(optim, model, names=model.named_parameters())


def trainer_of(way: Way, folder: Path, optim: ModuleType = multiopt_optim) -> Any:
    model = language_model()
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=Tokens(), **way(optim, model))


def trained(
    way: Way, folder: Path, optim: ModuleType = multiopt_optim, checkpoint: Path | None = None
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    trainer = trainer_of(way, folder, optim)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.model, trainer.optimizer.optimizer


@pytest.mark.parametrize("way", [given, made])
def test_follows_torch_where_only_the_import_changed(way: Way, tmp_path: Path) -> None:
    ours, theirs = (
        trained(way, tmp_path / optim.__name__, optim)[0] for optim in (multiopt_optim, torch.optim)
    )
    assert_near(ours, theirs)


@pytest.mark.parametrize("way", [given, made, made_with_names])
def test_a_resumed_run_is_equal_to_an_uninterrupted_one(way: Way, tmp_path: Path) -> None:
    whole = trained(way, tmp_path)
    half = tmp_path / f"checkpoint-{STEPS // 2}"
    saved = torch.load(half / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in saved["state"].values()} == {STEPS // 2}
    assert_equal(trained(way, tmp_path / "resumed", checkpoint=half), whole)


def test_names_are_found_for_the_groups_that_it_makes(tmp_path: Path) -> None:
    trainer = trainer_of(made_with_names, tmp_path)
    decayed, others = (group["param_names"] for group in trainer.create_optimizer().param_groups)
    assert sorted([*decayed, *others]) == sorted(n for n, _ in trainer.model.named_parameters())
    assert "transformer.wte.weight" in decayed
    assert "transformer.ln_f.bias" in others
