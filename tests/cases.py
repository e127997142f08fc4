"""The rules with their options, each beside the peer that does the same, and values to draw."""

from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, NamedTuple

import pyro.optim.adagrad_rmsprop
import pyro.optim.clipped_adam
import pyro.optim.dct_adam
import torch
from hypothesis import settings
from hypothesis import strategies as st

import multiopt as mo

PYRO_ADAGRAD_RMSPROP = pyro.optim.adagrad_rmsprop.AdagradRMSProp
PYRO_CLIPPED_ADAM = pyro.optim.clipped_adam.ClippedAdam
PYRO_DCT_ADAM = pyro.optim.dct_adam.DCTAdam

#: For strangers only: they order their arithmetic differently (spec/arithmetic.md).
TOLERANCE: dict[str, dict[str, Any]] = {
    "float64": {"rtol": 1e-12, "atol": 1e-14},
    "float32": {"rtol": 1e-5, "atol": 1e-6},
}


@dataclass(frozen=True)
class Case:
    """A rule and its peer.

    Attributes:
        id: What is special about it.
        rule: The rule.
        peer: The class that does the same, made with the same arguments, or None.
    """

    rule_class: type[mo.Rule]
    arguments: dict[str, Any] = field(default_factory=dict)
    peer: Any = None

    @property
    def rule(self) -> mo.Rule:
        return self.rule_class(**self.arguments)

    @property
    def id(self) -> str:
        settings = ",".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.rule_class.__name__}({settings})"


