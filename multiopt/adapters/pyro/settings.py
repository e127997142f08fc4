"""Settings in the terms of torch and Pyro: rules and clips made of them, and changes of them."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from multiopt import rules
from multiopt.adapters.pyro.dct import OF_TENSORS
from multiopt.adapters.pyro.tracking import ALONE, Tracked
from multiopt.adapters.torch_settings import (
    DECOUPLED,
    from_plain,
    group_settings,
    in_torch,
    lacking,
    number,
    plain_settings,
    refuse_subsamples,
    rule_settings,
)
from multiopt.entry import described_rule
from multiopt.rules import Rule
from multiopt.rules.rule import is_schedule
from multiopt.step.clip import Clip

__all__ = [
    "EXECUTION",
    "EqualRules",
    "Sources",
    "changeable",
    "clips_itself",
    "has_schedule",
    "make_clip",
    "make_rule",
    "restored_rule",
    "settings_now",
    "with_setting",
]

#: Arguments of torch's optimizers about how they run, not about what they compute.
EXECUTION = ("capturable", "foreach", "fused")

#: The settings of a clip in Pyro, and one that Pyro does not have, by the names that ``Clip`` has.
CLIPS = {"norm": "clip_norm", "global_norm": "clip_global_norm", "value": "clip_value"}


def make_rule(rule_class: type[Rule], settings: Mapping[str, Any]) -> Rule:
    """The rule with the settings of a torch optimizer.

    Raises:
        TypeError: A setting is not one of the optimizer.
        ValueError: A setting is out of range, or is not for a rule.
    """
    given = plain_settings(settings)
    if given.pop("differentiable", False):
        raise ValueError(
            "differentiable=True: the update is not part of an autograd graph here; use torch.optim"
        )
    for name in EXECUTION:
        given.pop(name, None)
    if rule_class is rules.DCTAdam:
        refuse_subsamples(given)
        given.pop("subsample_aware", None)
    for name in lacking(rule_class) & given.keys():
        raise TypeError(f"torch.optim.{rule_class.__name__} has no argument {name!r}")
    rule = rule_class(**given)
    if changeable(settings.get("lr")) and getattr(rule, "lrd", 1.0) != 1.0:
        raise ValueError(
            f"lr is {settings['lr']!r} and lrd={settings['lrd']!r}, so that each step would change "
            "the caller's own object, in Pyro once for each parameter; expected a number: pass "
            "float(lr)"
        )
    return rule


def make_clip(settings: Mapping[str, Any], rule: Rule) -> Clip | None:
    """The clip of a parameter.

    Args:
        settings: Its ``clip_args``.
        rule: Its rule. ClippedAdam and DCTAdam clip by themselves; here that is done once more,
            for the gradient that Pyro leaves behind is clipped.

    Raises:
        TypeError: A setting is not one of a clip.
        ValueError: A setting is out of range.
    """
    if unknown := sorted(set(settings) - set(CLIPS.values())):
        raise TypeError(f"clip_args has {unknown}; expected {', '.join(CLIPS.values())}")
    bounds = {name: number(settings.get(theirs)) for name, theirs in CLIPS.items()}
    own = getattr(rule, "clip_norm", None) if clips_itself(rule) else None
    if own is not None and not callable(own):
        value = bounds["value"]
        bounds["value"] = own if value is None else min(value, own)
    return None if all(bound is None for bound in bounds.values()) else Clip(**bounds)


def clips_itself(rule: Rule) -> bool:
    """Whether a bound of gradients is among the settings of a rule."""
    return isinstance(rule, rules.ClippedAdam | rules.DCTAdam)


def with_setting(constructor: Any, rule: Rule, step: int, name: str, value: Any) -> Rule:
    """A rule with one setting changed, in torch's terms, after a step.

    Raises:
        TypeError: The setting decides how a torch optimizer is made.
        ValueError: The value is out of range.
    """
    before = settings_now(constructor, rule, step)
    if name == DECOUPLED and isinstance(rule, rules.AdamW):
        # torch's AdamW shows the switch of its Adam, and it can be turned off.
        values = {f.name: getattr(rule, f.name) for f in fields(rule)}
        rule = rules.Adam(**values, decoupled_weight_decay=True)
    known = {f.name for f in fields(rule)}
    if name not in known:
        if value != before[name]:
            raise TypeError(
                f"{name!r} cannot be changed to {value!r}; expected {before[name]!r}, with which "
                "the optimizer was made: make another one"
            )
        return rule
    old = rule_settings(before, step)
    new = rule_settings({**before, name: value}, step)
    changed = {k: v for k, v in new.items() if k in known and (k == name or v != old[k])}
    return replace(rule, **changed)


def restored_rule(stored: Mapping[str, Any], rule: Rule) -> Rule:
    """A rule with the hyperparameters of loaded state, as Pyro restores them.

    A schedule stays: a file knows only the number it gave.

    Args:
        stored: The description of a rule in a state dict.
        rule: The rule that the settings here ask for.
    """
    names = {type(rule).__name__, stored["name"]}
    if len(names) > 1 and names != {"Adam", "AdamW"}:
        return rule
    # As in torch, Adam loads the switch of AdamW, which itself leaves it on.
    words = in_torch(stored)
    values = {f.name: getattr(rule, f.name) for f in fields(rule)}
    for name, value in values.items():
        if name in words and name not in OF_TENSORS and not is_schedule(value):
            values[name] = from_plain(words[name])
    return type(rule)(**values)


def settings_now(
    constructor: Any, rule: Rule, step: int, count: int | None = None
) -> Mapping[str, Any]:
    """The settings of a parameter group of torch after a step.

    Args:
        constructor: The class of the torch optimizer.
        rule: The rule.
        step: How many steps the parameter has taken.
        count: How many the optimizer has taken; by default as many.
    """
    return group_settings(constructor, described_rule(rule, step, count), step)


def has_schedule(rule: Rule) -> bool:
    """Whether a hyperparameter is a schedule."""
    return any(is_schedule(getattr(rule, name)) for name in rule.ranges)


class EqualRules:
    """One object for equal rules, as long as anybody has it.

    The core computes the numbers of a step once for each object.
    """

    def __init__(self) -> None:
        """Know no rule."""
        self._rules: WeakValueDictionary[tuple[Any, ...], Rule] = WeakValueDictionary()

    def one(self, rule: Rule) -> Rule:
        """The first of the rules that are equal to this one."""
        return self._rules.setdefault((type(rule), *vars(rule).values()), rule)

    def __len__(self) -> int:
        """How many different rules there are."""
        return len(self._rules)


# What the caller may change


def changeable(value: Any) -> bool:
    """Whether a setting is, or has in it, an object whose value the caller may change."""
    return next(_objects(value), None) is not None


def _objects(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor | np.ndarray | list | dict):
        yield value
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for part in value:
        yield from _objects(part)


@dataclass(slots=True)
class _Source:
    """An object from which settings were read, what it held then, and whose settings they are."""

    given: Any
    held: Any
    users: dict[Tracked, None]


class Sources:
    """The caller's own objects from which settings were read: Pyro reads them anew at each step.

    >>> from multiopt.adapters.pyro.tracking import Tracked
    >>> clip_args, sources = {"clip_norm": 1.0}, Sources()
    >>> loc = Tracked(None, "loc", "loc", clip_args)
    >>> sources.watch(loc)
    >>> clip_args["clip_norm"] = 2.0
    >>> sources.changed() == [loc]
    True
    """

    def __init__(self) -> None:
        """Watch nothing."""
        self._by_id: dict[int, _Source] = {}
        self._watched: dict[Tracked, list[int]] = {}

    def watch(self, tracked: Tracked) -> None:
        """Watch the settings of a tensor as they are now, and no earlier ones of it."""
        self.unwatch(tracked)
        settings = list(tracked.given.values())
        # A dict that nobody else holds, such as most callables make, stays as it is.
        if sys.getrefcount(tracked.clip_args) > ALONE:
            settings.append(tracked.clip_args)
        objects = {id(given): given for value in settings for given in _objects(value)}
        if objects:
            self._watched[tracked] = list(objects)
        for number_, given in objects.items():
            # Others may not have followed its last change yet.
            if number_ not in self._by_id:
                self._by_id[number_] = _Source(given, _held(given), {})
            self._by_id[number_].users[tracked] = None

    def unwatch(self, tracked: Tracked) -> None:
        """Watch no settings of a tensor."""
        for number_ in self._watched.pop(tracked, ()):
            users = self._by_id[number_].users
            del users[tracked]
            if not users:
                del self._by_id[number_]

    def changed(self) -> list[Tracked]:
        """The tensors whose settings have changed since ``renew``."""
        found: dict[Tracked, None] = {}
        for source in self._by_id.values():
            if source.held != _held(source.given):
                found |= source.users
        return list(found)

    def renew(self) -> None:
        """Take the settings for known as they are now."""
        for source in self._by_id.values():
            source.held = _held(source.given)


def _held(given: Any) -> Any:
    """What an object holds itself; the objects in it are watched by themselves."""
    if isinstance(given, torch.Tensor | np.ndarray):
        return given.tolist()
    if isinstance(given, dict):
        return {name: _known(value) for name, value in given.items()}
    return [_known(value) for value in given]


def _known(value: Any) -> Any:
    """A number as it is, an object by its identity."""
    return id(value) if changeable(value) else value
