"""Files of test vectors, in the format of ``spec/vectors``: steps that a rule must reproduce."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.verify.equality import same

__all__ = ["departure_from"]


def departure_from(path: str | PathLike[str], rule_class: type[Rule]) -> str | None:
    """Replay the cases of a file on NumPy.

    Args:
        path: The file: JSON with ``cases``, each of which has ``name``, ``dtype``,
            ``hyperparameters``, ``param``, ``grads``, and in ``steps`` the parameter and the slots
            after each step. Numbers are hexadecimal floats; a schedule is a list of numbers under
            ``schedule``.
        rule_class: The class of the rule.

    Returns:
        What the first departure is, or None.
    """
    for case in json.loads(Path(path).read_text("utf-8"))["cases"]:
        dtype, options = case["dtype"], _numbers(case["hyperparameters"])
        opt = Optimizer(rule_class(**{name: _setting(x) for name, x in options.items()}))
        params = {"w": np.array(_numbers(case["param"]), dtype)}
        for step, (grad, after) in enumerate(zip(case["grads"], case["steps"], strict=True), 1):
            opt.step(params, {"w": np.array(_numbers(grad), dtype)})
            found = {"param": params["w"], **opt.state("w").slots}
            for name, numbers in after.items():
                expected = np.array(_numbers(numbers), dtype)
                if name not in found or not same(np.asarray(found[name]), expected):
                    return (
                        f"{name} after step {step} of the case {case['name']!r} in {dtype} is "
                        f"{found.get(name)}; expected {expected}"
                    )
    return None


def _numbers(value: Any) -> Any:
    """JSON with the text of floats as floats."""
    if isinstance(value, dict):
        return {name: _numbers(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_numbers(x) for x in value]
    if isinstance(value, str):
        try:
            return float.fromhex(value)
        except ValueError:  # the name of a choice
            return value
    return value


def _setting(value: Any) -> Any:
    """A hyperparameter; a schedule gives one number a step."""
    if isinstance(value, dict):
        return lambda step: value["schedule"][step - 1]
    return tuple(map(_setting, value)) if isinstance(value, list) else value
