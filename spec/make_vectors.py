"""Write the vectors from the NumPy backend: ``python spec/make_vectors.py [DIRECTORY]``.

The files are the same on every machine: the inputs are defined here, and the arithmetic is that of
``arithmetic.md``. ``check_vectors.py`` checks whether the numbers are right.
"""

import json
import sys
from collections.abc import Mapping
from math import inf, nan
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

import multiopt as mo

#: For each dtype, one row per element: the parameter, then its gradients, one per step.
Rows: TypeAlias = Mapping[str, list[list[float]]]

COMMON = [
    [1.0, 0.5, -0.25, 0.125, -0.0625, 2.0],  # exact in binary, signs change
    [-0.7, -0.3, -0.2, -0.9, -0.1, -0.4],
    [250.0, 3.0, 40.0, 0.7, 0.01, 0.002],  # rises, then falls: AMSGrad keeps the largest
    [1e-3, 1e-12, 3e-12, 2e-9, -1e-8, 5e-9],  # about as small as eps
    [-2.5, 0.0, 0.0, 0.6, 0.0, -0.1],  # zero gradients, at first and later
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    [-0.0, -0.01, 0.02, 0.03, -0.04, 0.05],
]
ROWS: Rows = {
    "float32": [
        *COMMON,
        [1.5, 1e18, -2e18, 3e17, 1e18, 2e18],
        [-1.5, 1e-41, -3e-42, 1.4e-45, 0.0, 2e-39],  # subnormal
    ],
    "float64": [
        *COMMON,
        [1.5, 1e153, -2e153, 3e152, 1e153, 2e153],
        [-1.5, 1e-310, -3e-311, 5e-324, 0.0, 2e-308],
    ],
}

#: Gradients whose squares overflow, while a thousandth of the square does not.
HUGE: Rows = {
    "float32": [[1.5, 1e20, -2e20, 3e19, 1e20, 2e20]],
    "float64": [[1.5, 1e155, -2e155, 3e154, 1e155, 2e155]],
}

#: Enough steps to tell one way of repeated squaring from another: they first differ at the sixth.
TWENTY_STEPS = [[1.0, *[0.3, -0.7, 1.1, 0.2] * 5], [-3.0, *[2.0, 0.5] * 10]]
LONG: Rows = {"float32": TWENTY_STEPS, "float64": TWENTY_STEPS}

#: Infinity, NaN and overflow, next to one element that must not be affected.
NONFINITE_COMMON = [
    [1.0, inf, 0.5, 0.25, -1.0, 2.0],
    [1.0, 0.5, -inf, 0.25, -1.0, 2.0],
    [1.0, 0.5, nan, 0.25, -1.0, 2.0],
    [inf, 0.5, -0.5, 0.25, -1.0, 2.0],
    [1.0, 0.5, -0.5, 0.25, -1.0, 2.0],
]
NONFINITE: Rows = {
    "float32": [*NONFINITE_COMMON, [1.0, 1e20, 1e21, 0.25, -1.0, 2.0]],
    "float64": [*NONFINITE_COMMON, [1.0, 1e155, 1e156, 0.25, -1.0, 2.0]],
}

#: For eps = 0: zero over zero, and gradients that are not zero although a thousandth of their
#: square underflows to zero.
NO_EPS: Rows = {
    "float32": [*COMMON[:3], [1.0, 0.0, 0.5, -0.5, 1.0, 2.0], [1.0, 1e-22, 0.5, -0.5, 1.0, 2.0]],
    "float64": [*COMMON[:3], [1.0, 0.0, 0.5, -0.5, 1.0, 2.0], [1.0, 1e-162, 0.5, -0.5, 1.0, 2.0]],
}
#: The same with gradients whose whole square underflows to zero.
NO_SUM: Rows = {**NO_EPS, "float32": [*NO_EPS["float32"][:4], [1.0, 1e-23, 0.5, -0.5, 1.0, 2.0]]}

