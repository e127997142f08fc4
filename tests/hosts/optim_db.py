"""PyTorch's own database of optimizers: hyperparameters that are valid, and input that is not."""

import io
import subprocess
import sys
from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["CLASSES", "WITHOUT_RULE", "Given", "Invalid", "database", "invalid", "valid"]

#: Reads the database. In a process of its own, for ``torch.testing._internal`` changes settings of
#: torch when it is imported.
READ = """
import sys, torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
from torch.testing._internal import common_optimizers

all_inputs = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs

def errors(info):
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        in_step = error.error_on is OptimizerErrorEnum.STEP_ERROR
        words = error.error_type.__name__, error.error_regex
        yield given.desc, given.params, given.kwargs, in_step, *words

def inputs(given):
    return [(one.desc, one.kwargs) for one in given]

torch.save({
    info.optim_cls.__name__: {
        "valid": inputs(info.optim_inputs_func(device="cpu")),
        "ways": inputs(all_inputs("cpu", torch.float32, info, skip=("differentiable",))),
        "invalid": list(errors(info)),
    }
    for info in optim_db
}, sys.stdout.buffer)
"""

#: Classes that multiopt has no rule for.
WITHOUT_RULE = {
    "LBFGS": "evaluates the loss again within a step, which no rule can",
    "SparseAdam": "is for sparse gradients, which multiopt refuses",
}

CLASSES = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam"),
    *("RAdam", "RMSprop", "Rprop", "SGD"),
)


class Given(NamedTuple):
    """Arguments of a class."""

    description: str
    settings: dict[str, Any]


class Invalid(NamedTuple):
    """Arguments that a class refuses."""

    description: str
    params: Any
    settings: dict[str, Any]
    in_step: bool
    error: str
    words: str


@cache
def database() -> dict[str, dict[str, list[Any]]]:
    run = [sys.executable, "-W", "ignore", "-c", READ]
    output = subprocess.run(run, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, dict[str, list[Any]]] = torch.load(io.BytesIO(output), weights_only=True)
    return found


def valid(name: str, in_all_ways: bool = False) -> list[Given]:
    """The valid arguments of a class, or those with every way of torch to run besides."""
    found = database()[name]["ways" if in_all_ways else "valid"]
    assert len(found) > 3
    return [Given(*one) for one in found]


def invalid(name: str) -> list[Invalid]:
    """What a class refuses, when it is made or at its first step."""
    found = database()[name]["invalid"]
    assert len(found) > 5
    return [Invalid(*one) for one in found]
