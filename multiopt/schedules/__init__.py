"""Schedules: numbers that change from step to step, for any hyperparameter in a rule's ``ranges``.

A schedule is a callable ``step -> number``, and any callable will do. Those here can be pickled,
compared, printed as the call that makes them, and described in saved state.

**The step is the number of the step about to be taken, 1 for the first**: what a schedule gives for
``t`` is what step ``t`` uses. Counting from 0, as optax and torch do, ``t`` is their ``t - 1``. It
counts the steps of the parameter's own name, so that a late parameter begins at the beginning;
``Shared`` counts the steps of the optimizer instead.

Values are computed in float64 with the powers and cosines of the host: equal on all backends of one
machine, and in the last bit perhaps not on another.

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
from multiopt.schedules.curves import *  # noqa: F403  the names of curves stand in one place
from multiopt.schedules.plateau import Plateau

__all__ = ["Join", "Plateau", "Schedule", "Shared"]
__all__ += curves.__all__