#: Steady gradients, whose variance is rounded to zero or to a negative number: the second row with
#: an alpha of 0.1 in float32, the third in float64. A large eps hides how much it is.
STEADY_STEPS = [[2.0, *[size] * 20] for size in (1.0, 1.1, 0.3)]
STEADY: Rows = {"float32": STEADY_STEPS, "float64": STEADY_STEPS}


class Schedule:
    """A schedule given by a list of numbers, one per step."""

    def __init__(self, *numbers: float) -> None:
        """Take the numbers for steps 1, 2, ..."""
        self.numbers = numbers

    def __call__(self, step: int) -> float:
        """Return the number for a step."""
        return self.numbers[step - 1]


LR = Schedule(0.1, 0.05, 0.02, 0.01, 0.005)
BETAS = (Schedule(0.5, 0.9, 0.6, 0.8, 0.95), Schedule(0.9, 0.99, 0.999, 0.5, 0.0))
EPS = Schedule(1e-8, 1e-3, 1e-6, 1e-8, 0.1)
DECAY = Schedule(0.0, 0.1, 0.0, 0.01, 0.2)


class Case(NamedTuple):
    """A rule, a name for its options, and the rows that it runs on."""

    name: str
    rule: mo.Rule
    rows: Rows = ROWS


CASES = {
    "sgd": [
        Case("defaults", mo.SGD()),
        Case("momentum", mo.SGD(lr=0.1, momentum=0.9)),
        Case("dampening", mo.SGD(lr=0.1, momentum=0.9, dampening=0.3)),
        Case("dampening without momentum", mo.SGD(lr=0.1, dampening=0.3)),
        Case("nesterov", mo.SGD(lr=0.1, momentum=0.9, nesterov=True)),
        Case("weight_decay", mo.SGD(lr=0.1, weight_decay=0.01)),
        Case("maximize", mo.SGD(lr=0.1, maximize=True)),
        Case(
            "nesterov, weight_decay, maximize",
            mo.SGD(lr=0.1, momentum=0.8, weight_decay=0.3, nesterov=True, maximize=True),
        ),
        Case(
            "schedules",
            mo.SGD(
                lr=LR,
                momentum=Schedule(0.9, 0.5, 0.0, 0.99, 0.8),
                dampening=Schedule(0.5, 0.0, 0.3, 0.1, -1.0),
                weight_decay=DECAY,
            ),
        ),
        Case(
            "decoupled_weight_decay",
            mo.SGD(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case(
            "momentum, decoupled_weight_decay, maximize",
            mo.SGD(
                lr=0.1, momentum=0.9, weight_decay=0.3, maximize=True, decoupled_weight_decay=True
            ),
        ),
        Case("not finite", mo.SGD(lr=0.1), NONFINITE),
        Case("not finite, momentum", mo.SGD(lr=0.1, momentum=0.9), NONFINITE),
    ],
    "adam": [
        Case("defaults", mo.Adam()),
        Case("lr, betas, eps", mo.Adam(lr=0.1, betas=(0.6, 0.95), eps=1e-3)),
        Case("betas of zero", mo.Adam(lr=0.1, betas=(0.0, 0.0))),
        Case("weight_decay", mo.Adam(lr=0.1, weight_decay=0.01)),
        Case("maximize", mo.Adam(lr=0.1, maximize=True)),
        Case("amsgrad", mo.Adam(lr=0.1, betas=(0.9, 0.9), amsgrad=True)),
        Case("amsgrad corrected", mo.Adam(lr=0.1, betas=(0.9, 0.9), amsgrad="corrected")),
        Case(
            "amsgrad, weight_decay, maximize",
            mo.Adam(lr=0.1, weight_decay=0.3, amsgrad=True, maximize=True),
        ),
        Case(
            "decoupled_weight_decay",
            mo.Adam(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case("schedules", mo.Adam(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)),
        Case("huge gradients", mo.Adam(lr=0.1), HUGE),
        Case("twenty steps", mo.Adam(lr=0.1), LONG),
        Case("eps of zero", mo.Adam(lr=0.1, eps=0.0), NO_EPS),
        Case("not finite", mo.Adam(lr=0.1), NONFINITE),
        Case("not finite, amsgrad", mo.Adam(lr=0.1, amsgrad=True), NONFINITE),
        Case("not finite, amsgrad corrected", mo.Adam(lr=0.1, amsgrad="corrected"), NONFINITE),
    ],
    "adamw": [
        Case("defaults", mo.AdamW()),
        Case("weight_decay", mo.AdamW(lr=0.1, weight_decay=0.5)),
        Case("weight_decay of zero", mo.AdamW(lr=0.1, weight_decay=0.0)),
        Case("lr, betas, eps", mo.AdamW(lr=0.1, betas=(0.6, 0.95), eps=1e-3)),
        Case("maximize", mo.AdamW(lr=0.1, weight_decay=0.3, maximize=True)),
        Case("amsgrad", mo.AdamW(lr=0.1, betas=(0.9, 0.9), weight_decay=0.3, amsgrad=True)),
        Case(
            "amsgrad corrected",
            mo.AdamW(lr=0.1, betas=(0.9, 0.9), weight_decay=0.3, amsgrad="corrected"),
        ),
        Case("schedules", mo.AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)),
        Case("twenty steps", mo.AdamW(lr=0.1), LONG),
        Case("not finite", mo.AdamW(lr=0.1), NONFINITE),
    ],
    "clipped_adam": [
        Case("defaults", mo.ClippedAdam()),
        Case("clip_norm", mo.ClippedAdam(lr=0.1, clip_norm=0.3)),
        Case("clip_norm of zero", mo.ClippedAdam(lr=0.1, clip_norm=0.0)),
        Case("clip_norm of infinity", mo.ClippedAdam(lr=0.1, clip_norm=inf)),
        Case("lr, betas, eps", mo.ClippedAdam(lr=0.1, betas=(0.6, 0.95), eps=1e-3)),
        Case("weight_decay", mo.ClippedAdam(lr=0.1, weight_decay=0.01)),
        Case("centered_variance", mo.ClippedAdam(lr=0.1, centered_variance=True)),
        Case(
            "centered_variance, weight_decay, clip_norm, lrd",
            mo.ClippedAdam(
                lr=0.1, weight_decay=0.3, clip_norm=0.3, lrd=0.7, centered_variance=True
            ),
        ),
        Case(
            "schedules",
            mo.ClippedAdam(
                lr=LR,
                betas=BETAS,
                eps=EPS,
                weight_decay=DECAY,
                clip_norm=Schedule(10.0, 0.2, 1.0, inf, 0.03),
                lrd=Schedule(1.0, 0.5, 0.9, 1.1, 0.99),
            ),
        ),
        Case("twenty steps, lrd", mo.ClippedAdam(lr=8.0, lrd=1.01), LONG),
        Case("not finite", mo.ClippedAdam(lr=0.1), NONFINITE),
    ],
    "adagrad": [
        Case("defaults", mo.Adagrad()),
        Case("lr_decay, eps", mo.Adagrad(lr=0.1, lr_decay=0.3, eps=1e-3)),
        Case("weight_decay", mo.Adagrad(lr=0.1, weight_decay=0.01)),
        Case("initial_accumulator_value", mo.Adagrad(lr=0.1, initial_accumulator_value=0.1)),
        Case("maximize", mo.Adagrad(lr=0.1, weight_decay=0.3, maximize=True)),
        Case(
            "decoupled_weight_decay",
            mo.Adagrad(lr=0.1, lr_decay=0.3, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case(
            "schedules",
            mo.Adagrad(
                lr=LR,
                lr_decay=Schedule(0.1, 0.0, 2.0, 0.3, 0.1),
                weight_decay=DECAY,
                initial_accumulator_value=Schedule(0.3, 1.0, 2.0, 3.0, 4.0),
                eps=EPS,
            ),
        ),
        Case("twenty steps", mo.Adagrad(lr=0.1), LONG),
        Case("eps of zero", mo.Adagrad(lr=0.1, eps=0.0), NO_SUM),
        Case("not finite", mo.Adagrad(lr=0.1), NONFINITE),
    ],
    "adadelta": [
        Case("defaults", mo.Adadelta()),
        Case("lr, rho, eps", mo.Adadelta(lr=0.1, rho=0.6, eps=1e-3)),
        Case("rho of one", mo.Adadelta(lr=0.1, rho=1.0)),
        Case("weight_decay", mo.Adadelta(weight_decay=0.01)),
        Case("maximize", mo.Adadelta(weight_decay=0.3, maximize=True)),
        Case(
            "decoupled_weight_decay",
            mo.Adadelta(lr=0.5, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case(
            "schedules",
            mo.Adadelta(lr=LR, rho=Schedule(0.5, 1.0, 0.9, 0.0, 0.7), eps=EPS, weight_decay=DECAY),
        ),
        Case("twenty steps", mo.Adadelta(), LONG),
        Case("eps of zero", mo.Adadelta(eps=0.0), NO_EPS),
        Case("not finite", mo.Adadelta(), NONFINITE),
    ],
    "rprop": [
        Case("defaults", mo.Rprop()),
        Case("lr, etas", mo.Rprop(lr=0.1, etas=(0.3, 1.7))),
        Case("step_sizes", mo.Rprop(lr=1.0, step_sizes=(0.2, 0.5))),
        Case("step_sizes of zero and infinity", mo.Rprop(step_sizes=(0.0, inf))),
        Case("maximize", mo.Rprop(lr=0.1, maximize=True)),
        Case(
            "schedules",
            mo.Rprop(
                lr=LR,
                etas=(Schedule(0.5, 0.4, 0.3, 0.2, 0.1), Schedule(1.2, 1.3, 1.4, 1.5, 1.6)),
                step_sizes=(
                    Schedule(0.0, 0.3, 0.0, 0.1, 0.0),
                    Schedule(50.0, 0.7, inf, 0.08, 0.01),
                ),
            ),
        ),
        Case("twenty steps", mo.Rprop(), LONG),
        Case("not finite", mo.Rprop(lr=0.1), NONFINITE),
    ],
    # Deltas for which the powers of two to five are far from the midpoint of two numbers, so that
    # every accurate C library rounds them in the same way.
    "adagrad_rmsprop": [
        Case("defaults", mo.AdagradRMSProp()),
        Case("eta, delta, t", mo.AdagradRMSProp(eta=0.1, delta=0.3, t=0.4)),
        Case("t of zero", mo.AdagradRMSProp(t=0.0)),
        Case("t of one", mo.AdagradRMSProp(t=1.0)),
        Case(
            "schedules",
            mo.AdagradRMSProp(
                eta=LR,
                delta=Schedule(0.1, -0.2, 0.3, 0.05, 0.05),
                t=Schedule(0.5, 1.0, 0.1, 0.0, 0.3),
            ),
        ),
        Case("not finite", mo.AdagradRMSProp(), NONFINITE),
    ],
    "rmsprop": [
        Case("defaults", mo.RMSprop()),
        Case("lr, alpha, eps", mo.RMSprop(lr=0.1, alpha=0.6, eps=1e-3)),
        Case("alpha of zero", mo.RMSprop(alpha=0.0)),
        Case("weight_decay", mo.RMSprop(weight_decay=0.01)),
        Case("momentum", mo.RMSprop(momentum=0.9)),
        Case("centered", mo.RMSprop(centered=True)),
        Case("maximize", mo.RMSprop(maximize=True)),
        Case(
            "decoupled_weight_decay",
            mo.RMSprop(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case(
            "momentum, centered, decoupled_weight_decay",
            mo.RMSprop(
                alpha=0.9,
                weight_decay=0.3,
                momentum=0.5,
                centered=True,
                decoupled_weight_decay=True,
            ),
        ),
        Case(
            "momentum, centered, weight_decay, maximize",
            mo.RMSprop(alpha=0.9, weight_decay=0.3, momentum=0.5, centered=True, maximize=True),
        ),
        Case(
            "schedules",
            mo.RMSprop(
                lr=LR,
                alpha=BETAS[1],
                eps=EPS,
                weight_decay=DECAY,
                momentum=Schedule(0.9, 0.5, 0.0, 0.99, 0.8),
            ),
        ),
        Case("steady gradients, centered", mo.RMSprop(alpha=0.1, eps=1e3, centered=True), STEADY),
        Case("twenty steps", mo.RMSprop(momentum=0.5, centered=True), LONG),
        Case("eps of zero", mo.RMSprop(eps=0.0), NO_EPS),
        Case("not finite", mo.RMSprop(momentum=0.5), NONFINITE),
        Case("not finite, centered", mo.RMSprop(centered=True), NONFINITE),
    ],
    # The powers in these cases are more than 0.03 ulps from the midpoint between two numbers, so C
    # libraries that are off by less than 0.53 ulps round them in the same way (asgd.md).
    "asgd": [
        Case("defaults", mo.ASGD()),
        Case("lr, lambd, alpha", mo.ASGD(lr=0.1, lambd=2.0, alpha=0.5)),
        Case("lambd of zero", mo.ASGD(lr=0.1, lambd=0.0, t0=1.0)),
        Case("average", mo.ASGD(lr=0.1, t0=2.0)),
        Case("average from the start", mo.ASGD(lr=0.1, t0=0.0)),
        Case("weight_decay", mo.ASGD(lr=0.1, weight_decay=0.01)),
        Case("maximize", mo.ASGD(lr=0.1, lambd=0.1, t0=1.0, weight_decay=0.3, maximize=True)),
        Case(
            "schedules",
            mo.ASGD(
                lr=LR,
                lambd=Schedule(0.1, 0.2, 0.0, 0.5, 1.0),
                alpha=Schedule(0.75, 0.5, 1.0, 0.0, 2.0),
                t0=Schedule(3.0, 3.0, 0.5, 1.0, 1e6),
                weight_decay=DECAY,
            ),
        ),
        Case("twenty steps", mo.ASGD(lr=0.1, lambd=0.5, t0=5.0), LONG),
        Case("not finite", mo.ASGD(lr=0.1, t0=1.0), NONFINITE),
    ],
    "lion": [
        Case("defaults", mo.Lion()),
        Case("lr, betas", mo.Lion(lr=0.1, betas=(0.6, 0.95))),
        Case("betas of zero", mo.Lion(lr=0.1, betas=(0.0, 0.0))),
        Case("weight_decay", mo.Lion(lr=0.1, weight_decay=0.3)),
        Case("maximize", mo.Lion(lr=0.1, weight_decay=0.3, maximize=True)),
        Case("schedules", mo.Lion(lr=LR, betas=BETAS, weight_decay=DECAY)),
        Case("twenty steps", mo.Lion(lr=0.1), LONG),
        Case("not finite", mo.Lion(lr=0.1, weight_decay=0.1), NONFINITE),
    ],
    "adamax": [
        Case("defaults", mo.Adamax()),
        Case("lr, betas, eps", mo.Adamax(lr=0.1, betas=(0.6, 0.7), eps=1e-3)),
        Case("betas of zero", mo.Adamax(lr=0.1, betas=(0.0, 0.0))),
        Case("eps of zero", mo.Adamax(lr=0.1, eps=0.0), NO_EPS),
        Case("weight_decay, maximize", mo.Adamax(lr=0.1, weight_decay=0.01, maximize=True)),
        Case(
            "decoupled_weight_decay",
            mo.Adamax(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case("schedules", mo.Adamax(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)),
        Case("twenty steps", mo.Adamax(lr=0.1), LONG),
        Case("not finite", mo.Adamax(lr=0.1), NONFINITE),
    ],
    # The powers here are also more than 0.03 ulps from the midpoint of two numbers (nadam.md).
    "nadam": [
        Case("defaults", mo.NAdam()),
        Case("lr, betas, eps", mo.NAdam(lr=0.1, betas=(0.6, 0.95), eps=1e-3)),
        Case("betas of zero", mo.NAdam(lr=0.1, betas=(0.0, 0.0))),
        Case("momentum_decay", mo.NAdam(lr=0.1, momentum_decay=2.0)),
        Case("momentum_decay of zero", mo.NAdam(lr=0.1, momentum_decay=0.0)),
        Case("weight_decay, maximize", mo.NAdam(lr=0.1, weight_decay=0.01, maximize=True)),
        Case(
            "decoupled_weight_decay",
            mo.NAdam(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case(
            "schedules",
            mo.NAdam(
                lr=LR,
                betas=BETAS,
                eps=EPS,
                weight_decay=DECAY,
                momentum_decay=Schedule(0.0, 1.0, 0.5, 4e-3, 100.0),
            ),
        ),
        Case("twenty steps", mo.NAdam(lr=0.1, betas=(0.99, 0.999), momentum_decay=5.0), LONG),
        Case("not finite", mo.NAdam(lr=0.1), NONFINITE),
    ],
    "radam": [
        Case("defaults", mo.RAdam()),
        Case("lr, betas, eps", mo.RAdam(lr=0.1, betas=(0.6, 0.95), eps=1e-3), LONG),
        Case("betas of zero", mo.RAdam(lr=0.1, betas=(0.0, 0.0))),
        Case("weight_decay, maximize", mo.RAdam(lr=0.1, weight_decay=0.01, maximize=True), LONG),
        Case(
            "decoupled_weight_decay",
            mo.RAdam(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
            LONG,
        ),
        Case("schedules", mo.RAdam(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)),
        Case("twenty steps", mo.RAdam(lr=0.1), LONG),
        Case("never rectified", mo.RAdam(lr=0.1, betas=(0.9, 0.6)), LONG),
        Case("not finite", mo.RAdam(lr=0.1), NONFINITE),
    ],
    "adabelief": [
        Case("defaults", mo.AdaBelief()),
        Case("lr, betas, eps", mo.AdaBelief(lr=0.1, betas=(0.6, 0.95), eps=1e-3)),
        Case("weight_decay, maximize", mo.AdaBelief(lr=0.1, weight_decay=0.3, maximize=True)),
        Case(
            "decoupled_weight_decay",
            mo.AdaBelief(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True),
        ),
        Case("schedules", mo.AdaBelief(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)),
        Case("twenty steps", mo.AdaBelief(lr=0.1), LONG),
        Case("not finite", mo.AdaBelief(lr=0.1), NONFINITE),
    ],
}


def vectors(cases: list[Case]) -> dict[str, Any]:
    """Return the content of a file: every case in float32 and in float64."""
    return {
        "rule": type(cases[0].rule).__name__,
        "cases": [
            {"name": case.name, "dtype": dtype, **history(case.rule, np.array(rows, dtype))}
            for case in cases
            for dtype, rows in case.rows.items()
        ],
    }


def history(rule: mo.Rule, rows: np.ndarray) -> dict[str, Any]:
    """Run one case and return its inputs and results."""
    start, *grads = np.ascontiguousarray(rows.T)
    opt = mo.Optimizer(rule)
    param = start.copy()
    steps = []
    for grad in grads:
        opt.step({"w": param}, {"w": grad})
        steps.append({"param": param.copy(), **opt.state("w").slots})
    arrays = [start, *grads, *(array for after in steps for array in after.values())]
    return {
        "finite": all(bool(np.isfinite(array).all()) for array in arrays),
        "hyperparameters": {name: plain(value) for name, value in vars(rule).items()},
        "param": plain(start),
        "grads": plain(grads),
        "steps": plain(steps),
    }


def plain(value: Any) -> Any:
    """Convert a value to its form in the files: numbers become hexadecimal strings."""
    if isinstance(value, Schedule):
        return {"schedule": plain(value.numbers)}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(part) for part in value]
    return value if isinstance(value, bool | str) else float(value).hex()


def text(value: Any, newline: str = "\n") -> str:
    """Format JSON with one line per array of numbers, for readers and for diffs."""
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, bool | str) or not any(isinstance(part, dict | list) for part in parts):
        return json.dumps(value)
    deeper = newline + " "
    items = [text(part, deeper) for part in parts]
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {item}" for key, item in zip(value, items, strict=True)]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return left + deeper + f",{deeper}".join(items) + newline + right


def main(directory: Path) -> None:
    """Write all files into a directory."""
    for name, cases in CASES.items():
        (directory / f"{name}.json").write_text(text(vectors(cases)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "vectors")
