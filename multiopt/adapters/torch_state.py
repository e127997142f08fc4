"""State to and from the state dicts of torch optimizers, one parameter each, as Pyro keeps them.

And what is read of their files.
"""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from functools import cache
from inspect import signature
from io import BytesIO
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from threading import RLock
from typing import Any, BinaryIO

import numpy as np
import torch

from multiopt import checkpoint, rules
from multiopt.backend import named
from multiopt.checkpoint import LAST_STEP
from multiopt.engine import MASTER
from multiopt.entry import check_slot_names, described_rule, on_host
from multiopt.errors import CheckpointError, brief
from multiopt.file_objects import Source, check_readable, is_path, label
from multiopt.layout import COMPUTE_DTYPE
from multiopt.rules import Rule
from multiopt.rules.arithmetic import power
from multiopt.rules.nadam import product_of_shares

__all__ = [
    "DECOUPLED",
    "derived_numbers",
    "for_torch",
    "fresh_state",
    "from_plain",
    "group_settings",
    "in_torch",
    "is_safetensors",
    "lacking",
    "leave_out",
    "number",
    "parameter_from_torch",
    "parameter_to_torch",
    "parameters_from_torch",
    "plain_settings",
    "read",
    "refuse_subsamples",
    "rule_class_of",
    "rule_of",
    "rule_settings",
    "scalar",
    "state_dict_of",
    "whole_number",
    "without_clock",
]

#: Optimizers that torch has not, but Pyro.
OF_PYRO = ("AdagradRMSProp", "ClippedAdam", "DCTAdam")

#: Settings of all rules.
KNOWN = {
    field.name for name in rules.__all__ if name != "Rule" for field in fields(getattr(rules, name))
}

#: What torch and Pyro keep in groups beside them.
BESIDE = {"capturable", "differentiable", "foreach", "fused", "params", "subsample_aware"}

#: Of those, what a group may lack: older versions of torch and Pyro do not have them, and the
#: dimension of time is the tensor's in Pyro.
OPTIONAL = {"centered_variance", "dct_dim", "decoupled_weight_decay", "maximize"}

#: Settings that are True or False; one of them may be a word as well.
SWITCHES = {"amsgrad"}.union(*(getattr(rules, name).switches for name in rules.__all__))

#: Optimizers of torch that count no steps.
CLOCKLESS = ("SGD", "Muon")

#: The switch with which torch's Adam is its AdamW.
DECOUPLED = "decoupled_weight_decay"

#: What torch keeps beside slots, though the step and the settings say it.
DERIVED = {"NAdam": ("mu_product",), "ASGD": ("eta", "mu")}

#: How torch says what it refuses to call or to make.
REFUSED = re.compile(r"GLOBAL (\S+)|<class '(\S+)'>|unrecognized function (.+)")


def read(file: Source, map_location: Any = None) -> Any:
    """What ``torch.save`` wrote to a file: plain data and tensors, read with ``weights_only=True``.

    Args:
        file: The path of the file, or a binary file object, read from where it is.
        map_location: As in ``torch.load``; by default tensors come to the CPU.

    Raises:
        CheckpointError: The file is damaged, of another kind, or would run code.
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.
    """
    with _opened(file) as opened:
        start = opened.tell()
        try:
            with _numpy_numbers():
                found = torch.load(opened, map_location or "cpu", weights_only=True)
            return _with_arrays(found, {})
        except Exception as error:  # of any kind: damaged files raised 11 in torch 2.13
            # torch's own words advise to read the file with weights_only=False.
            advises = "weights_only" in str(error)
            opened.seek(start)
            raise CheckpointError(
                f"{label(file)}: expected a checkpoint that torch.load reads with "
                f"weights_only=True, plain data and tensors; {_refusal(opened, error, advises)}"
            ) from (None if advises else error)


