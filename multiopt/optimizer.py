"""The registry: names to rules, clocks and slots, and the step: ``spec/registry.md``."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from itertools import compress
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np

from multiopt import checkpoint
from multiopt.averaging import Average, Choices
from multiopt.backend import Array, Layout, Now, backend_of, named, objects
from multiopt.checkpoint import Contents
from multiopt.clipping import Clip
from multiopt.entry import (
    Changed,
    Entry,
    changed,
    check_average,
    check_clip,
    check_rule,
    check_slot_names,
    chosen,
    chosen_clip,
    described,
    described_rule,
    new_entry,
    on_host,
    restored,
    restored_plateaus,
    with_rule,
)
from multiopt.errors import CheckpointError
from multiopt.exclusive import exclusive, in_the_middle
from multiopt.inputs import as_dict, check_known, check_names, own_gradient
from multiopt.interruption import uninterrupted
from multiopt.loading import LoadReport, Options, names_of, renamed, wanted_names
from multiopt.plan import Outcome, Plan
from multiopt.report import Report, abridged, report_of, updated_names
from multiopt.rules import Rule
from multiopt.skipping import Skips, check_limit, counted
from multiopt.step import Step

__all__ = ["Optimizer", "State"]

#: Where a state dict has the entries of averages, and those that wait.
AVERAGES = {"entries": "averages", "pending": "pending_averages"}

#: How many plans are remembered: lists of names that take turns.
PLANS = 8


class State(NamedTuple):
    """A snapshot of the state of one parameter.

    Attributes:
        step: How many steps it has taken.
        slots: The rule's arrays by name, copies, of the parameter's shape and library; float32
            for a 16-bit parameter.
    """

    step: int
    slots: dict[str, Array]


class Optimizer:
    """Optimizes named parameters that may appear at any time, on any array library.

    Args:
        rule: A rule for all names, or a callable ``name -> rule``, called once for each name, at
            first sight.
        clip: A clip for all names, or a callable ``name -> Clip or None``, likewise; None for no
            clipping.
        on_nonfinite: What a step does about a gradient with an infinity or a NaN, looked for
            before clipping. ``"propagate"``: nothing, the gradient is used. ``"raise"``:
            ``ValueError``, and nothing has changed. ``"skip"``: those names are left alone, out of
            every norm, their clocks stand still; the others step; ``skips`` counts them.
        max_consecutive_skips: With ``"skip"``, in how many steps in a row a name may be skipped.
            The next one raises ``ValueError``, and nothing has changed. None for no limit.
        threads: The largest number of threads for large parameters on the CPU. By default, and at
            most, as many as torch uses where it is loaded, else as many as the process may run on;
            the environment variable ``MULTIOPT_NUM_THREADS`` bounds them too.
        master_weights: Keep a float32 copy of each float16 and bfloat16 parameter, from which the
            parameter is rounded at every step, so that changes too small for it add up. The copy
            is the slot ``master_param``, takes 4 bytes an element and is saved with the others. A
            parameter that somebody else changes is taken as it is.
        average: What average to keep of every parameter beside it, or a callable ``name -> Average
            or None``, called once for each name; None for none. ``average(name)`` reads it.

    Raises:
        TypeError: ``rule`` or ``clip`` is of another kind.
        ValueError: ``on_nonfinite`` is none of the three, or ``threads`` or
            ``max_consecutive_skips`` is no integer >= 1, or nothing is skipped to which a limit
            would apply.

    >>> import numpy as np, multiopt as mo
    >>> opt = mo.Optimizer(mo.Adam(lr=0.1), clip=mo.Clip(norm=10.0))
    >>> params = {"loc": np.zeros(3)}
    >>> params = opt.step(params, {"loc": np.ones(3)})
    >>> params["scale"] = np.ones(())                               # a parameter is born
    >>> params = opt.step(params, {"loc": np.ones(3), "scale": np.ones(())})
    >>> opt.state("loc").step, opt.state("scale").step
    (2, 1)
    >>> params["loc"].round(3).tolist()
    [-0.2, -0.2, -0.2]
    """

    # Without a dict, a misspelt attribute is an error instead of a setting without effect.
    __slots__ = (
        "__weakref__",
        "_average",
        "_averages",
        "_changing",
        "_clip",
        "_masters",
        "_max_skips",
        "_on_nonfinite",
        "_outcome",
        "_pending",
        "_plan",
        "_plans",
        "_rule",
        "_seen",
        "_skips",
        "_steps",
        "_threads",
        "_under_way",
    )

    #: Those that a copy begins anew.
    _anew: ClassVar = ("__weakref__", "_changing", "_plan", "_plans", "_under_way")

    #: Whether a step writes clipped gradients over the gradients.
    _leave_clipped: ClassVar[bool] = False

    def __init__(
        self,
        rule: Rule | Callable[[str], Rule],
        clip: Clip | Callable[[str], Clip | None] | None = None,
        *,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
        threads: int | None = None,
        master_weights: bool = False,
        average: Average | Callable[[str], Average | None] | None = None,
        max_consecutive_skips: int | None = None,
    ) -> None:
        """Make an optimizer that has seen no parameter yet."""
        check_rule(rule)
        check_clip(clip)
        check_average(average)
        if on_nonfinite not in ("propagate", "raise", "skip"):
            raise ValueError(
                f"on_nonfinite must be 'propagate', 'raise' or 'skip'; got {on_nonfinite!r}"
            )
        self._rule = rule
        self._clip = clip
        if threads is not None and not (type(threads) is int and threads >= 1):
            raise ValueError(f"threads must be an integer >= 1 or None; got {threads!r}")
        check_limit(max_consecutive_skips, on_nonfinite)
        self._on_nonfinite = on_nonfinite
        self._max_skips = max_consecutive_skips
        self._threads = threads
        self._masters = master_weights
        # Averages are slots of a rule that looks at each new parameter.
        self._average = average
        self._averages = None if average is None else Optimizer(Choices(), threads=threads)
        self._seen: dict[str, Entry] = {}
        self._steps = 0
        # The plan of the last step, which has the clocks of its entries, and some earlier ones.
        self._plan: Plan | None = None
        self._plans: dict[tuple[str, ...], Plan] = {}
        # Loaded state of names not seen yet, as a state dict has it, the slots NumPy arrays.
        self._pending: dict[str, Mapping[str, Any]] = {}
        # How often names were skipped, for those that ever were.
        self._skips: dict[str, Skips] = {}
        # Of the last step: its names, which of them were new, and what became of them. Every whole
        # step has an object of its own here.
        self._outcome: _Outcome | None = None
        # Whether a step or another change has begun that has not ended.
        self._changing = False
        # A step in which one call changes all: its plan, the first clock before it, and the number
        # of steps after it.
        self._under_way: tuple[Plan, int, int] | None = None

    # Looking

    @property
    def last(self) -> Report:
        """What the last step did."""
        if self._outcome is None:
            return Report()
        return report_of(*self._outcome)

    @property
    def names(self) -> tuple[str, ...]:
        """The names seen so far, oldest first."""
        return tuple(self._seen)

    @property
    def pending(self) -> tuple[str, ...]:
        """The names whose loaded state waits for the parameter."""
        return tuple(self._pending)

    @property
    def steps(self) -> int:
        """How many steps it has taken in which anything was updated.

        Schedules count the steps of their parameter instead, but for ``schedules.Shared``.
        """
        if self._changing and self._under_way is not None:
            # A signal handler asks, and the call may have been made.
            plan, first, count = self._under_way
            if plan.steps[0] != first:
                return count
        return self._steps

    @property
    def skips(self) -> dict[str, Skips]:
        """How often each name was skipped, for those that ever were: seen, pending or neither.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip", max_consecutive_skips=5)
        >>> _ = opt.step({"w": np.ones(2)}, {"w": np.array([1.0, np.nan])})
        >>> opt.skips
        {'w': Skips(total=1, consecutive=1)}
        """
        return dict(self._skips)

    def state(self, name: str) -> State:
        """A snapshot of a parameter's clock and slots.

        Raises:
            KeyError: The name has not been seen.
        """
        entry = self._entry(name)
        return State(entry.step, entry.named_slots(_shown(entry)))

    def hyperparameters(self, name: str) -> dict[str, Any]:
        """The hyperparameters that the next step of a parameter will use, schedules as numbers.

        Raises:
            KeyError: The name has not been seen.
            ValueError: A schedule gives no number, or one out of range.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.SGD(lr=mo.schedules.Linear(0.0, 1.0, steps=4)))
        >>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
        >>> opt.hyperparameters("w")["lr"]
        0.25
        """
        entry = self._entry(name)
        try:
            now = entry.rule.at(entry.step + 1, self.steps + 1)
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error
        return {f.name: getattr(now, f.name) for f in fields(now)}

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            why = "its loaded state is pending" if name in self._pending else "it was never stepped"
            raise KeyError(f"no state for parameter {name!r}: {why}")
        return entry

    def average(self, name: str) -> Array:
        """The average of a parameter: a copy, float32 for a 16-bit parameter.

        Raises:
            KeyError: None is kept, or there was no step yet.
        """
        if self._averages is None or name not in self._averages:
            why = "its loaded state is pending" if name in self._pending else "none is kept"
            raise KeyError(f"no average of parameter {name!r}: {why}")
        return self._averages.state(name).slots["average"]

    def __len__(self) -> int:
        """The number of names seen."""
        return len(self._seen)

    def __bool__(self) -> bool:
        """True, also before the first step."""
        return True

    def __getstate__(self) -> dict[str, Any]:
        """All but the plans."""
        self._settle_clocks()
        names = (*Optimizer.__slots__, *getattr(self, "__dict__", ()))
        return {name: getattr(self, name) for name in names if name not in self._anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without plans."""
        self._plan, self._plans = None, {}
        self._changing, self._under_way = False, None
        for name, value in state.items():
            setattr(self, name, value)

    def __copy__(self) -> "Optimizer":
        """A deep copy: two optimizers never share state."""
        return deepcopy(self)

    def __contains__(self, name: object) -> bool:
        """Whether a name has been seen."""
        return name in self._seen

    def __iter__(self) -> Iterator[str]:
        """The names seen so far, oldest first."""
        return iter(self.names)

    def __repr__(self) -> str:
        """The rule, the clip and how many names there are."""
        parts = [repr(self._rule)]
        if self._clip is not None:
            parts.append(f"clip={self._clip!r}")
        if self._on_nonfinite != "propagate":
            parts.append(f"on_nonfinite={self._on_nonfinite!r}")
        pending = f", {len(self._pending)} pending" if self._pending else ""
        return f"<Optimizer({', '.join(parts)}): {len(self)} names{pending}>"

    # Changing

    @property
    def rule(self) -> Rule | Callable[[str], Rule]:
        """The rule for all names, or the callable ``name -> rule``.

        Assigning changes the rule of all names. Slots that the new rule has too are kept, others
        start at zero. Clocks go on, but where the new rule has slots and none of them was kept, the
        clock starts again with them, for it is their bias that is corrected.
        """
        return self._rule

    @rule.setter
    @exclusive
    def rule(self, rule: Rule | Callable[[str], Rule]) -> None:
        check_rule(rule)
        entries = {
            name: with_rule(name, entry, chosen(rule, name, Rule, "rule"))
            for name, entry in self._entries.items()
        }
        with uninterrupted():
            self._entries, self._rule = entries, rule

    @exclusive
    def set_hyperparameters(self, names: Iterable[str] | str | None = None, **values: Any) -> None:
        """Change some hyperparameters, of all names or of none.

        Slots and clocks are kept. A value that changes which slots there are has the effect of
        assigning a rule with it to ``rule``.

        Args:
            names: The names, or one name; by default all, and those still to come.
            **values: The hyperparameters with their new values: numbers, or schedules.

        Raises:
            KeyError: A name has not been seen.
            TypeError: The rule of a name has no such hyperparameter.
            ValueError: A value is out of range.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.Adam(lr=0.5))
        >>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
        >>> opt.set_hyperparameters(lr=0.25)
        >>> opt.rule.lr, opt.hyperparameters("w")["lr"], opt.state("w").step
        (0.25, 0.25, 1)
        """
        entries, rule = self._entries, self._rule
        if names is None:
            touched = dict(entries)
        else:
            listed = [names] if isinstance(names, str) else names
            touched = {name: self._entry(name) for name in listed}
        # Names that share a rule go on sharing one: the numbers of a step are computed once for it.
        made: dict[int, Rule] = {}
        for name, entry in touched.items():
            if id(entry.rule) not in made:
                made[id(entry.rule)] = changed(name, entry.rule, values)
            touched[name] = with_rule(name, entry, made[id(entry.rule)])
        if names is None:
            if isinstance(rule, Rule):
                rule = made.get(id(rule)) or changed(None, rule, values)
            elif isinstance(rule, Changed):
                rule = Changed(rule.given, {**rule.values, **values})
            else:
                rule = Changed(rule, values)
        with uninterrupted():
            self._entries, self._rule = {**entries, **touched}, rule

    @property
    def clip(self) -> Clip | Callable[[str], Clip | None] | None:
        """The clip for all names, the callable ``name -> Clip or None``, or None.

        Assigning changes the clip of all names.
        """
        return self._clip

    @clip.setter
    @exclusive
    def clip(self, clip: Clip | Callable[[str], Clip | None] | None) -> None:
        check_clip(clip)
        entries = {
            name: replace(entry, clip=chosen_clip(clip, name))
            for name, entry in self._entries.items()
        }
        with uninterrupted():
            self._entries, self._clip = entries, clip

    @exclusive
    def forget(self, name: str) -> None:
        """Drop a name with its state, seen or pending, and its skips; seen again, it starts anew.

        Raises:
            KeyError: The name is neither seen nor pending, and was never skipped.
        """
        if name not in self._known():
            raise KeyError(f"cannot forget parameter {name!r}: it is neither seen nor pending")
        with uninterrupted():
            if self._averages is not None:
                self._averages._drop({name})
                self._choices.pop(name, None)
            self._drop({name})

    def _drop(self, names: Collection[str]) -> None:
        """Forget names; nothing comes between."""
        self._entries = {n: entry for n, entry in self._entries.items() if n not in names}
        self._pending = {n: entry for n, entry in self._pending.items() if n not in names}
        self._skips = {n: count for n, count in self._skips.items() if n not in names}

    @exclusive
    def rename(self, names: Mapping[str, str]) -> None:
        """Give names, seen or pending, new names; state, rule, clip and skips go along.

        Args:
            names: Old names to new ones. Names may be swapped.

        Raises:
            KeyError: An old name is neither seen nor pending, and was never skipped.
            ValueError: Two names would become one.
            TypeError: A new name is no string, or ``names`` no mapping.
        """
        if not isinstance(names, Mapping):
            raise TypeError(f"expected a mapping of old names to new ones; got {names!r}")
        known = self._known()
        for old, new in names.items():
            if old not in known:
                raise KeyError(f"cannot rename parameter {old!r}: it is neither seen nor pending")
            if not isinstance(new, str):
                raise TypeError(f"cannot rename parameter {old!r} to {new!r}: expected a string")
        renamed = Counter(names.get(name, name) for name in known)
        for new in names.values():
            if renamed[new] > 1:
                raise ValueError(f"cannot rename: two parameters would be called {new!r}")
        names = dict(names)
        with uninterrupted():
            if self._averages is not None:
                self._averages._move(names)
                # A step that failed may have left a choice for a name of which nothing is held.
                made = {
                    names.get(n, n): choice for n, choice in self._choices.items() if n in known
                }
                self._choices.clear()
                self._choices.update(made)
            self._move(names)

    def _move(self, names: Mapping[str, str]) -> None:
        """Give names new names; nothing comes between."""
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}
        self._pending = {names.get(name, name): entry for name, entry in self._pending.items()}
        self._skips = {names.get(name, name): count for name, count in self._skips.items()}

    def _known(self) -> dict[str, None]:
        """The names of which anything is held."""
        averages = () if self._averages is None else self._averages._known()
        return dict.fromkeys([*self._entries, *self._pending, *self._skips, *averages])

    # The step

    def step(
        self, params: Mapping[str, Array], grads: Mapping[str, Array | None] | None = None
    ) -> dict[str, Array]:
        """Update the parameters that have a gradient.

        NumPy arrays and torch tensors are updated in place and returned as the same objects; for
        arrays that cannot be written, JAX's for one, new ones are returned. The gradients are
        never written. A name without a gradient (missing or None) is left alone, and its clock
        stands still. Everything is checked and made before anything is changed.

        An exception that a signal raises meanwhile, such as ``KeyboardInterrupt``, leaves each name
        as it was before the step or after it, and a note of the exception says which; so does
        ``last``. A name whose array cannot be written is then as before, for the new array is lost.

        Args:
            params: Arrays by name: float16, bfloat16, float32 or float64, of any mix of libraries,
                devices and shapes.
            grads: Gradients by name, each of its parameter's library, shape, dtype and device. If
                left out, they are read from the ``.grad`` of the parameters (torch).

        Returns:
            The up-to-date parameters, in the order of ``params``.

        Raises:
            KeyError: A gradient has no parameter.
            ValueError: A shape does not fit; a parameter cannot be written; two parameters share
                memory; pending state does not fit; a schedule left its range; a gradient is not
                finite and ``on_nonfinite`` is ``"raise"``.
            TypeError: Something is no usable array: a scalar, a dtype that is not real floating, a
                gradient of another dtype or device than its parameter's, a tracer.
        """
        if self._changing:
            raise in_the_middle("step")
        undo: _Undo = []
        before = self._outcome
        try:
            # As ``exclusive`` does, in less time.
            self._changing = True
            params = as_dict("params", params)
            count, gradients = len(params), None
            if grads is not None:
                grads = as_dict("grads", grads)
                check_known(grads, params)
                gradients = np.fromiter(map(grads.get, params), object, count)
            arrays = np.fromiter(params.values(), object, count)
            advance = (
                Optimizer._advance if self._averages is None else Optimizer._advance_and_average
            )
            if "torch._dynamo" in sys.modules:
                advance = _untraced(advance)
            if replaced := advance(self, list(params), arrays, gradients, undo):
                params.update(replaced)
            self._changing = False
            return params
        except BaseException as error:
            self._changing = False
            with uninterrupted():
                for take_back in undo:
                    take_back()
                self._explain(error, before)
            raise

    def _advance_and_average(
        self,
        names: list[str],
        params: np.ndarray,
        grads: np.ndarray | None,
        undo: "_Undo",
    ) -> dict[str, Array]:
        """``_advance``, and then the averages."""
        assert self._averages is not None
        more: _Undo = []
        try:
            # Handlers find the averages where the parameters are.
            with ExitStack() as held:
                replaced = self._advance(names, params, grads, undo, held)
                if averaged := self._averaged():
                    place = dict(zip(names, range(len(names)), strict=True))
                    where = [place[name] for name in averaged]
                    now = (replaced.get(names[i], params[i]) for i in where)
                    # A schedule that is shared counts the steps of the whole.
                    self._averages._steps = self._steps - 1
                    self._averages._advance(
                        averaged,
                        np.fromiter(now, object, len(where)),
                        None if grads is None else grads[where],
                        more,
                    )
        finally:
            undo += more
        return replaced

    def _averaged(self) -> list[str]:
        """The names that the last step updated, and of which an average is kept."""
        assert self._outcome is not None
        names, _, outcome = self._outcome
        names = updated_names(names, outcome)
        if isinstance(self._average, Average):
            return names
        return [name for name in names if self._average_of(name) is not None]

    def _average_of(self, name: str) -> Average | None:
        """What average is kept of a name; asked once."""
        if name not in self._choices:
            self._choices[name] = chosen(self._average, name, Average, "average")
        choice: Average | None = self._choices[name]
        return choice

    @property
    def _choices(self) -> "Choices":
        """The averages that were chosen, by name."""
        assert self._averages is not None
        assert isinstance(self._averages._rule, Choices)
        return self._averages._rule

    def _advance(
        self,
        names: list[str],
        params: np.ndarray,
        grads: np.ndarray | None,
        undo: "_Undo",
        held: ExitStack | None = None,
    ) -> dict[str, Array]:
        """Step; return the arrays that take the place of parameters that cannot be written.

        Args:
            names: Their names.
            params: The parameters.
            grads: Their gradients; None for their own.
            undo: Takes what takes back what is not to stay if the step does not end.
            held: Holds signals back from the first change on, until its owner closes it; None to
                hold them back no longer than the changes take.
        """
        plan = self._plan_of(names)
        own, leaves = grads is None, False
        if grads is None and plan is not None and plan.whole is not None:
            grads = plan.whole.backend.gradients(params)
            leaves = grads is not None
        if grads is None:
            grads = objects(map(own_gradient, names, params))
        if plan is not None:
            # The way of nearly every step.
            now = None
            is_plain = self._on_nonfinite == "propagate" and not (
                self._skips and self._skips_in_a_row()
            )
            if is_plain and plan.takes_all(params, grads):
                # A schedule is the caller's code: the arrays are looked at when it has run.
                now = self._rules_now(plan) if plan.scheduled else ()
                count, first = self._steps + 1, plan.steps[0]
                if held is not None:
                    held.enter_context(uninterrupted())
                self._under_way = plan, first, count
                try:
                    outcome = plan.advance_all(
                        params, grads, leaves, now, self._leave_clipped, self._threads
                    )
                    if outcome is not None:
                        self._steps = count
                        self._outcome = plan.names, (), outcome
                        return {}
                except BaseException:
                    # Parameters, slots and clocks change in one.
                    if plan.steps[0] != first:
                        with uninterrupted():
                            self._steps = count
                            self._outcome = plan.names, (), plan.told()
                    raise
                finally:
                    self._under_way = None
            # Overflow and NaN are values here; np.seterr(all="raise") must not tear a step apart.
            with np.errstate(all="ignore"):
                return self._take(plan, params, grads, undo, held, own=own, leaves=leaves, now=now)
        # A name is seen for the first time with its first gradient.
        has = np.array([grad is not None for grad in grads], bool)
        if not has.all():
            some = [name for name, here in zip(names, has, strict=True) if here]
            return self._advance(some, params[has], grads[has], undo, held)
        fresh = {}
        for name, param in zip(names, params, strict=True):
            if name not in self._seen:
                label = f"parameter {name!r}"
                layout = backend_of(param, label).layout(param, label)
                fresh[name] = self._settled(name, layout, undo)
        with np.errstate(all="ignore"):
            return self._take(self._made(names, fresh), params, grads, undo, held, fresh, own=own)

    def _skips_in_a_row(self) -> bool:
        """Whether an update would end a run of skips, a loaded one if nothing is skipped here."""
        return any(count.consecutive for count in self._skips.values())

    def _rules_now(self, plan: Plan) -> Sequence[Now]:
        with np.errstate(all="ignore"):
            return plan.rules_now(None, self._steps + 1)

    def _take(
        self,
        plan: Plan,
        params: np.ndarray,
        grads: np.ndarray,
        undo: "_Undo",
        held: ExitStack | None,
        fresh: Mapping[str, Entry] = MappingProxyType({}),
        *,
        own: bool,
        leaves: bool = False,
        now: Sequence[Now] | None = None,
    ) -> dict[str, Array]:
        """Take a step of a plan.

        Args:
            plan: The plan.
            params: Its parameters.
            grads: Their gradients.
            undo: As for ``_advance``.
            held: Likewise.
            fresh: The entries that are not registered yet: of new names, and of parameters that
                moved.
            own: Whether the gradients are the parameters' own.
            leaves: Whether it is known that the parameters may have gradients of their own.
            now: The rules at this step, if the schedules were asked already.
        """
        count = self._steps + 1
        step = Step(
            plan,
            params,
            grads,
            own=own,
            leaves=leaves,
            count=count,
            now=now,
            threads=self._threads,
        )
        # What is new is looked at in Python, which knows more.
        new = [i for i, name in enumerate(plan.names) if name in fresh] if fresh else []
        moved = step.look(new)
        if moved:
            names = plan.names
            self._settle_clocks()
            moved_to = {names[i]: self._settled(names[i], x, undo) for i, x in moved.items()}
            fresh = {**fresh, **moved_to}
            made = self._made(names, fresh)
            return self._take(made, params, grads, undo, held, fresh, own=own, now=now)
        step.check(self._on_nonfinite, self._leave_clipped)
        names, active = plan.names, step.outcome.active
        skips = self._skips
        if step.outcome.skipped or skips:
            skipped = [names[i] for i in step.outcome.skipped]
            skips = counted(skips, skipped, updated_names(names, step.outcome), self._max_skips)
        born = tuple(
            names[i] for i in new if names[i] not in self._seen and (active is None or active[i])
        )
        if not (names and (active is None or active.any())):
            count = self._steps
        outcome = names, born, step.outcome
        before: _Undo = []
        if step.replaced:
            before = [partial(self._take_back, self._before(plan, fresh, step.replaced))]
        replaced = {names[i]: array for i, array in step.replaced.items()}
        if held is not None:
            held.enter_context(uninterrupted())
        with uninterrupted():
            # From here on nothing fails: the step is whole.
            undo[:] = before
            step.run()
            self._steps, self._outcome, self._skips = count, outcome, skips
            if plan is not self._plan:
                self._take_up(plan, fresh, step.outcome)
            step.tell(self._leave_clipped)
            self._after(step)
        return replaced

    def _after(self, step: Step) -> None:
        """For hosts that expect to find the clipped gradients; here nothing."""

    # A step that did not end

    def _before(
        self, plan: Plan, fresh: Mapping[str, Entry], positions: Iterable[int]
    ) -> "_Before":
        """What some positions have before a step."""
        steps, held = plan.steps.tolist(), []
        for i in positions:
            name, entry = plan.names[i], plan.entries[i]
            registered = self._seen.get(name) if name in fresh else entry
            pending = self._pending.get(name)
            held.append(
                _Held(name, entry, entry.slots, entry.master, steps[i], registered, pending)
            )
        return _Before(self._steps, self._outcome, self._skips, held)

    def _take_back(self, before: "_Before") -> None:
        """Let names be as they were before the step: their new arrays did not reach the caller."""
        self._settle_clocks()
        for name, entry, slots, master, step, registered, pending in before.held:
            entry.slots, entry.master, entry.step = slots, master, step
            if registered is None:
                self._seen.pop(name, None)
            else:
                self._seen[name] = registered
            if pending is not None:
                self._pending[name] = pending
        self._plan = None
        self._plans.clear()
        if self._outcome is before.outcome or self._outcome is None:
            return
        names, born, outcome = self._outcome
        back = {held.name for held in before.held}
        active = [name not in back for name in names]
        if outcome.active is not None:
            active = [a and bool(b) for a, b in zip(active, outcome.active, strict=True)]
        if not (any(active) or outcome.skipped):
            self._steps, self._outcome, self._skips = before.steps, before.outcome, before.skips
            return
        if not any(active):
            self._steps = before.steps
        for name in back & self._skips.keys():
            self._skips = {**self._skips, name: before.skips[name]}
        stays = np.array(active)
        self._outcome = (
            names,
            tuple(name for name in born if name not in back),
            outcome._replace(
                active=stays,
                clipped=None if outcome.clipped is None else outcome.clipped & stays,
                on_devices={i: x for i, x in outcome.on_devices.items() if stays[i]},
            ),
        )

    def _explain(self, error: BaseException, before: "_Outcome | None") -> None:
        """Add a note that says what a step has done that did not end."""
        if self._outcome is before or self._outcome is None:
            # The checks say it in words of their own, or it goes without saying.
            if not isinstance(error, KeyError | TypeError | ValueError):
                error.add_note("multiopt: nothing was changed by this step")
            return
        names, _, outcome = self._outcome
        updated = updated_names(names, outcome)
        error.add_note(f"multiopt: the step was whole; it updated {abridged(updated)}")

    # Plans

    def _plan_of(self, names: list[str]) -> Plan | None:
        """The plan of a list of names; None if one of them was never seen."""
        plan = self._plan
        if plan is not None and plan.names == names:
            return plan
        check_names("params", names)
        plan = self._plans.pop(tuple(names), None)
        self._settle_clocks()
        if plan is not None and plan.is_current():
            plan.resume()
        elif all(name in self._seen for name in names):
            plan = self._made(names, {})
        else:
            return None
        self._keep(plan)
        return plan

    def _made(self, names: list[str], fresh: Mapping[str, Entry]) -> Plan:
        """A new plan, for a step that may still fail."""
        self._settle_clocks()
        # The new one may move slots that the current one knows.
        current, self._plan = self._plan, None
        plan = Plan(names, [fresh[n] if n in fresh else self._seen[n] for n in names])
        if current is not None and current.is_current():
            self._plan = current
        return plan

    def _keep(self, plan: Plan) -> None:
        """Make a plan the current one, and remember it for the next time."""
        self._plan = plan
        self._plans[tuple(plan.names)] = plan
        if len(self._plans) > PLANS:
            del self._plans[next(iter(self._plans))]

    def _take_up(self, plan: Plan, fresh: Mapping[str, Entry], outcome: Outcome) -> None:
        """Register the entries that a new plan began with, but for those that were left alone."""
        active = outcome.active
        stepped = plan.names if active is None else list(compress(plan.names, active))
        plan.settle()
        for name in stepped:
            if name in fresh:
                self._pending.pop(name, None)
        if not self._seen.keys().isdisjoint(fresh):
            # They moved, and other plans know their old slots.
            self._plans.clear()
        self._seen.update((name, fresh[name]) for name in stepped if name in fresh)
        if all(self._seen.get(name) is entry for name, entry in fresh.items()):
            self._keep(plan)
        else:
            self._plan = None

    def _settle_clocks(self) -> None:
        """Bring the clocks of the current plan back to the entries."""
        if self._plan is not None:
            self._plan.settle()

    @property
    def _entries(self) -> dict[str, Entry]:
        """The entries by name, their clocks up to date; to be replaced, never changed."""
        self._settle_clocks()
        return self._seen

    @_entries.setter
    def _entries(self, entries: dict[str, Entry]) -> None:
        self._seen = entries
        self._plan = None
        self._plans = {}

    def _settled(self, name: str, layout: Layout, undo: "_Undo") -> Entry:
        """The entry a step of this parameter starts from; nothing is registered yet.

        Args:
            name: That of the parameter.
            layout: Its layout.
            undo: As for ``_advance``.
        """
        entry = self._seen.get(name)
        if entry is None:
            if self._averages is not None:
                if name not in self._choices:
                    self._average_of(name)
                    undo.append(partial(self._choices.pop, name, None))
                if name in self._averages._pending:
                    # If its average does not fit, nothing is to be changed yet.
                    self._averages._settled(name, layout, undo)
            rule = chosen(self._rule, name, Rule, "rule")
            clip = chosen_clip(self._clip, name)
            if name in self._pending:
                stored = self._pending[name]
                made = restored(name, stored, rule, clip, layout, self._masters)
                # The first step asks them.
                seen = restored_plateaus(rule, stored["rule"], ahead=True)
                undo += [partial(plateau.load_state, before) for plateau, before in seen]
                return made
            return new_entry(name, rule, clip, layout, self._masters)
        old = entry.layout
        if layout.own_shape != old.own_shape:
            raise ValueError(
                f"parameter {name!r} has shape {layout.own_shape}; expected {old.own_shape}, that "
                "of its state: forget the name to start anew"
            )
        if layout.own_dtype != old.own_dtype:
            raise TypeError(
                f"parameter {name!r} has dtype {layout.own_dtype}; expected {old.own_dtype}, that "
                "of its state: forget the name to start anew"
            )
        if layout == entry.layout:
            return entry
        to_host, from_host = named(entry.layout.library).to_host, named(layout.library).from_host

        def moved(slot: Array | None) -> Array | None:
            return None if slot is None else from_host(to_host(slot), layout)

        slots = tuple(map(moved, entry.slots))
        return replace(entry, slots=slots, layout=layout, master=moved(entry.master))

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data: copies, never views.

        Returns:
            ``{"version", "steps", "entries": {name: {"rule", "step", "slots"}}, "pending"}``: the
            rule as a dict of its name, its hyperparameters at that step and its schedules, slots as
            arrays of the parameter's library; under ``"pending"`` likewise, slots as NumPy arrays.
            With averages also ``"averages"`` and ``"pending_averages"``, of the same form. With
            skips also ``"skips"``: by name, how many in all and how many in a row.

        >>> import multiopt as mo
        >>> mo.Optimizer(mo.SGD()).state_dict()
        {'version': 2, 'steps': 0, 'entries': {}, 'pending': {}}
        """
        return self._state_dict(shown=True)

    def _state_dict(self, shown: bool) -> dict[str, Any]:
        """The state: to be shown, with copies, or to be written, with the slots themselves."""
        averages = {}
        if self._averages is not None:
            averages = {AVERAGES[part]: x for part, x in self._averages._stored(shown).items()}
        return {
            "version": checkpoint.VERSION,
            "steps": self.steps,
            **self._stored(shown),
            **averages,
            **(
                {"skips": {n: list(counts) for n, counts in self._skips.items()}}
                if self._skips
                else {}
            ),
        }

    def _stored(self, shown: bool) -> dict[str, Any]:
        entries = self._entries.items()
        if shown:
            return {
                "entries": {n: described(entry, _shown(entry), self.steps) for n, entry in entries},
                "pending": {
                    name: {
                        "rule": deepcopy(stored["rule"]),
                        "step": stored["step"],
                        "slots": {slot: array.copy() for slot, array in stored["slots"].items()},
                    }
                    for name, stored in self._pending.items()
                },
            }
        rules: dict[tuple[int, int], dict[str, Any]] = {}
        for entry in self._seen.values():
            key = id(entry.rule), entry.step
            if key not in rules:
                rules[key] = described_rule(entry.rule, entry.step, self.steps)
        return {
            "entries": {
                name: {
                    "rule": rules[id(entry.rule), entry.step],
                    "step": entry.step,
                    "slots": entry.named_slots(lambda slot: slot),
                    "complex": entry.layout.is_complex,
                }
                for name, entry in entries
            },
            "pending": self._pending,
        }

    @exclusive
    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        names: Iterable[str] | str | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        cast: bool = False,
    ) -> LoadReport:
        """Take over the state of names from a state dict, whole or not at all.

        The state of a name already seen is replaced at once. That of another name waits in
        ``pending`` until its parameter is seen. Names that the state dict does not have stay as
        they are. This optimizer's rules stay; the state dict's are only a description, but for what
        a ``schedules.Plateau`` has seen, which one in the same place takes over.

        Args:
            state_dict: As ``state_dict`` gives it, with arrays of any library, which are copied.
            strict: Whether state that does not fit is an error. If not, it is left out, name by
                name, and the report says why.
            names: The names, or the one name, whose state is wanted, as the state dict has them;
                by default all.
            rename: What to call names here: new ones by old ones, or a callable.
            cast: Whether slots are converted to the dtype that their parameter needs; otherwise
                another dtype does not fit.

        Returns:
            What became of the state of each name.

        Raises:
            KeyError: The state dict has none of a name in ``names`` or ``rename``.
            TypeError: A new name is no string.
            ValueError: The state dict has another form; state does not fit the rule, or the shape
                or the dtype of its parameter, and ``strict`` is true; two names would become one.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.Adam())
        >>> _ = opt.step({"w": np.ones(2), "b": np.ones(1)}, {"w": np.ones(2), "b": np.ones(1)})
        >>> other = mo.Optimizer(mo.Adam())
        >>> report = other.load_state_dict(opt.state_dict(), names=["w"], rename=str.upper)
        >>> report.pending, report.unused
        (('W',), {'b': 'it was not asked for'})
        """
        checkpoint.check_state_dict(state_dict)
        new = renamed(names_of(state_dict), wanted_names(names), rename)
        return self._load(Contents(state_dict), new, Options(strict, cast))

    def _load(self, contents: Contents, new: Mapping[str, str], options: Options) -> LoadReport:
        """Take over what is wanted, under its new names by the old ones."""
        state_dict = contents.state_dict

        def wanted(*parts: str) -> dict[str, Mapping[str, Any]]:
            states = [state for part in parts for state in state_dict.get(part, {}).items()]
            return {new[name]: stored for name, stored in states if name in new}

        loaded = self._loaded(wanted("pending", "entries"), options)
        states = wanted(*AVERAGES.values())
        averages = self._loaded_averages(
            {name: stored for name, stored in states.items() if name not in loaded.refused}, options
        )
        why = {name: f"its average: {reason}" for name, reason in averages.refused.items()}
        why |= loaded.refused
        have = [*names_of(state_dict), *contents.damaged]
        lost = {new[name] for name in contents.damaged} | loaded.refused.keys()
        taken = set(new.values()) - lost
        skips = {name: count for name, count in self._skips.items() if name not in taken}
        for name, counts in state_dict.get("skips", {}).items():
            if new.get(name) in taken:
                skips[new[name]] = Skips(*counts)
        is_part = len(new) < len(have)
        steps = state_dict.get("steps")
        if (is_part and self._steps > 0) or (have and not taken):
            steps = self._steps
        with_averages = averages.entries.keys() | averages.pending.keys()
        without = (loaded.entries.keys() | loaded.pending.keys()) - with_averages
        with uninterrupted():
            # From here on nothing fails.
            self._take_over(loaded, steps, ahead=is_part)
            if self._averages is not None:
                self._averages._drop(without)
                self._averages._take_over(averages, self._steps, ahead=is_part)
            self._skips = skips
        found = {new.get(name, name) for name in have}
        return LoadReport(
            restored=tuple(loaded.entries),
            pending=tuple(loaded.pending),
            unused={**contents.damaged}
            | {name: "it was not asked for" for name in have if name not in new}
            | {old: why[name] for old, name in new.items() if name in why},
            missing=tuple(name for name in self._seen if name not in found),
            metadata=dict(contents.metadata),
        )

    def _loaded(
        self,
        states: Mapping[str, Mapping[str, Any]],
        options: Options,
        known: Mapping[str, Entry] = MappingProxyType({}),
    ) -> "_Loaded":
        """What to take over of loaded state, if it fits.

        Args:
            states: The state by name.
            options: How it is taken over.
            known: Entries that others have of the same parameters.
        """
        loaded = _Loaded({}, {}, [], {})
        for name, stored in states.items():
            try:
                host = stored if options.own else on_host(name, stored)
                stored = {**host, "cast": True} if options.cast else host
                self._admit(name, stored, loaded, known.get(name))
            except ValueError as error:
                if options.strict:
                    raise
                loaded.refused[name] = str(error)
        return loaded

    def _admit(
        self, name: str, stored: Mapping[str, Any], loaded: "_Loaded", known: Entry | None
    ) -> None:
        """Add the state of a name to what is taken over.

        Args:
            name: The name.
            stored: The state.
            loaded: What is taken over.
            known: The entry that another has of the parameter.

        Raises:
            ValueError: It does not fit.
        """
        entry = self._entries.get(name)
        if entry is None and known is not None:
            rule = chosen(self._rule, name, Rule, "rule")
            entry = replace(known, rule=rule, clip=None, slots=(), master=None)
        if entry is not None:
            loaded.entries[name] = restored(
                *(name, stored, entry.rule, entry.clip, entry.layout), self._masters
            )
            loaded.reached.append((entry.rule, stored["rule"]))
            return
        if isinstance(self._rule, Rule):
            check_slot_names(name, stored, self._rule)
            loaded.reached.append((self._rule, stored["rule"]))
        loaded.pending[name] = stored

    def _loaded_averages(
        self, states: Mapping[str, Mapping[str, Any]], options: Options
    ) -> "_Loaded":
        """Likewise of loaded averages."""
        odd = {
            name: "this optimizer keeps none of it"
            for name in states
            if self._averages is None or self._average_of(name) is None
        }
        if odd and options.strict:
            raise ValueError(
                f"the loaded state has averages of {', '.join(map(repr, odd))}; expected none, for "
                "names of which this optimizer keeps none: give it an average"
            )
        if self._averages is None:
            return _Loaded({}, {}, [], odd)
        rest = {name: stored for name, stored in states.items() if name not in odd}
        loaded = self._averages._loaded(rest, options, self._entries)
        return loaded._replace(refused=odd | loaded.refused)

    def _take_over(self, loaded: "_Loaded", steps: int | None, ahead: bool) -> None:
        """Take over loaded state.

        Args:
            loaded: The state.
            steps: How many steps were taken; if unknown, the largest clock.
            ahead: Whether a ``Plateau`` only takes over what is more than it has seen.
        """
        self._entries = {**self._entries, **loaded.entries}
        self._pending = {
            name: stored
            for name, stored in {**self._pending, **loaded.pending}.items()
            if name not in loaded.entries
        }
        for rule, words in loaded.reached:
            restored_plateaus(rule, words, ahead)
        clocks = [entry.step for entry in self._seen.values()]
        clocks += [entry["step"] for entry in self._pending.values()]
        self._steps = max(clocks, default=0) if steps is None else steps

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write the state, pending state included, to a file that any backend can load.

        When it returns, the file is whole and on the disk. A crash at any moment leaves the old
        file or the new one. Nobody may step the optimizer in the meantime.

        Args:
            path: The file; if it exists it is replaced, whole or not at all. By custom it ends in
                ``.safetensors``.
            metadata: What else to keep in the file: a mapping of what JSON can hold. ``load``
                returns it, and ``multiopt show`` prints it.

        Raises:
            OSError: The file cannot be written; the old one is untouched.
            TypeError: The metadata is no mapping.
            ValueError: The metadata or a name is not what JSON can hold, a schedule is nested too
                deep, or there are too many names for one file (some 300 000).
        """
        checkpoint.write(path, self._state_dict(shown=False), metadata)

    @exclusive
    def load(
        self,
        path: str | os.PathLike[str],
        *,
        strict: bool = True,
        names: Iterable[str] | str | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        cast: bool = False,
    ) -> LoadReport:
        """Take over the state in a file, as ``load_state_dict`` does.

        Args:
            path: The file. What is not wanted is not read.
            strict: As for ``load_state_dict``. State with a checksum that is wrong does not fit
                either.
            names: As for ``load_state_dict``.
            rename: As for ``load_state_dict``.
            cast: As for ``load_state_dict``.

        Returns:
            What became of the state of each name, and the metadata of the file.

        Raises:
            CheckpointError: The file is damaged, is not ours or does not fit; nothing has changed.
            KeyError: The file has none of a name in ``names`` or ``rename``.
            OSError: The file cannot be read.
            TypeError: A new name is no string.
            ValueError: Two names would become one.
        """
        wanted = wanted_names(names)
        contents = checkpoint.read(path, wanted)
        new = renamed([*names_of(contents.state_dict), *contents.damaged], wanted, rename)
        if strict:
            contents.check_whole(path)
        try:
            return self._load(contents, new, Options(strict, cast, own=True))
        except ValueError as error:
            raise CheckpointError(f"{os.fsdecode(path)}: {error}") from error