CASES = [
    Case(mo.SGD, {}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.01, "momentum": 0.9, "dampening": -0.5}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.SGD),
    Case(mo.SGD, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(
        mo.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    Case(
        mo.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        torch.optim.SGD,
    ),
    Case(mo.Adam, {}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "betas": (0.5, 0.9)}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "betas": (0.0, 0.0)}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "eps": 0.1}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.Adam),
    Case(
        mo.Adam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        torch.optim.Adam,
    ),
    Case(
        mo.Adam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "amsgrad": True},
        torch.optim.Adam,
    ),
    Case(mo.Adam, {"lr": 0.1, "amsgrad": True}, torch.optim.Adam),
    Case(mo.Adam, {"lr": 0.1, "amsgrad": "corrected"}),
    Case(mo.Adam, {"lr": 0.1, "maximize": True}, torch.optim.Adam),
    Case(
        mo.Adam,
        {"lr": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        torch.optim.Adam,
    ),
    Case(mo.AdamW, {}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "weight_decay": 0.5}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "weight_decay": 0.0}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True}, torch.optim.AdamW),
    Case(mo.AdamW, {"lr": 0.1, "amsgrad": "corrected"}),
    Case(mo.ClippedAdam, {}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.1, "clip_norm": 0.3, "lrd": 0.99}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 1e-3, "lrd": 1.01, "weight_decay": 0.1}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.01, "centered_variance": True}, PYRO_CLIPPED_ADAM),
    Case(mo.ClippedAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, PYRO_CLIPPED_ADAM),
    Case(mo.Adagrad, {}, torch.optim.Adagrad),
    Case(mo.Adagrad, {"lr": 0.5, "lr_decay": 0.1, "eps": 0.1}, torch.optim.Adagrad),
    Case(mo.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3}, torch.optim.Adagrad),
    Case(mo.Adagrad, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.Adagrad),
    Case(
        mo.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True},
    ),
    Case(mo.Adadelta, {}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"lr": 0.1, "rho": 0.5, "eps": 1e-3}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"lr": 0.01, "rho": 1.0}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"weight_decay": 0.1, "maximize": True}, torch.optim.Adadelta),
    Case(mo.Adadelta, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(mo.Rprop, {}, torch.optim.Rprop),
    Case(mo.Rprop, {"lr": 0.1, "etas": (0.3, 1.5)}, torch.optim.Rprop),
    Case(mo.Rprop, {"lr": 1.0, "step_sizes": (0.02, 0.1), "maximize": True}, torch.optim.Rprop),
    Case(mo.AdagradRMSProp, {}, PYRO_ADAGRAD_RMSPROP),
    Case(mo.AdagradRMSProp, {"eta": 0.1, "delta": 0.2, "t": 0.5}, PYRO_ADAGRAD_RMSPROP),
    Case(mo.AdagradRMSProp, {"delta": -0.3, "t": 1.0}, PYRO_ADAGRAD_RMSPROP),
    Case(mo.RMSprop, {}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"lr": 0.1, "alpha": 0.5, "eps": 0.1}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"alpha": 0.0}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"weight_decay": 0.1}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"momentum": 0.9}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"centered": True}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"maximize": True}, torch.optim.RMSprop),
    Case(mo.RMSprop, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(
        mo.RMSprop,
        {
            "weight_decay": 0.3,
            "momentum": 0.5,
            "centered": True,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
    ),
    Case(
        mo.RMSprop,
        {"weight_decay": 0.1, "momentum": 0.5, "centered": True, "maximize": True},
        torch.optim.RMSprop,
    ),
    Case(mo.ASGD, {}, torch.optim.ASGD),
    Case(mo.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5}, torch.optim.ASGD),
    Case(mo.ASGD, {"lambd": 0.0, "t0": 100.0}, torch.optim.ASGD),
    Case(mo.ASGD, {"t0": 0.0, "weight_decay": 0.1}, torch.optim.ASGD),
    Case(
        mo.ASGD,
        {"lr": 0.1, "lambd": 0.1, "t0": 10.0, "weight_decay": 0.1, "maximize": True},
        torch.optim.ASGD,
    ),
    Case(mo.Lion),
    Case(mo.Lion, {"lr": 0.01, "betas": (0.5, 0.9)}),
    Case(mo.Lion, {"lr": 0.01, "betas": (0.0, 0.0)}),
    Case(mo.Lion, {"lr": 0.01, "weight_decay": 0.5}),
    Case(mo.Lion, {"lr": 0.01, "weight_decay": 0.5, "maximize": True}),
    Case(mo.DCTAdam, {}, PYRO_DCT_ADAM),
    Case(mo.DCTAdam, {"lr": 0.1, "clip_norm": 0.3, "lrd": 0.99}, PYRO_DCT_ADAM),
    Case(mo.DCTAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, PYRO_DCT_ADAM),
    Case(mo.Adamax, {}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 0.1}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "betas": (0.0, 0.0)}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.Adamax),
    Case(mo.Adamax, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    Case(mo.NAdam, {}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.1, "momentum_decay": 0.0}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.01, "betas": (0.99, 0.999), "momentum_decay": 2.0}, torch.optim.NAdam),
    Case(mo.NAdam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.NAdam),
    Case(
        mo.NAdam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        torch.optim.NAdam,
    ),
    Case(mo.RAdam, {}, torch.optim.RAdam),
    Case(mo.RAdam, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1}, torch.optim.RAdam),
    Case(mo.RAdam, {"lr": 0.1, "betas": (0.9, 0.5)}, torch.optim.RAdam),
    Case(mo.RAdam, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}, torch.optim.RAdam),
    Case(
        mo.RAdam,
        {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        torch.optim.RAdam,
    ),
    Case(mo.AdaBelief),
    Case(mo.AdaBelief, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}),
    Case(mo.AdaBelief, {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    Case(mo.AdaBelief, {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}),
]

#: Those that treat a parameter as a whole: no engine runs them but the rule as it stands.
WHOLE = [
    Case(mo.LAMB),
    Case(mo.LAMB, {"lr": 0.1, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1}),
    Case(mo.LAMB, {"lr": 0.1, "weight_decay": 0.5, "maximize": True}),
    Case(mo.Adafactor, {}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"lr": 0.1, "weight_decay": 0.1}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"lr": 1.0, "beta2_decay": -0.5, "d": 2.0}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"eps": (0.1, 0.5), "maximize": True}, torch.optim.Adafactor),
    Case(mo.Adafactor, {"eps": (1e-30, 0.0), "d": float("inf")}, torch.optim.Adafactor),
]


class Values(NamedTuple):
    """Strategies for a hyperparameter that is a number, or several.

    Attributes:
        any: Values at the borders of the range too: results are equal all the same.
        moderate: Values for which the rule is no ill-conditioned function of its inputs, so that
            its results can be held to exact arithmetic; None if it never is.
    """

    any: st.SearchStrategy[Any]
    moderate: st.SearchStrategy[Any] | None = None


LR = Values(st.sampled_from([1e-3, 0.1, 1.0, lambda step: 0.5 / step]), st.floats(1e-5, 0.1))
BETA = st.sampled_from([0.0, 0.5, 0.9, 0.999])
EPS = st.sampled_from([0.0, 1e-8, 1e-3])

