"""A drop-in for ``pyro.optim``: ``import multiopt.adapters.pyro as optim``.

Names, calls, arguments and results are Pyro's; ``docs/pyro.md`` lists the deliberate differences.

>>> import pyro, torch
>>> import multiopt.adapters.pyro as optim
>>> adam = optim.Adam({"lr": 0.5}, {"clip_norm": 10.0})
>>> loc = torch.zeros(2, requires_grad=True)
>>> (loc - 3).square().sum().backward()
>>> adam({loc})
>>> loc.detach().numpy().round(4).tolist()
[0.5, 0.5]
"""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any

import pyro.optim
import torch
from pyro.optim import HorovodOptimizer, adagrad_rmsprop, clipped_adam, dct_adam

from multiopt.adapters.pyro import lr_scheduler, multi
from multiopt.adapters.pyro.constructors import CONSTRUCTORS, RULES
from multiopt.adapters.pyro.distributed import Distributed
from multiopt.adapters.pyro.lr_scheduler import PyroLRScheduler
from multiopt.adapters.pyro.optim import PyroOptim

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]:
        """Return one of ``FACTORIES``; the type of its result depends on its arguments."""


def _factory(name: str, like: Callable[..., Any]) -> Callable[..., PyroOptim]:
    """Make the counterpart of a function of ``pyro.optim``.

    Args:
        name: The name of the function.
        like: Pyro's function, which takes the same arguments.
    """
    wrapper: Any = PyroOptim
    constructor: Any = CONSTRUCTORS.get(name)
    first = "Arguments of the torch optimizer, or a callable that gives them for a parameter name"
    if constructor is None:
        wrapper, constructor = PyroLRScheduler, getattr(torch.optim.lr_scheduler, name)
        what = f"``torch.optim.lr_scheduler.{name}``"
        first = "The torch optimizer, its arguments, and those of the scheduler"
    elif constructor in RULES:
        what = f"the rule ``multiopt.{name}``"
    else:
        what = f"``{constructor.__module__}.{name}``, wrapped as Pyro does"
    doc = [f"``pyro.optim.{name}``: {what}.", "", "Args:", f"    optim_args: {first}."]
    own = dict(signature(wrapper.__init__).parameters)
    without = ["self", "optim_constructor", "scheduler_constructor"]
    if "clip_args" in signature(like).parameters:
        doc.append("    clip_args: ``clip_norm`` and ``clip_value``, or a callable for them.")
    else:
        without.append("clip_args")
    parameters = [parameter for key, parameter in own.items() if key not in without]
    more = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    doc += [f"    {key}: The argument of ``PyroOptim``." for key in more]

    def factory(*args: Any, **kwargs: Any) -> PyroOptim:
        bound = arguments.bind(*args, **kwargs)
        optimizer: PyroOptim = wrapper(constructor, *bound.args, **bound.kwargs)
        return optimizer

    arguments = factory.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = "\n".join(doc)
    return factory


#: The functions of ``pyro.optim``; an optimizer uses multiopt's rule of the same name, if any.
FACTORIES = {
    name: _factory(name, getattr(pyro.optim, name))
    for name in pyro.optim.__all__
    if name in CONSTRUCTORS or hasattr(torch.optim.lr_scheduler, name)
}
globals().update(FACTORIES)

__all__ = [
    "Distributed",
    "HorovodOptimizer",
    "PyroLRScheduler",
    "PyroOptim",
    "adagrad_rmsprop",
    "clipped_adam",
    "dct_adam",
    "lr_scheduler",
    "multi",
    *FACTORIES,
]