def is_safetensors(file: Source) -> bool:
    """Whether a file looks like one of safetensors, as multiopt's are.

    Args:
        file: As for ``read``; a file object must be one that can be sought.

    Raises:
        OSError: The file cannot be read.
        TypeError: It is neither a path nor a binary file object.
    """
    if is_path(file):
        with Path(os.fsdecode(file)).open("rb") as opened:
            return _begins_as_safetensors(opened)
    source: Any = file
    check_readable(source)
    return _begins_as_safetensors(source)


def _begins_as_safetensors(opened: BinaryIO) -> bool:
    """Whether what follows does, without moving on."""
    start = opened.tell()
    # The length of the header in 8 bytes, then the header, in JSON.
    beginning = opened.read(9)
    opened.seek(start)
    return beginning[8:] == b"{"


@contextmanager
def _opened(file: Source) -> Iterator[BinaryIO]:
    """A file that can be sought, as torch needs it."""
    if is_path(file):
        with Path(os.fsdecode(file)).open("rb") as opened:
            yield opened
        return
    source: Any = file
    check_readable(source)
    can_be_sought = getattr(source, "seekable", lambda: False)()
    yield source if can_be_sought else BytesIO(source.read())


def _refusal(opened: BinaryIO, error: Exception, advises: bool) -> str:
    """What is wrong with a file that torch did not read.

    Args:
        opened: The file.
        error: What torch raised.
        advises: Whether that gives advice that is not ours.
    """
    if _begins_as_safetensors(opened):
        return "got a file of safetensors: if multiopt wrote it, use Optimizer.load"
    if advises and (found := REFUSED.search(str(error))):
        what = next(filter(None, found.groups()))
        return (
            f"got one that needs {what}, which is neither. Nothing was run: save it again with "
            "tensors and numbers only, such as a state_dict()"
        )
    text = "" if advises else f": {error}"
    return f"it is damaged, or of another kind ({type(error).__name__}{text})"


class _Dtype:
    """A dtype of numbers in a file of torch.

    NumPy's own takes whatever flags a file gives it, and an array of it may fail when it is freed.
    """

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise UnpicklingError(f"{type(self.dtype)} is no dtype of numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array of numbers in a file of torch."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, data = state
        flat = np.frombuffer(data, kind.dtype).astype(kind.dtype.newbyteorder("="))
        self.array = flat.reshape(shape, order="F" if is_fortran else "C")


def _number(kind: _Dtype, data: bytes) -> Any:
    """A NumPy number in a file of torch."""
    (found,) = np.frombuffer(data, kind.dtype)
    return found


#: torch allows a NumPy number for a setting, and users keep counters and losses beside the state.
#: What NumPy calls to make them, of versions 1 and 2, and what is called in its place.
NUMPY_NUMBERS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    # The contents of an empty array.
    (bytes, "builtins.bytes"),
]


_READING = RLock()


