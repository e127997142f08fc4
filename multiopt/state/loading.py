"""Applying loaded state to an optimizer, all of it or nothing.

Everything is checked before anything changes. Then names seen before get new rows, and the others
wait in ``pending`` until a step brings their parameter; the report lists both.

>>> import numpy as np, multiopt as mo
>>> opt = mo.Optimizer(mo.SGD())
>>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
>>> other = mo.Optimizer(mo.SGD())
>>> other.load_state_dict(opt.state_dict()).pending, other.pending
(('w',), ('w',))
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from operator import ne
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from multiopt.engine import Group
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.state.contents import Contents
from multiopt.state.differences import Difference, differences
from multiopt.state.fit import check_average, check_fit, check_slot_names
from multiopt.state.plateaus import warn_of_plateaus
from multiopt.state.record import (
    Description,
    Form,
    Saved,
    observe,
    resumed,
    set_clocks,
    without_average,
)
from multiopt.state.report import LoadReport
from multiopt.table import GROUP

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = ["load"]


class _Batch(NamedTuple):
    """Names whose saved state can be checked once for all of them.

    Attributes:
        group: Their group; None for names not seen.
        shape: Their shape in the group.
        fits: Whether the saved state fits.
        names: The names.
        rows: Their rows.
        saved: Their saved state.
    """

    group: Group | None
    shape: tuple[int, ...]
    fits: bool
    names: list[str]
    rows: list[int]
    saved: list[Saved]


class _Admitted(NamedTuple):
    """Loaded state after it was checked.

    Attributes:
        batches: The state that fits.
        refused: Names whose state does not fit, with the reason.
        without: Names whose state fits except for the average, with the reason.
    """

    batches: list[_Batch]
    refused: dict[str, str]
    without: dict[str, str]


def load(
    registry: "Registry",
    contents: Contents,
    new: Mapping[str, str],
    strict: bool,
    cast: bool,
) -> LoadReport:
    """Load saved state into a registry, all of it or nothing.

    Args:
        registry: The registry to load into.
        contents: What was read from the file or the state dict.
        new: The wanted names, each with its name in this registry.
        strict: Whether state that does not fit is an error; otherwise it is left out.
        cast: Whether slots are converted to the dtype that their parameter needs.

    Raises:
        ValueError: State does not fit, and ``strict`` is true.
    """
    states = contents.saved
    if any(map(ne, new, new.values())):
        states = {new[name]: saved for name, saved in states.items()}
    admitted = _admitted(registry, _cast(states) if cast else states, strict)
    accepted: dict[str, Saved] = {}
    for batch in admitted.batches:
        accepted.update(zip(batch.names, batch.saved, strict=True))
    if len(admitted.batches) > 1:
        accepted = {name: accepted[name] for name in states if name in accepted}
    seen = [name for name in accepted if name in registry]
    pending = [name for name in accepted if name not in registry]
    reasons = {new[name]: reason for name, reason in contents.unfit.items()} | admitted.refused
    taken = set(new.values()) - reasons.keys()
    skips = {name: count for name, count in registry.skips.items() if name not in taken}
    for name, counts in contents.skips.items():
        if new.get(name) in taken:
            skips[new[name]] = counts
    is_part = len(new) < len(contents.names)
    steps = contents.steps
    if (is_part and registry.steps > 0) or (contents.names and not taken):
        steps = registry.steps
    _warn(registry, admitted.batches)
    differing = _differences(registry, admitted.batches)
    gone: set[str] = set()
    if registry.guard.torn is not None:
        # A partial load would leave names torn. A whole one forgets names that came after the save.
        gone = registry.known().keys() - {*seen, *pending}
        if gone and (is_part or len(taken) < len(contents.names)):
            registry.guard.check_whole("load of some names")
    observed, codes = _observed(registry, admitted.batches), _placed(registry, admitted.batches)
    waiting = {**registry.pending, **accepted}
    with registry.guard:
        if gone:
            registry.forget(gone)
        registry.replace_rows(codes)
        gone |= codes.keys()
        registry.pending = {n: saved for n, saved in waiting.items() if n not in gone}
        registry.endings = None
        for rule, description in observed:
            observe(rule, description.observed, ahead=is_part)
        registry.steps = _largest_clock(registry) if steps is None else steps
        registry.skips = skips
        registry.guard.torn = None
    registry.sweep()
    reasons |= {name: f"its average: {reason}" for name, reason in admitted.without.items()}
    covered = {new.get(name, name) for name in contents.names}
    return LoadReport(
        restored=tuple(seen),
        pending=tuple(pending),
        unused={name: "it was not asked for" for name in contents.names if name not in new}
        | {old: reasons[name] for old, name in new.items() if name in reasons},
        missing=tuple(name for name in registry.names if name not in covered),
        metadata=dict(contents.metadata),
        differences=differing,
    )


def _differences(registry: "Registry", batches: list[_Batch]) -> dict[str, dict[str, Difference]]:
    """For each name, the hyperparameters in which the saved rule differs from the one here."""
    result: dict[str, dict[str, Difference]] = {}
    for batch in batches:
        settings = batch.saved[0].form.rule.settings
        if batch.group is not None:
            for positions in batch.group.by_rule(np.array(batch.rows)):
                chain = batch.group.rule_at(batch.rows[int(positions[0])])
                if differ := differences(settings, formulas(chain)[0]):
                    result |= {batch.names[k]: differ for k in positions.tolist()}
        elif isinstance(registry.rule, Rule) and (differ := differences(settings, registry.rule)):
            result |= dict.fromkeys(batch.names, differ)
    return result


def _cast(states: Mapping[str, Saved]) -> dict[str, Saved]:
    """Mark saved state to be converted to the dtype that its parameter needs."""
    forms = {id(saved.form): saved.form._replace(cast=True) for saved in states.values()}
    return {name: saved._replace(form=forms[id(saved.form)]) for name, saved in states.items()}


def _admitted(registry: "Registry", states: Mapping[str, Saved], strict: bool) -> _Admitted:
    """Check saved state, and sort it into what fits and what does not.

    Raises:
        ValueError: State does not fit, and ``strict`` is true.
    """
    batches: dict[Hashable, _Batch] = {}
    refused, without, odd = dict[str, str](), dict[str, str](), list[str]()
    bare: dict[int, Form] = {}
    for name, saved in states.items():
        group, row, shape = None, 0, tuple[int, ...]()
        if name in registry:
            group, row = registry.row_of(name)
            shape = group.shapes[row]
        # At step 0, state need not have slots.
        key = id(group), shape, id(saved.form), saved.step == 0
        if key not in batches:
            error = _misfit(registry, name, saved)
            if error is not None and strict:
                raise error
            batches[key] = _Batch(group, shape, error is None, [], [], [])
        batch = batches[key]
        if not batch.fits:
            refused[name] = str(_misfit(registry, name, saved))
            continue
        if saved.form.average is not None:
            average = registry.average_of(name) if group is None or group.has_averages else None
            error = None
            if average is None:
                odd.append(name)
                error = ValueError("this optimizer keeps none of it")
            elif group is not None:
                error = _error(check_average, name, saved, group.layout_at(row))
                if error is not None and strict:
                    raise error
            if error is not None:
                without[name] = str(error)
                saved = without_average(saved)
                saved = saved._replace(form=bare.setdefault(id(states[name].form), saved.form))
            elif group is None:
                saved = saved._replace(keeps=average)
        batch.names.append(name)
        batch.rows.append(row)
        batch.saved.append(saved)
    if odd and strict:
        raise ValueError(
            f"the loaded state has averages of {', '.join(map(repr, odd))}; expected none, for "
            "names of which this optimizer keeps none: give it an average"
        )
    return _Admitted([batch for batch in batches.values() if batch.fits], refused, without)


def _misfit(registry: "Registry", name: str, saved: Saved) -> ValueError | None:
    """Why the state of a name does not fit, or None if it does; its average is not checked."""
    if name in registry:
        group, row = registry.row_of(name)
        rule = formulas(group.rule_at(row))[0]
        return _error(check_fit, name, saved, rule, group.layout_at(row), registry.masters)
    if isinstance(registry.rule, Rule):
        form = saved.form
        return _error(
            check_slot_names, name, form.own, saved.step, form.rule.settings, registry.rule
        )
    return None


def _error(check: Callable[..., None], *arguments: Any) -> ValueError | None:
    """The error that a check raises; None if it passes."""
    try:
        check(*arguments)
    except ValueError as error:
        return error
    return None


def _warn(registry: "Registry", batches: Iterable[_Batch]) -> None:
    """Warn about each ``Plateau`` whose state cannot be restored."""
    scheduled = registry.scheduled_rules()
    rules, averages = dict[str, Rule](), dict[str, Rule]()
    for names, saved, group in ((batch.names, batch.saved, batch.group) for batch in batches):
        if group is None and isinstance(registry.rule, Rule):
            rules |= dict.fromkeys(names, registry.rule)
        has_average = saved[0].form.average is not None
        for name, record in zip(names, saved, strict=True) if has_average or scheduled else ():
            mean: Rule | None = record.keeps
            if name in scheduled:
                rules[name], *means = formulas(scheduled[name])
                mean = means[0] if means else None
            if has_average and mean is not None:
                averages[name] = mean
    warn_of_plateaus(rules)
    warn_of_plateaus(averages)


def _placed(registry: "Registry", batches: Iterable[_Batch]) -> dict[str, int]:
    """Make new rows for names seen before, and return their codes; nothing is registered yet."""
    codes: dict[str, int] = {}
    by_group: dict[int, list[_Batch]] = {}
    for batch in batches:
        if batch.group is not None:
            by_group.setdefault(id(batch.group), []).append(batch)
    try:
        for alike in by_group.values():
            group = alike[0].group
            assert group is not None
            saved = [record for batch in alike for record in batch.saved]
            rows = resumed(group, saved, [batch.shape for batch in alike for _ in batch.saved])
            names = (name for batch in alike for name in batch.names)
            codes.update(zip(names, (rows + group.number * GROUP).tolist(), strict=True))
            group.copy_columns(rows, np.array([row for batch in alike for row in batch.rows]))
            set_clocks(group, rows, saved)
    except BaseException:
        registry.free(codes.values())
        raise
    return codes


def _observed(registry: "Registry", batches: Iterable[_Batch]) -> list[tuple[Rule, Description]]:
    """Pair each rule that has schedules with the description that was saved in its place."""
    pairs: list[tuple[Rule, Description]] = []
    for batch in batches:
        group, form = batch.group, batch.saved[0].form
        if group is None and isinstance(registry.rule, Rule):
            pairs.append((registry.rule, form.rule))
        elif group is not None and group.scheduled:
            sets = {int(group.schedule[row]): row for row in batch.rows}
            for row in sets.values():
                own, *average = formulas(group.rule_at(row))
                pairs.append((own, form.rule))
                if average and form.average is not None:
                    pairs.append((average[0], form.average))
    return pairs


def _largest_clock(registry: "Registry") -> int:
    rows = [group.steps[rows] for group, rows in registry.rows_of(None)]
    waiting = [saved.step for saved in registry.pending.values()]
    return int(max([*waiting, *(steps.max(initial=0) for steps in rows)], default=0))
