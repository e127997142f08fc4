"""What is known by name, and the steps of it: ``spec/registry.md``."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from itertools import compress
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from multiopt.backend import Array, Layout, Now, backend_of, named, objects
from multiopt.clipping import Clip
from multiopt.entry import (
    Entry,
    check_slot_names,
    chosen,
    chosen_clip,
    described,
    described_rule,
    described_waiting,
    new_entry,
    on_host,
    restored,
    restored_plateaus,
)
from multiopt.inputs import check_gradients, check_names, own_gradient
from multiopt.interruption import uninterrupted
from multiopt.loading import Options
from multiopt.plan import Outcome, Plan
from multiopt.report import abridged, updated_names
from multiopt.rules import Rule
from multiopt.skipping import Skips, counted
from multiopt.step import Step

__all__ = ["Loaded", "Registry", "Undo", "shown"]

#: How many plans are remembered: lists of names that take turns.
PLANS = 8

#: What takes back what a step has changed.
Undo: TypeAlias = list[Callable[[], object]]

#: Of a step: its names, which of them were new, and what became of them.
_Outcome: TypeAlias = tuple[list[str], tuple[str, ...], Outcome]


class Registry:
    """Names with their entries, the state that waits for names, and their steps.

    ``Optimizer`` is one that users see; the averages of its parameters are another.

    Args:
        rule: A rule for all names, or a callable ``name -> rule``.
        clip: A clip for all names, a callable ``name -> Clip or None``, or None.
        on_nonfinite: ``"propagate"``, ``"raise"`` or ``"skip"``.
        max_skips: In how many steps in a row a name may be skipped; None for no limit.
        threads: The largest number of threads, or None.
        masters: Whether 16-bit parameters have master copies.
    """

    __slots__ = (
        "__weakref__",
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
    #: Whether it is an error if no parameter has a gradient of its own, nor will have one.
    _needs_gradients: ClassVar[bool] = False

    def __init__(
        self,
        rule: Rule | Callable[[str], Rule],
        clip: Clip | Callable[[str], Clip | None] | None = None,
        on_nonfinite: str = "propagate",
        max_skips: int | None = None,
        threads: int | None = None,
        masters: bool = False,
    ) -> None:
        """Know no name yet."""
        self._rule = rule
        self._clip = clip
        self._on_nonfinite = on_nonfinite
        self._max_skips = max_skips
        self._threads = threads
        self._masters = masters
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

    def __getstate__(self) -> dict[str, Any]:
        """All but the plans."""
        self._settle_clocks()
        slots = (slot for kind in type(self).__mro__ for slot in getattr(kind, "__slots__", ()))
        names = (*slots, *getattr(self, "__dict__", ()))
        state = {name: getattr(self, name) for name in names if name not in self._anew}
        return {**state, "_steps": self.steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without plans."""
        self._plan, self._plans = None, {}
        self._changing, self._under_way = False, None
        for name, value in state.items():
            setattr(self, name, value)

    # What is held

    @property
    def steps(self) -> int:
        """How many steps it has taken in which anything was updated.

        Schedules count the steps of their parameter instead, but for ``schedules.Shared``.
        """
        under_way = self._under_way
        if self._changing and under_way is not None:
            # A signal handler asks, and the call may have been made.
            plan, first, count = under_way
            if plan.steps[0] != first:
                return count
        return self._steps

    @property
    def _entries(self) -> dict[str, Entry]:
        """The entries by name, their clocks up to date; to be replaced, never changed."""
        self._settle_clocks()
        return self._seen

    @_entries.setter
    def _entries(self, entries: dict[str, Entry]) -> None:
        with uninterrupted():
            self._seen = entries
            self._plan = None
            self._plans = {}

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            why = "its loaded state is pending" if name in self._pending else "it was never stepped"
            raise KeyError(f"no state for parameter {name!r}: {why}")
        return entry

    def _known(self) -> dict[str, None]:
        """The names of which anything is held."""
        return dict.fromkeys([*self._entries, *self._pending, *self._skips])

    def _drop(self, names: Collection[str]) -> None:
        """Forget names; nothing comes between."""
        self._entries = {n: entry for n, entry in self._entries.items() if n not in names}
        self._pending = {n: entry for n, entry in self._pending.items() if n not in names}
        self._skips = {n: count for n, count in self._skips.items() if n not in names}

    def _move(self, names: Mapping[str, str]) -> None:
        """Give names new names; nothing comes between."""
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}
        self._pending = {names.get(name, name): entry for name, entry in self._pending.items()}
        self._skips = {names.get(name, name): count for name, count in self._skips.items()}

    # The step

    def _advance(
        self,
        names: list[str],
        params: np.ndarray,
        grads: np.ndarray | None,
        undo: Undo,
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
            if own and self._needs_gradients:
                check_gradients(names, params, grads)
            # Overflow and NaN are values here; np.seterr(all="raise") must not tear a step apart.
            with np.errstate(all="ignore"):
                return self._take(plan, params, grads, undo, held, own=own, leaves=leaves, now=now)
        if own and self._needs_gradients:
            check_gradients(names, params, grads)
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
        undo: Undo,
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
        before: Undo = []
        if step.replaced:
            before = [partial(self._take_back, self._before(plan, fresh, step.replaced))]
        replaced = {names[i]: array for i, array in step.replaced.items()}
        if held is not None:
            held.enter_context(uninterrupted())
        with uninterrupted() if held is None else nullcontext():
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

    def _explain(self, error: BaseException, before: _Outcome | None) -> None:
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

    def _settled(self, name: str, layout: Layout, undo: Undo) -> Entry:
        """The entry a step of this parameter starts from; nothing is registered yet.

        Args:
            name: That of the parameter.
            layout: Its layout.
            undo: As for ``_advance``.
        """
        entry = self._seen.get(name)
        if entry is None:
            self._meet(name, layout, undo)
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

    def _meet(self, name: str, layout: Layout, undo: Undo) -> None:
        """For those who keep more of a name that is seen for the first time; here nothing."""

    # State

    def _stored(self, copied: bool) -> dict[str, Any]:
        entries = self._entries.items()
        if copied:
            return {
                "entries": {n: described(entry, shown(entry), self.steps) for n, entry in entries},
                "pending": {n: described_waiting(stored) for n, stored in self._pending.items()},
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

    def _loaded(
        self,
        states: Mapping[str, Mapping[str, Any]],
        options: Options,
        known: Mapping[str, Entry] = MappingProxyType({}),
    ) -> "Loaded":
        """What to take over of loaded state, if it fits.

        Args:
            states: The state by name.
            options: How it is taken over.
            known: Entries that others have of the same parameters.
        """
        loaded = Loaded({}, {}, [], {})
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
        self, name: str, stored: Mapping[str, Any], loaded: "Loaded", known: Entry | None
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

    def _take_over(self, loaded: "Loaded", steps: int | None, ahead: bool) -> None:
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


class Loaded(NamedTuple):
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


def shown(entry: Entry) -> Callable[[Array], Array]:
    """How a slot of an entry is shown."""
    backend = named(entry.layout.library)
    shown = partial(backend.shown, layout=entry.layout)
    if entry.layout.is_complex:
        return lambda slot: backend.whole(shown(slot))
    return shown