@contextmanager
def _numpy_numbers() -> Iterator[None]:
    """Let torch read NumPy numbers, by our functions even where users have allowed NumPy's own.

    What is allowed is the same for the whole process: one file is read at a time.
    """
    names = {name for _, name in NUMPY_NUMBERS}
    with _READING:
        before = torch.serialization.get_safe_globals()
        others = [
            f
            for f in before
            if (f[1] if isinstance(f, tuple) else f"{f.__module__}.{f.__qualname__}") not in names
        ]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *NUMPY_NUMBERS])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _with_arrays(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Plain data with arrays for what stands for them.

    Args:
        value: The data; lists and dicts are changed.
        done: By identity what was looked at, and what became of it.
    """
    if isinstance(value, _Array):
        return value.array
    if id(value) not in done:
        done[id(value)] = value, value
        if isinstance(value, dict):
            for key, part in value.items():
                # Not by update(), which adds to what is in a Counter.
                value[key] = _with_arrays(part, done)
        elif isinstance(value, list):
            value[:] = [_with_arrays(part, done) for part in value]
        elif type(value) is tuple:
            done[id(value)] = value, tuple(_with_arrays(part, done) for part in value)
    return done[id(value)][1]


def group_settings(constructor: Any, rule: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a parameter group of torch after a step.

    Args:
        constructor: The class of the torch optimizer.
        rule: The description of the rule in a state dict.
        step: How many steps were taken.
    """
    defaults, rule = _default_group(constructor), in_torch(rule)
    group = {k: from_plain(rule[k]) if k in rule else v for k, v in defaults.items()}
    if "lrd" in group:
        # Pyro's ClippedAdam keeps the rate that it has come to.
        group["lr"] *= power(group["lrd"], step)
    return group


def rule_settings(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The settings of a group of torch after a step, as a rule has them.

    Raises:
        ValueError: A decay has brought the learning rate so far down that it cannot be another.
    """
    settings = plain_settings({k: v for k, v in group.items() if k != "params"})
    if "lrd" in settings and settings["lr"]:
        decay = power(settings["lrd"], step)
        if not decay:
            raise ValueError(
                f"lr is 0 after {step} decays by lrd={settings['lrd']!r}; got {settings['lr']!r}: "
                "start anew to raise it"
            )
        settings["lr"] /= decay
    return settings


def in_torch(rule: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a rule with the switch that torch's Adam has, and its AdamW has on."""
    return {DECOUPLED: rule["name"] == "AdamW", **rule}


@cache
def lacking(rule_class: type[Rule]) -> frozenset[str]:
    """The options of a rule that torch's optimizer of this name does not have."""
    theirs = getattr(torch.optim, rule_class.__name__, None)
    own = {field.name for field in fields(rule_class)}
    return frozenset(own - signature(theirs).parameters.keys() if theirs else ())


@cache
def _default_group(constructor: Any) -> dict[str, Any]:
    # Of two dimensions, since Muon takes no others.
    (group,) = constructor([torch.empty(0, 0)]).state_dict()["param_groups"]
    del group["params"]
    return dict(group)


def parameter_to_torch(
    constructor: type[torch.optim.Optimizer], stored: Mapping[str, Any]
) -> dict[str, Any]:
    """The state dict of the torch optimizer that would have made this state.

    Args:
        constructor: The class of the torch optimizer.
        stored: One entry of ``Optimizer.state_dict``, its slots NumPy arrays; under ``"group"``
            what schedulers and users keep in the group, under ``"given"`` settings that are the
            caller's own objects, under ``"complex"`` whether slots are the parts of complex ones.
    """
    step, rule = stored["step"], stored["rule"]
    group = group_settings(constructor, rule, step)
    slots = {slot: torch.from_numpy(array.copy()) for slot, array in stored["slots"].items()}
    if stored.get("complex"):
        slots = {slot: torch.view_as_complex(tensor) for slot, tensor in slots.items()}
    state = {}
    if step:
        # Pyro's optimizers count in an int, torch's in a tensor.
        in_pyro = constructor.__module__.startswith("pyro.")
        clock = step if in_pyro else scalar(step)
        state[0] = {"step": clock, **derived_numbers(rule, step), **slots}
    elif slots:
        fresh = fresh_state(constructor, group, next(iter(slots.values())))
        state = {0: fresh} if fresh else {}
    return {
        "state": state,
        "param_groups": [
            {**group, **stored.get("given", {}), **stored.get("group", {}), "params": [0]}
        ],
    }


def fresh_state(
    constructor: type[torch.optim.Optimizer], group: Mapping[str, Any], like: torch.Tensor
) -> dict[str, Any]:
    """The state of a parameter before its first step, which some torch optimizers have.

    Args:
        constructor: The class of the torch optimizer.
        group: Its settings.
        like: A tensor of the shape and dtype of the parameter.
    """
    names = signature(constructor).parameters.keys() & group.keys()
    fresh = constructor([torch.zeros_like(like)], **{name: group[name] for name in names})
    state: dict[str, Any] = fresh.state_dict()["state"].get(0, {})
    return state


def without_clock(
    constructor: type[torch.optim.Optimizer], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of a parameter in torch, without a clock where torch keeps none."""
    clockless = constructor.__name__ in CLOCKLESS
    return {key: value for key, value in state.items() if not (clockless and key == "step")}


def scalar(value: float) -> torch.Tensor:
    """A number as torch keeps it beside slots.

    That is in float32, whatever the default dtype is, or in float64 if that is the default. A clock
    above 2^24 that float32 does not have comes in float64 too, which torch goes on with.
    """
    double = torch.tensor(value, dtype=torch.float64)
    single = double.to(torch.float32)
    is_rounded = isinstance(value, int) and single.item() != value
    return double if is_rounded or torch.get_default_dtype() == torch.float64 else single


def derived_numbers(rule: Mapping[str, Any], step: int) -> dict[str, torch.Tensor]:
    """The numbers of ``DERIVED``, as torch keeps them.

    Args:
        rule: The description of the rule in a state dict.
        step: How many steps were taken.
    """
    return {name: scalar(value) for name, value in _derived(rule, step).items()}


def _derived(rule: Mapping[str, Any], step: int) -> dict[str, float]:
    if rule["name"] == "NAdam":
        shares = product_of_shares(rule["momentum_decay"], step)
        return {"mu_product": float(power(rule["betas"][0], step) * shares)}
    if rule["name"] == "ASGD":
        lr, lambd = rule["lr"], rule["lambd"]
        eta = lr / (1 + lambd * lr * step) ** rule["alpha"] if step else lr
        return {"eta": eta, "mu": 1 / max(1.0, step - rule["t0"])}
    return {}


def parameters_from_torch(
    rule_class: type[Rule], states: Mapping[Any, Any]
) -> dict[str, dict[str, Any]]:
    """``parameter_from_torch`` of the states of a Pyro optimizer.

    Raises:
        CheckpointError: They have another form.
    """
    if not isinstance(states, Mapping):
        raise CheckpointError(
            f"expected the states of parameters by name; got a {type(states).__name__}"
        )
    if None in states:
        # Pyro's own get_state() leaves this behind for tensors that left the store.
        warnings.warn("left out a state without a parameter name", stacklevel=3)
    return {
        name: parameter_from_torch(name, rule_class, state)
        for name, state in states.items()
        if name is not None
    }


def parameter_from_torch(
    name: str, rule_class: type[Rule], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The state dict of a torch optimizer of one parameter, as an ``Optimizer.state_dict`` has it.

    Args:
        name: That of the parameter, for messages.
        rule_class: The rule that the torch optimizer follows.
        state: Its state dict, or that of a learning-rate scheduler of Pyro around it.

    Returns:
        The entry, with what ``parameter_to_torch`` looks for, and under ``"scheduler"`` the state
        of the scheduler, if it is that of one.

    Raises:
        CheckpointError: It has another form, is that of another optimizer, or its settings are out
            of range.
    """
    try:
        return _from_torch(rule_class, state)
    except (
        AttributeError,
        LookupError,
        OverflowError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"the state of {name!r} is no state of {rule_class.__name__} "
            f"({type(error).__name__}: {error})"
        ) from error


def _from_torch(rule_class: type[Rule], state: Mapping[str, Any]) -> dict[str, Any]:
    inner = state.get("optimizer", state)
    (group,) = inner["param_groups"]
    refuse_subsamples(group)
    _check_settings(rule_class, group)
    numbers, states = list(group["params"]), inner["state"]
    if len(numbers) != 1 or not states.keys() <= set(numbers):
        raise ValueError(
            f"expected the state of one parameter; got a group of {numbers} and the state of "
            f"{list(states)}"
        )
    values = states.get(numbers[0], {})
    step = _clock(rule_class, values)
    kept = {key: value for key, value in values.items() if value is not None and key != "step"}
    known = {f.name for f in fields(rule_class)} - lacking(rule_class)
    settings = {k: v for k, v in rule_settings(group, step).items() if k in known}
    rule = described_rule(rule_class(**settings), step)
    for name in DERIVED.get(rule["name"], ()):
        kept.pop(name, None)
    slots = {}
    for slot, tensor in kept.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"expected a tensor under {slot!r}; got a {type(tensor).__name__}")
    is_complex = any(tensor.is_complex() for tensor in kept.values())
    for slot, tensor in kept.items():
        tensor = torch.view_as_real(tensor.resolve_conj()) if is_complex else tensor
        dtype = getattr(torch, COMPUTE_DTYPE[str(tensor.dtype).removeprefix("torch.")])
        slots[slot] = named("torch").to_host(tensor.to(dtype))
        if not step:
            # Slots are zero before the first step; Adagrad's sum in torch may not be.
            slots[slot] = np.zeros_like(slots[slot])
    loaded = {"rule": rule, "step": step, "slots": slots, "complex": is_complex}
    # What schedulers and users keep in a group, and settings that the caller may change in place.
    loaded["group"] = {k: deepcopy(v) for k, v in group.items() if k not in KNOWN | BESIDE}
    loaded["given"] = {
        k: deepcopy(v)
        for k, v in group.items()
        if k in KNOWN and isinstance(v, torch.Tensor | np.ndarray)
    }
    if "scheduler" in state:
        loaded["scheduler"] = deepcopy(state["scheduler"])
    return loaded


def _clock(rule_class: type[Rule], values: Mapping[str, Any]) -> int:
    """The clock in the state of a parameter in torch.

    SGD and Muon of torch count no steps; what matters there is whether the first one is past.

    Raises:
        ValueError: There is none where one is counted, or it is no number of steps.
    """
    given = values.get("step")
    if given is None and (not values or rule_class.__name__ in CLOCKLESS):
        return 1 if any(value is not None for value in values.values()) else 0
    if "step" not in values:
        raise ValueError(
            "expected a whole number up to 2^53 under 'step', a step >= 0; got none, beside "
            f"{sorted(map(str, values))}"
        )
    return whole_number(given)


def whole_number(given: Any) -> int:
    """A clock in torch's terms as an int.

    Raises:
        ValueError: It is no number of steps.
    """
    step = number(given)
    is_number = isinstance(step, int | float) and not isinstance(step, bool)
    if not (is_number and 0 <= step <= LAST_STEP and step == int(step)):
        raise ValueError(
            "expected a whole number up to 2^53 under 'step', a step >= 0; got "
            f"{brief(step if is_number else given)}"
        )
    return int(step)


def _check_settings(rule_class: type[Rule], group: Mapping[str, Any]) -> None:
    """Refuse a group of another optimizer. Settings that no rule has, users may have added."""
    own = {field.name for field in fields(rule_class)}
    missing = sorted(own - OPTIONAL - group.keys())
    foreign = sorted((KNOWN - own - OPTIONAL) & group.keys())
    if missing or foreign:
        raise ValueError(
            f"expected the settings {sorted(own - OPTIONAL)}; got {foreign} besides and none for "
            f"{missing}: it is that of another optimizer"
        )


def refuse_subsamples(settings: Mapping[str, Any]) -> None:
    """Refuse the option that only Pyro's own class has.

    Raises:
        ValueError: It is on.
    """
    if settings.get("subsample_aware"):
        raise ValueError(
            "subsample_aware=True is not for a callable of names, nor for state that is loaded "
            "here: use pyro.optim.DCTAdam, which this one gives for a dict with that option"
        )


def plain_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of torch as rules have them: 0 and 1 are no truth values there."""
    settings = {name: number(value) for name, value in given.items()}
    for name in SWITCHES & settings.keys():
        if settings[name] in (0, 1):
            settings[name] = bool(settings[name])
    return settings


def number(value: Any) -> Any:
    """A setting as rules have it: torch allows tensors, arrays and lists for numbers and pairs."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.item() if prod(value.shape) == 1 else value.tolist()
    return tuple(number(part) for part in value) if isinstance(value, list | tuple) else value


def from_plain(value: Any) -> Any:
    """A hyperparameter from plain data: pairs are lists there, infinity a word."""
    if isinstance(value, list | tuple):
        return tuple(from_plain(part) for part in value)
    return float(value) if value in ("inf", "-inf") else value


def rule_of(name: str, words: Mapping[str, Any]) -> Rule:
    """The rule that a description in a state dict is of, its schedules numbers.

    Args:
        name: That of the parameter, for messages.
        words: The description.

    Raises:
        ValueError: It is that of no rule of multiopt's.
    """
    kind = words.get("name")
    if kind not in rules.__all__ or kind == "Rule":
        raise ValueError(f"parameter {name!r} has the rule {kind!r}; expected one of multiopt's")
    rule_class = getattr(rules, kind)
    known = [field.name for field in fields(rule_class)]
    try:
        rule: Rule = rule_class(**{key: from_plain(words[key]) for key in known if key in words})
    except (TypeError, ValueError) as error:
        raise ValueError(f"parameter {name!r}: {error}") from error
    return rule


def rule_class_of(given: Any) -> type[Rule]:
    """The rule that a torch optimizer follows.

    Args:
        given: The class of the torch optimizer, one of torch's or Pyro's own, or the function of
            ``pyro.optim``; or the class of the rule.

    Raises:
        TypeError: There is none.
    """
    name = getattr(given, "__name__", "")
    rule_class: Any = getattr(rules, name, None)
    is_known = rule_class is not None and (name in OF_PYRO or hasattr(torch.optim, name))
    theirs = getattr(given, "__module__", "").partition(".")[0] in ("torch", "pyro")
    if not is_known or not (given is rule_class or theirs):
        raise TypeError(
            "expected the class of an optimizer of torch or Pyro that multiopt has a rule for, "
            f"such as torch.optim.Adam, or that rule; got {given!r}"
        )
    found: type[Rule] = rule_class
    return found


def state_dict_of(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A state dict of what ``parameter_from_torch`` gave, by name.

    Raises:
        CheckpointError: Slots are not those of the rule.
    """
    for name, entry in entries.items():
        try:
            check_slot_names(name, entry, rule_of(name, entry["rule"]))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    return {
        "version": checkpoint.VERSION,
        "steps": max((entry["step"] for entry in entries.values()), default=0),
        "entries": {
            name: {"rule": entry["rule"], "step": entry["step"], "slots": _shown_slots(entry)}
            for name, entry in entries.items()
        },
        "pending": {},
    }


def _shown_slots(entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {slot: torch.from_numpy(array) for slot, array in entry["slots"].items()}
    return {k: torch.view_as_complex(x) if entry["complex"] else x for k, x in tensors.items()}


def for_torch(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of a state dict, pending ones too, with NumPy slots, and what torch can have.

    Raises:
        ValueError: It has another form, or a rule that is not multiopt's, or one with an option
            that torch does not have.
    """
    checkpoint.check_state_dict(state_dict)
    parts = {**state_dict["pending"], **state_dict["entries"]}
    stored = {name: on_host(name, entry) for name, entry in parts.items()}
    for name, entry in stored.items():
        rule = rule_of(name, entry["rule"])
        options = [option for option in lacking(type(rule)) if getattr(rule, option)]
        if getattr(rule, "amsgrad", None) == "corrected":
            options.append("amsgrad")
        if options:
            found = ", ".join(f"{option}={getattr(rule, option)!r}" for option in options)
            raise ValueError(
                f"parameter {name!r} has {found}, which torch does not have: assign opt.rule first"
            )
    leave_out(state_dict, stored, stacklevel=4)
    return stored


def leave_out(
    state_dict: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], stacklevel: int
) -> None:
    """Take master copies out of entries, and warn of all that torch and Pyro have no place for.

    Args:
        state_dict: That of an ``Optimizer``.
        entries: Its entries, pending ones too, with slots that may be changed.
        stacklevel: As for ``warnings.warn``, from here.
    """
    kept = {*state_dict.get("averages", {}), *state_dict.get("pending_averages", {})}
    kept |= {n for n, entry in entries.items() if entry["slots"].pop(MASTER, None) is not None}
    parts = {"averages and master copies": kept, "counts of skips": state_dict.get("skips", {})}
    left = [f"{what}, of {sorted(names)}" for what, names in parts.items() if names]
    if left:
        warnings.warn(
            f"left out {' and '.join(left)}: torch and Pyro have none", stacklevel=stacklevel
        )
