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

from multiopt.arrays import Array
from multiopt.engine import Group
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.state.contents import Contents
from multiopt.state.differences import differing
from multiopt.state.fit import check_average, check_fit, check_slot_names
from multiopt.state.params import Matched, matched
from multiopt.state.plateaus import observe, warn_of_plateaus
from multiopt.state.record import (
    Description,
    Form,
    Saved,
    resumed,
    set_clocks,
    without_average,
)
from multiopt.state.report import LoadReport
from multiopt.state.resuming import Resuming
from multiopt.state.settings import Settings, warn_of_lost
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
    wanted: Mapping[str, str],
    strict: bool,
    cast: bool,
    settings: bool = True,
    params: Mapping[str, Array] | None = None,
    ready: Callable[[], object] | None = None,
) -> LoadReport:
    """Load saved state into a registry, and parameters into arrays, all of it or nothing.

    Args:
        registry: The registry to load into.
        contents: What was read from the file or the state dict.
        wanted: The wanted names, each with its name in this registry.
        strict: Whether state that does not fit is an error; otherwise it is left out.
        cast: Whether slots and parameters are converted to the dtype that is needed.
        settings: Whether to restore the settings that were made while the saved run went on.
        params: The arrays to load parameters into; None to load none.
        ready: Called once everything is checked, before anything changes; it may raise.

    Raises:
        TypeError: Something in ``params`` is not a usable array.
        ValueError: State does not fit, and ``strict`` is true.
    """
    new = {name: wanted[name] for name in contents.names if name in wanted}
    matches = None if params is None else _matched(registry, contents, wanted, strict, cast, params)
    loaded = _settings(contents, new) if settings else Settings()
    warn_of_lost(loaded.lost, "loaded")
    resuming = Resuming(registry, loaded, strict)
    try:
        return _load(registry, contents, wanted, new, strict, cast, resuming, matches, ready)
    finally:
        resuming.free()


def _load(
    registry: "Registry",
    contents: Contents,
    wanted: Mapping[str, str],
    new: Mapping[str, str],
    strict: bool,
    cast: bool,
    resuming: Resuming,
    matches: Matched | None,
    ready: Callable[[], object] | None,
) -> LoadReport:
    states = contents.saved
    if any(map(ne, new, new.values())):
        states = {new[name]: saved for name, saved in states.items()}
    admitted = _admitted(registry, resuming, _cast(states) if cast else states, strict)
    resuming.leave({*admitted.refused, *(new[name] for name in contents.unfit if name in new)})
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
    _warn(registry, resuming.rule, admitted.batches)
    found = differing(registry, accepted, resuming.loaded)
    gone: set[str] = set()
    if registry.guard.torn is not None:
        # A partial load would leave names torn. A whole one forgets names that came after the save.
        gone = registry.known().keys() - {*seen, *pending}
        if gone and (is_part or len(taken) < len(contents.names)):
            registry.guard.check_whole("load of some names")
    observed = _observed(resuming, admitted.batches)
    codes = _placed(registry, admitted.batches)
    waiting = {**registry.pending, **accepted}
    if ready is not None:
        try:
            ready()
        except BaseException:
            registry.free(codes.values())
            raise
    with registry.guard:
        if gone:
            registry.forget(gone)
        resuming.commit()
        registry.replace_rows(codes)
        gone |= codes.keys()
        registry.pending = {n: saved for n, saved in waiting.items() if n not in gone}
        registry.endings = None
        for rule, description in observed:
            observe(rule, description.observed, ahead=is_part)
        registry.steps = _largest_clock(registry) if steps is None else steps
        registry.skips = skips
        if matches is not None:
            matches.write()
        registry.guard.torn = None
    registry.sweep()
    if (reason := resuming.refused.pop(None, None)) is not None:
        resuming.refused = dict.fromkeys(accepted, reason)
    reasons |= {name: reason for name, reason in resuming.refused.items() if name in accepted}
    reasons |= {name: f"its average: {reason}" for name, reason in admitted.without.items()}
    covered = {new.get(name, name) for name in contents.names}
    missing = dict.fromkeys(name for name in registry.names if name not in covered)
    unused = {n: "it was not asked for" for n in contents.all_names() if n not in wanted}
    unused |= {old: reasons[name] for old, name in new.items() if name in reasons}
    if matches is not None:
        missing |= dict.fromkeys(matches.missing)
        for name, reason in matches.unused.items():
            others = [unused[name]] if name in unused else []
            unused[name] = "; ".join([*others, f"its parameter: {reason}"])
    return LoadReport(
        restored=tuple(seen),
        pending=tuple(pending),
        unused=unused,
        missing=tuple(missing),
        metadata=dict(contents.metadata),
        differences=found,
        params=None if matches is None else matches.params,
    )


