"""Stochastic optimizers for named parameters that appear while a model runs.

One update rule, written once against the Array API, turns equal gradients into equal results, to
the last bit, on NumPy, PyTorch and JAX arrays.

>>> import numpy as np
>>> import multiopt as mo
>>> opt = mo.Optimizer(mo.Adam(lr=1e-2))
>>> params = opt.step({"loc": np.zeros(2)}, {"loc": np.array([1.0, -2.0])})
>>> params["loc"].round(4).tolist()
[-0.01, 0.01]
"""

from multiopt import rules, schedules
from multiopt.errors import CheckpointError
from multiopt.optimizer import Optimizer
from multiopt.rules import *  # noqa: F403  the names of rules stand in one place
from multiopt.rules.average import Average
from multiopt.state.report import LoadReport
from multiopt.stateful import State
from multiopt.step.clip import Clip
from multiopt.step.report import Report
from multiopt.step.skips import Skips

__all__ = [
    "Average",
    "CheckpointError",
    "Clip",
    "LoadReport",
    "Optimizer",
    "Report",
    "Skips",
    "State",
    "schedules",
]
__all__ += rules.__all__

__version__ = "0.1.0"


def __dir__() -> list[str]:
    """The public names, for completion; the rooms of the house are not among them."""
    return sorted([*__all__, "__version__"])