#: By hyperparameter, whichever rule has it; by rule and hyperparameter where one is special.
#: Switches and choices are drawn by what the rule declares.
VALUES: dict[Any, Values] = {
    "lr": LR,
    "eta": LR,
    "betas": Values(st.tuples(BETA, BETA), st.tuples(st.floats(0.5, 0.99), st.floats(0.5, 0.999))),
    "alpha": Values(BETA, st.floats(0.5, 0.999)),
    "rho": Values(BETA | st.just(1.0), st.floats(0.5, 1.0)),
    "t": Values(BETA | st.just(1.0), st.just(0.0) | st.floats(1e-6, 1.0)),
    "eps": Values(EPS, st.floats(1e-10, 1e-3)),
    "weight_decay": Values(st.sampled_from([0.0, 1e-2, 0.5]), st.just(0.0) | st.floats(1e-6, 1e-3)),
    "momentum": Values(st.sampled_from([0.0, 0.5, 0.9]), st.just(0.0) | st.floats(0.1, 0.95)),
    "dampening": Values(st.sampled_from([0.0, 0.3]), st.floats(0.0, 0.5)),
    "momentum_decay": Values(
        st.sampled_from([0.0, 4e-3, 0.4, 10.0]), st.just(0.0) | st.floats(1e-3, 10.0)
    ),
    "lr_decay": Values(st.sampled_from([0.0, 0.1]), st.floats(0.0, 1.0)),
    "initial_accumulator_value": Values(
        st.sampled_from([0.0, 0.1]), st.just(0.0) | st.floats(1e-3, 1.0)
    ),
    "clip_norm": Values(st.sampled_from([1e-3, 10.0, float("inf")]), st.floats(0.5, 100.0)),
    "lrd": Values(st.sampled_from([1.0, 0.9, 3.0]), st.floats(0.9, 1.0)),
    "delta": Values(st.sampled_from([1e-16, 0.3, -0.5]), st.floats(-0.5, 0.5)),
    "etas": Values(
        st.sampled_from([(0.5, 1.2), (0.0, 3.0), (lambda step: 1 / step, 1.2)]),
        st.tuples(st.floats(0.1, 0.9), st.floats(1.1, 2.0)),
    ),
    "step_sizes": Values(
        st.sampled_from([(1e-6, 50.0), (0.0, float("inf")), (0.5, 0.1)]),
        st.tuples(st.floats(0.0, 0.01), st.floats(0.02, 50.0)),
    ),
    "lambd": Values(st.sampled_from([0.0, 1e-4, 0.5]), st.just(0.0) | st.floats(1e-6, 1.0)),
    "t0": Values(st.sampled_from([0.0, 5.0, 1e6]), st.floats(0.0, 60.0)),
    "beta2_decay": Values(st.sampled_from([-0.8, -0.5, 0.0])),
    "d": Values(st.sampled_from([1.0, 2.0, float("inf")])),
    # Of the frequencies of a series there is no equality.
    "dct_dim": Values(st.none()),
    (mo.ASGD, "alpha"): Values(st.sampled_from([0.0, 0.75, 3.0]), st.floats(0.0, 2.0)),
    (mo.Adafactor, "eps"): Values(st.tuples(st.none() | EPS, EPS)),
}


def options(
    rule: type[mo.Rule], moderate: bool = False, choices: bool = True
) -> st.SearchStrategy[dict[str, Any]]:
    """All hyperparameters of a rule, as it declares them.

    Args:
        rule: The rule.
        moderate: Whether the numbers are moderate ones.
        choices: Whether switches and choices are drawn too.
    """

    def drawn(name: str) -> Any:
        values = VALUES.get((rule, name)) or VALUES[name]
        return values.moderate if moderate else values.any

    numbers = {f.name: drawn(f.name) for f in fields(rule) if f.name not in rule.choices}
    return st.builds(
        lambda numbers, chosen: _accepted({**numbers, **chosen}),
        st.fixed_dictionaries(numbers),
        st.sampled_from(chosen_together(rule)) if choices else st.just({}),
    )


def chosen_together(rule: type[mo.Rule]) -> list[dict[str, Any]]:
    """The switches and choices that are drawn together: as in ``CASES``, or all if thorough.

    There is a kernel for each, of each dtype, and to compile one takes a second.
    """
    usual, names = rule(), [f.name for f in fields(rule) if f.name in rule.choices]
    if settings.get_current_profile_name() == "thorough":
        every = product(*(rule.choices[name] for name in names))
        return [dict(zip(names, one, strict=True)) for one in every]
    cases = [case.arguments for case in (*CASES, *WHOLE) if case.rule_class is rule]
    some = [{name: case.get(name, getattr(usual, name)) for name in names} for case in cases]
    return [one for k, one in enumerate(some) if one not in some[:k]]


def _accepted(options: dict[str, Any]) -> dict[str, Any]:
    """Options without a Nesterov that SGD refuses."""
    if not options.get("nesterov"):
        return options
    if options["momentum"] == 0:
        return {**options, "nesterov": False}
    return {**options, "dampening": 0.0}
