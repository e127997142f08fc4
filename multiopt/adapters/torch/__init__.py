"""``import multiopt.adapters.torch as optim`` in the place of ``import torch.optim as optim``.

``Optimizer`` makes any rule an optimizer of PyTorch, and there is a class for each one of
``torch.optim`` that has a rule. The rest of ``torch.optim`` is torch's own. ``docs/torch.md`` is
the guide.

``settings`` and ``state`` translate groups and the state of a parameter to multiopt's terms and
back, also for ``torch_optim`` and ``pyro``; ``file`` reads files of ``torch.save`` without running
code.
"""

from torch.optim import LBFGS, SparseAdam, lr_scheduler, swa_utils

from multiopt.adapters.torch import adaptive, descent
from multiopt.adapters.torch.adaptive import *  # noqa: F403
from multiopt.adapters.torch.descent import *  # noqa: F403
from multiopt.adapters.torch.optimizer import Optimizer

__all__ = ["LBFGS", "Optimizer", "SparseAdam", "lr_scheduler", "swa_utils"]
__all__ += adaptive.__all__
__all__ += descent.__all__