class _Loaded(NamedTuple):
    """Loaded state that fits.

    Attributes:
        entries: The new entries of names that were seen.
        pending: The state of others, which is to wait.
        reached: Rules with the descriptions of the rules that were saved in their place.
        refused: Names whose state does not fit, and why not.
    """

    entries: dict[str, Entry]
    pending: dict[str, Mapping[str, Any]]
    reached: list[tuple[Rule, Mapping[str, Any]]]
    refused: dict[str, str]


#: What takes back what a step has changed.
_Undo: TypeAlias = list[Callable[[], object]]

#: Of a step: its names, which of them were new, and what became of them.
_Outcome: TypeAlias = tuple[list[str], tuple[str, ...], Outcome]


class _Held(NamedTuple):
    """What is held of a name before a step.

    Attributes:
        name: The name.
        entry: The entry that the step changes.
        slots: Its slots.
        master: Its master copy.
        step: Its clock.
        registered: The entry that is registered, which is another one where a parameter moved.
        pending: Its pending state.
    """

    name: str
    entry: Entry
    slots: tuple[Array, ...]
    master: Array | None
    step: int
    registered: Entry | None
    pending: Mapping[str, Any] | None


class _Before(NamedTuple):
    """What it takes to take a step back, for names whose arrays cannot be written.

    Attributes:
        steps: How many steps it had taken.
        outcome: What it had to tell of its last step.
        skips: Its counts of skips.
        held: What it held of each name.
    """

    steps: int
    outcome: _Outcome | None
    skips: dict[str, Skips]
    held: list[_Held]


def _shown(entry: Entry) -> Callable[[Array], Array]:
    """How a slot of an entry is shown."""
    backend = named(entry.layout.library)
    shown = partial(backend.shown, layout=entry.layout)
    if entry.layout.is_complex:
        return lambda slot: backend.whole(shown(slot))
    return shown


def _untraced(advance: "_Advance") -> "_Advance":
    """A way to step out of reach of PyTorch's compiler, which would round otherwise."""
    if advance not in _UNTRACED:
        _UNTRACED[advance] = sys.modules["torch"].compiler.disable(advance)
    return _UNTRACED[advance]


_Advance: TypeAlias = Callable[..., dict[str, Array]]

# A dict: torch's compiler warns of functools.cache.
_UNTRACED: dict[_Advance, _Advance] = {}
