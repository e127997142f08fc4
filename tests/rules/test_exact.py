"""The rules against exact arithmetic: random histories, recomputed with mpmath."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import multiopt as mo
from spec.check_vectors import RULES, deviations
from tests.cases import options as hyperparameters

#: After step t a parameter or a slot may be off by t ulps and this many: ulps at the largest
#: magnitude that it has had (``deviations``). A step rounds a sum or an average two or three times,
#: by half an ulp at most, and where gradients are steady to the same side each time: about an ulp a
#: step; the rest is for the first. In 40 000 histories the largest excess over t was 4.
ULPS = 8.0


@dataclass
class History:
    """One element: hyperparameters, the parameter at the start and its gradients."""

    options: dict[str, Any]
    param: float
    grads: list[float]


@st.composite
def histories(draw: st.DrawFn, rule: str, dtype: str) -> History:
    """Histories of moderate numbers, on which the rule is no ill-conditioned function.

    Three mixtures are left out, which magnify every rounding error, whoever computes them. Adam
    divides a gradient by its own size, so of one that the L2 penalty cancels it takes the rounding
    error for the direction: with a penalty, gradients are large against it. And a centered variance
    of steady gradients goes to zero: with it, gradients change signs. Lion takes the sign of a sum:
    of one that cancels it takes that of the rounding error.
    """
    options = draw(hyperparameters(getattr(mo, rule), moderate=True))
    size = magnitudes(0.1, 100.0, dtype)
    centered = rule == "AdaBelief" or any(
        options.get(name, False) for name in ("centered_variance", "centered")
    )
    if rule in ("SGD", "AdamW", "ASGD") or not (options.get("weight_decay") or centered):
        size |= st.just(0.0)
    n = draw(st.integers(1, 50))
    sizes = draw(st.lists(size, min_size=n, max_size=n))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=n, max_size=n))
    if centered:
        signs = [(-1) ** step for step in range(n)]
    param = draw(st.just(0.0) | magnitudes(0.01, 10.0, dtype)) * draw(st.sampled_from([-1, 1]))
    grads = [x * sign for x, sign in zip(sizes, signs, strict=True)]
    assume(rule != "Lion" or not cancels(grads, *options["betas"]))
    return History(options, param, grads)


def cancels(grads: list[float], beta1: float, beta2: float) -> bool:
    """Whether one of the sums that Lion takes the sign of is small against its parts."""
    average = 0.0
    for grad in grads:
        old, new = beta1 * average, (1 - beta1) * grad
        if abs(old + new) < 1e-4 * (abs(old) + abs(new)):
            return True
        average = beta2 * average + (1 - beta2) * grad
    return False


def magnitudes(low: float, high: float, dtype: str) -> st.SearchStrategy[float]:
    """Numbers that the dtype holds exactly."""
    low, high = (float(np.dtype(dtype).type(x)) for x in (low, high))
    return st.floats(low, high, width=32 if dtype == "float32" else 64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_rule_is_close_to_exact_arithmetic(rule: str, dtype: str, data: st.DataObject) -> None:
    history = data.draw(histories(rule, dtype))
    assert history.options.keys() == {f.name for f in fields(getattr(mo, rule))}
    opt = mo.Optimizer(getattr(mo, rule)(**history.options))
    w = np.array(history.param, dtype)
    steps = []
    for grad in history.grads:
        opt.step({"w": w}, {"w": np.array(grad, dtype)})
        slots = opt.state("w").slots
        steps.append({"param": float(w), **{name: float(x) for name, x in slots.items()}})
    listed = {k: list(x) if isinstance(x, tuple) else x for k, x in history.options.items()}
    off = deviations(rule, dtype, listed, history.param, history.grads, steps)
    for name, distances in off.items():
        for step, distance in enumerate(distances, start=1):
            assert distance <= step + ULPS, f"{name} after step {step}: {distance:.1f} ulps"