def _settings(contents: Contents, new: Mapping[str, str]) -> Settings:
    """The settings under the names here; if only some names are loaded, for those alone."""
    settings = contents.settings.renamed(new)
    if len(new) == len(contents.names):
        return settings
    by_name = {name: own for name in new.values() if (own := settings.of_name(name))}
    return settings._replace(for_all={}, by_name=by_name)


def _matched(
    registry: "Registry",
    contents: Contents,
    wanted: Mapping[str, str],
    strict: bool,
    cast: bool,
    params: Mapping[str, Array],
) -> Matched:
    """Match the parameters of a file with the arrays of the caller's."""
    loaded, damaged = None, dict[str, str]()
    if contents.params is not None:
        loaded = {wanted[name]: saved for name, saved in contents.params.saved.items()}
        damaged = {wanted[name]: reason for name, reason in contents.params.damaged.items()}
    some = len(wanted) < len(contents.all_names())
    in_place = registry.in_place
    matches = matched(loaded, params, some=some, strict=strict, cast=cast, in_place=in_place)
    old = {name: before for before, name in wanted.items()}
    unused = {old[name]: reason for name, reason in (matches.unused | damaged).items()}
    covered = {wanted.get(n, n) for n in contents.params.names} if contents.params else ()
    missing = [name for name in matches.missing if name not in covered]
    return matches._replace(unused=unused, missing=missing)


def _cast(states: Mapping[str, Saved]) -> dict[str, Saved]:
    """Mark saved state to be converted to the dtype that its parameter needs."""
    forms = {id(saved.form): saved.form._replace(cast=True) for saved in states.values()}
    return {name: saved._replace(form=forms[id(saved.form)]) for name, saved in states.items()}


def _admitted(
    registry: "Registry", resuming: Resuming, states: Mapping[str, Saved], strict: bool
) -> _Admitted:
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
            group, row = resuming.row_of(name)
            shape = group.shapes[row]
        # Names not seen yet may have settings of their own. At step 0, state need not have slots.
        own = id(resuming.settings.get(name)) if group is None else 0
        key = id(group), shape, own, id(saved.form), saved.step == 0
        if key not in batches:
            error = _misfit(registry, resuming, name, saved)
            if error is not None and strict:
                raise error
            batches[key] = _Batch(group, shape, error is None, [], [], [])
        batch = batches[key]
        if not batch.fits:
            refused[name] = str(_misfit(registry, resuming, name, saved))
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


def _misfit(registry: "Registry", resuming: Resuming, name: str, saved: Saved) -> ValueError | None:
    """Why the state of a name does not fit, or None if it does; its average is not checked."""
    form = saved.form
    if name in registry:
        group, row = resuming.row_of(name)
        rule = formulas(group.rule_at(row))[0]
        return _error(check_fit, name, saved, rule, group.layout_at(row), registry.masters)
    try:
        rule_for_name = resuming.rule_for(name)
    except (TypeError, ValueError) as error:
        return ValueError(str(error))
    if rule_for_name is None:
        return None
    return _error(check_slot_names, name, form.own, saved.step, form.rule.settings, rule_for_name)


def _error(check: Callable[..., None], *arguments: Any) -> ValueError | None:
    """The error that a check raises; None if it passes."""
    try:
        check(*arguments)
    except ValueError as error:
        return error
    return None


def _warn(registry: "Registry", rule: Any, batches: Iterable[_Batch]) -> None:
    """Warn about each ``Plateau`` whose state cannot be restored."""
    scheduled = registry.scheduled_rules()
    rules, averages = dict[str, Rule](), dict[str, Rule]()
    for names, saved, group in ((batch.names, batch.saved, batch.group) for batch in batches):
        if group is None and isinstance(rule, Rule):
            rules |= dict.fromkeys(names, rule)
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


def _observed(
    resuming: Resuming, batches: Iterable[_Batch]
) -> list[tuple[Rule | Mapping[str, Any], Description]]:
    """Pair rules and settings that have schedules with the description saved in their place."""
    pairs: list[tuple[Rule | Mapping[str, Any], Description]] = []
    rule, settings = resuming.rule, resuming.settings
    for batch in batches:
        group, form = batch.group, batch.saved[0].form
        if group is None:
            pairs.append((rule if isinstance(rule, Rule) else settings.get(None, {}), form.rule))
            pairs += [(settings[name], form.rule) for name in batch.names if name in settings]
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
