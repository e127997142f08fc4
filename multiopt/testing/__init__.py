"""For your own tests: whether a port trains as its prototype does.

The gradients of two libraries differ in their last bits, so a test that asks for equal parameters
fails where nothing is wrong. A test with a tolerance passes where something is: Adam hides a
loss that is scaled wrongly, since it divides the scale out again. So gradients are compared, each
at the parameters of the prototype, and the first that departs is named, with its usual cause:

>>> import numpy as np, multiopt as mo
>>> from multiopt.testing import compare_training
>>> x, y = np.random.default_rng(0).standard_normal((2, 8))
>>> def prototype(params, step):
...     return {"w": np.mean(x * (params["w"] * x - y), keepdims=True)}
>>> def port(params, step):
...     return {"w": np.sum(x * (params["w"] * x - y), keepdims=True)}
>>> start = {"w": np.zeros(1)}
>>> compare_training(prototype, prototype, start, to_port=np.copy, rule=mo.Adam()) is None
True
>>> print(compare_training(prototype, port, start, to_port=np.copy, rule=mo.Adam()))
step 1, gradient of 'w' at [0]: the port gives 1.467..., the prototype 0.1834...
scaled: it is 8 times as large. A sum in the place of a mean, or the size of a batch or of the data
that is missing in a factor?

``multiopt.testing.strategies`` draws parameters and data for property tests with hypothesis.
"""

from multiopt.testing.backends import check_backend
from multiopt.testing.departure import Departure
from multiopt.testing.rules import check_rule
from multiopt.testing.training import assert_same_training, compare_training

__all__ = [
    "Departure",
    "assert_same_training",
    "check_backend",
    "check_rule",
    "compare_training",
]
