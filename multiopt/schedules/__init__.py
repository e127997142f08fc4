"""Schedules: numbers that change from step to step, for any hyperparameter in a rule's ``ranges``.

A schedule is a callable ``step -> number``, and any callable will do. The schedules of this package
can also be pickled, compared, printed as the call that creates them, and described in saved state.

**A schedule is called with the number of the step about to be taken, counted from 1**: step ``t``
uses its value for ``t``. optax and torch count from 0, so ``t`` is their ``t - 1``. The number is
the parameter's own clock plus one, so a parameter that appears late starts its schedule at the
beginning; ``Shared`` counts the steps of the optimizer instead.

Values are computed in float64 with the powers and cosines of the host. They are equal on all
backends of one machine, but between machines the last bit may differ.

>>> import multiopt as mo
>>> lr = mo.schedules.Join([mo.schedules.Linear(0.0, 0.5, 2), mo.schedules.Cosine(0.5, 4)], [2])
>>> [round(lr(step), 4) for step in range(1, 8)]
[0.0, 0.25, 0.5, 0.4268, 0.25, 0.0732, 0.0]
>>> mo.Adam(lr=lr).at(2).lr
0.25
"""

from multiopt.schedules import curves
from multiopt.schedules.base import Schedule
from multiopt.schedules.combined import Join, Shared
from multiopt.schedules.curves import *  # noqa: F403  so that their names are listed only once
from multiopt.schedules.plateau import Plateau

__all__ = ["Join", "Plateau", "Schedule", "Shared"]
__all__ += curves.__all__
