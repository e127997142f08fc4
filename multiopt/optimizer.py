"""The registry: names to rules, clocks and slots, and the step: ``spec/registry.md``."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from multiopt import checkpoint
from multiopt.backend import Array, Layout, Task, backend_of, by_backend, named
from multiopt.clipping import Clip, clip_by_norms
from multiopt.entry import (
    Entry,
    check_clip,
    check_rule,
    check_slot_names,
    chosen,
    chosen_clip,
    described,
    new_entry,
    on_host,
    restored,
    with_rule,
)
from multiopt.errors import CheckpointError
from multiopt.inputs import check_no_shared_memory, checked_gradient, named_arrays, paired
from multiopt.rules import Rule
from multiopt.rules.arithmetic import rounded

__all__ = ["Optimizer", "Report", "State"]


class State(NamedTuple):
    """A snapshot of the state of one parameter.

    Attributes:
        step: How many steps it has taken.
        slots: The rule's arrays by name, copies, of the parameter's shape and library; float32
            for a 16-bit parameter.
    """

    step: int
    slots: dict[str, Array]


@dataclass(frozen=True)
class Report:
    """What the last step did.

    Attributes:
        new: Names seen for the first time.
        updated: Names that were updated, the new ones among them.
        skipped: Names left alone because their gradient was not finite.
        norms: Norm of the gradient, before clipping, of each name with ``Clip(norm=...)``.
        global_norms: Global norm, before clipping by it, of each ``Clip(global_norm=...)``.
    """

    new: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    norms: Mapping[str, float] = field(default_factory=dict)
    global_norms: Mapping[Clip, float] = field(default_factory=dict)
    _limited: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def clipped(self) -> tuple[str, ...]:
        """Names whose gradient a clip changed; a value clip on a device is fetched when read."""
        return tuple(name for name, limited in self._limited.items() if bool(limited))


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
            every norm, their clocks stand still; the others step.

    Attributes:
        last: A ``Report`` of the last step.

    Raises:
        TypeError: ``rule`` or ``clip`` is of another kind.
        ValueError: ``on_nonfinite`` is none of the three.

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
        "_clip",
        "_entries",
        "_on_nonfinite",
        "_pending",
        "_rule",
        "last",
    )

    def __init__(
        self,
        rule: Rule | Callable[[str], Rule],
        clip: Clip | Callable[[str], Clip | None] | None = None,
        *,
        on_nonfinite: Literal["propagate", "raise", "skip"] = "propagate",
    ) -> None:
        """Make an optimizer that has seen no parameter yet."""
        check_rule(rule)
        check_clip(clip)
        if on_nonfinite not in ("propagate", "raise", "skip"):
            raise ValueError(
                f"on_nonfinite must be 'propagate', 'raise' or 'skip'; got {on_nonfinite!r}"
            )
        self._rule = rule
        self._clip = clip
        self._on_nonfinite = on_nonfinite
        self._entries: dict[str, Entry] = {}
        # Loaded state of names not seen yet, as a state dict has it, the slots NumPy arrays.
        self._pending: dict[str, dict[str, Any]] = {}
        self.last = Report()

    # Looking

    @property
    def names(self) -> tuple[str, ...]:
        """The names seen so far, oldest first."""
        return tuple(self._entries)

    @property
    def pending(self) -> tuple[str, ...]:
        """The names whose loaded state waits for the parameter."""
        return tuple(self._pending)

    def state(self, name: str) -> State:
        """A snapshot of a parameter's clock and slots.

        Raises:
            KeyError: The name has not been seen.
        """
        entry = self._entries.get(name)
        if entry is None:
            why = "its loaded state is pending" if name in self._pending else "it was never stepped"
            raise KeyError(f"no state for parameter {name!r}: {why}")
        return State(entry.step, entry.named_slots(named(entry.layout.library).copied))

    def __len__(self) -> int:
        """The number of names seen."""
        return len(self._entries)

    def __bool__(self) -> bool:
        """True, also before the first step."""
        return True

    def __copy__(self) -> "Optimizer":
        """A deep copy: two optimizers never share state."""
        return deepcopy(self)

    def __contains__(self, name: object) -> bool:
        """Whether a name has been seen."""
        return name in self._entries

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
    def rule(self, rule: Rule | Callable[[str], Rule]) -> None:
        check_rule(rule)
        self._entries = {
            name: with_rule(entry, chosen(rule, name, Rule, "rule"))
            for name, entry in self._entries.items()
        }
        self._rule = rule

    @property
    def clip(self) -> Clip | Callable[[str], Clip | None] | None:
        """The clip for all names, the callable ``name -> Clip or None``, or None.

        Assigning changes the clip of all names.
        """
        return self._clip

    @clip.setter
    def clip(self, clip: Clip | Callable[[str], Clip | None] | None) -> None:
        check_clip(clip)
        self._entries = {
            name: replace(entry, clip=chosen_clip(clip, name))
            for name, entry in self._entries.items()
        }
        self._clip = clip

    def forget(self, name: str) -> None:
        """Drop a name with its state, seen or pending; seen again, it starts anew.

        Raises:
            KeyError: The name is neither seen nor pending.
        """
        if name not in self._entries and name not in self._pending:
            raise KeyError(f"cannot forget parameter {name!r}: it is neither seen nor pending")
        self._entries.pop(name, None)
        self._pending.pop(name, None)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give names, seen or pending, new names; state, rule and clip go along.

        Args:
            names: Old names to new ones. Names may be swapped.

        Raises:
            KeyError: An old name is neither seen nor pending.
            ValueError: Two names would become one.
            TypeError: A new name is no string.
        """
        known = dict.fromkeys([*self._entries, *self._pending])
        for old, new in names.items():
            if old not in known:
                raise KeyError(f"cannot rename parameter {old!r}: it is neither seen nor pending")
            if not isinstance(new, str):
                raise TypeError(f"cannot rename parameter {old!r} to {new!r}: expected a string")
        renamed = Counter(names.get(name, name) for name in known)
        for new in names.values():
            if renamed[new] > 1:
                raise ValueError(f"cannot rename: two parameters would be called {new!r}")
        self._entries = {names.get(name, name): entry for name, entry in self._entries.items()}
        self._pending = {names.get(name, name): entry for name, entry in self._pending.items()}

    # The step

    def step(
        self, params: Mapping[str, Array], grads: Mapping[str, Array | None] | None = None
    ) -> dict[str, Array]:
        """Update the parameters that have a gradient.

        NumPy arrays and torch tensors are updated in place and returned as the same objects; for
        arrays that cannot be written, JAX's for one, new ones are returned. The gradients are
        never written. A name without a gradient (missing or None) is left alone, and its clock
        stands still. Everything is checked and computed before anything is changed.

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
        # Overflow and NaN are values here; np.seterr(all="raise") must not tear a step in half.
        with np.errstate(all="ignore"):
            params = named_arrays("params", params)
            return self._step(params, paired(params, grads))

    def _step(
        self, params: Mapping[str, Array], pairs: list[tuple[str, Array, Array]]
    ) -> dict[str, Array]:
        entries: dict[str, Entry] = {}
        tasks: list[Task] = []
        for name, param, grad in pairs:
            backend = backend_of(param, f"parameter {name!r}")
            layout = backend.layout(param, f"parameter {name!r}")
            grad = checked_gradient(name, grad, layout)
            entries[name] = entry = self._settled(name, layout)
            tasks.append(
                Task(name, backend, param, grad, layout, entry.slots, entry.rule.update, None)
            )
        skipped = self._nonfinite(tasks)
        tasks = [task for task in tasks if task.name not in skipped]
        _set_scalars(tasks, entries)
        # Last, when no code of the caller's own will run any more.
        for task in tasks:
            task.backend.check_writable(task.param, f"parameter {task.name!r}")
        check_no_shared_memory(tasks)
        norms, global_norms = clip_by_norms(tasks, [entries[task.name].clip for task in tasks])
        limited = {}
        for task in tasks:
            clip = entries[task.name].clip
            if clip is not None:
                limited[task.name] = any(scale != 1 for scale in task.scales)
                if clip.value is not None:
                    task.bound = rounded(clip.value, task.layout.compute_dtype)

        done = [
            (task, result)
            for backend, group in by_backend(tasks)
            for task, result in zip(group, backend.run(group), strict=True)
        ]
        # From here on nothing fails: the step is whole.
        written = {}
        new = tuple(task.name for task in tasks if task.name not in self._entries)
        for task, result in done:
            entry = entries[task.name]
            written[task.name] = task.backend.write(task, result.param)
            self._entries[task.name] = replace(entry, step=entry.step + 1, slots=result.slots)
            self._pending.pop(task.name, None)
            if task.name in limited:
                limited[task.name] = limited[task.name] or result.limited
                self._after_clipping(task, result.grad)
        updated = tuple(task.name for task in tasks)
        self.last = Report(new, updated, skipped, norms, global_norms, limited)
        return {name: written.get(name, param) for name, param in params.items()}

    def _after_clipping(self, task: Task, grad: Array) -> None:
        """For hosts that expect to find the clipped gradient; here nothing."""

    def _settled(self, name: str, layout: Layout) -> Entry:
        """The entry a step of this parameter starts from; nothing is registered yet."""
        entry = self._entries.get(name)
        if entry is None:
            rule = chosen(self._rule, name, Rule, "rule")
            clip = chosen_clip(self._clip, name)
            if name in self._pending:
                return restored(name, self._pending[name], rule, clip, layout)
            return new_entry(rule, clip, layout)
        if layout.shape != entry.layout.shape:
            raise ValueError(
                f"parameter {name!r} has shape {layout.shape}; expected {entry.layout.shape}, that "
                "of its state: forget the name to start anew"
            )
        if layout.dtype != entry.layout.dtype:
            raise TypeError(
                f"parameter {name!r} has dtype {layout.dtype}; expected {entry.layout.dtype}, that "
                "of its state: forget the name to start anew"
            )
        if layout == entry.layout:
            return entry
        host = [named(entry.layout.library).to_host(slot) for slot in entry.slots]
        slots = tuple(named(layout.library).from_host(array, layout) for array in host)
        return replace(entry, slots=slots, layout=layout)

    def _nonfinite(self, tasks: list[Task]) -> tuple[str, ...]:
        """The names to skip, by the policy for gradients that are not finite."""
        if self._on_nonfinite == "propagate":
            return ()
        bad = {
            task.name
            for backend, group in by_backend(tasks)
            for task, finite in zip(group, backend.finite(group), strict=True)
            if not finite
        }
        names = tuple(task.name for task in tasks if task.name in bad)
        if names and self._on_nonfinite == "raise":
            raise ValueError(
                f"the gradient of {', '.join(map(repr, names))} has infinities or NaNs; expected "
                "finite numbers, as on_nonfinite='raise' asks: nothing was changed"
            )
        return names

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data: copies, never views.

        Returns:
            ``{"version", "entries": {name: {"rule", "step", "slots"}}, "pending": {...}}``: the
            rule as a dict of its name and its hyperparameters at that step, slots as arrays of the
            parameter's library; under ``"pending"`` likewise, slots as NumPy arrays.

        >>> import multiopt as mo
        >>> mo.Optimizer(mo.SGD()).state_dict()
        {'version': 1, 'entries': {}, 'pending': {}}
        """
        return self._state_dict(lambda entry: named(entry.layout.library).copied)

    def _state_dict(self, convert: Callable[[Entry], Callable[[Array], Array]]) -> dict[str, Any]:
        return {
            "version": checkpoint.VERSION,
            "entries": {
                name: described(entry, convert(entry)) for name, entry in self._entries.items()
            },
            "pending": {
                name: {
                    "rule": deepcopy(entry["rule"]),
                    "step": entry["step"],
                    "slots": {slot: array.copy() for slot, array in entry["slots"].items()},
                }
                for name, entry in self._pending.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the state of names from a state dict, whole or not at all.

        The state of a name already seen is replaced at once. That of another name waits in
        ``pending`` until its parameter is seen. Names that the state dict does not have stay as
        they are. This optimizer's rules stay; the state dict's are only a description.

        Args:
            state_dict: As ``state_dict`` gives it, with arrays of any library, which are copied.

        Raises:
            ValueError: It has another form, or a slot that does not fit the rule, the shape or the
                dtype of its parameter.
        """
        checkpoint.check_state_dict(state_dict)
        entries, pending = {}, {}
        for name, stored in {**state_dict["pending"], **state_dict["entries"]}.items():
            host = on_host(name, stored)
            entry = self._entries.get(name)
            if entry is not None:
                entries[name] = restored(name, host, entry.rule, entry.clip, entry.layout)
            else:
                if isinstance(self._rule, Rule):
                    check_slot_names(name, host, self._rule)
                pending[name] = host
        self._entries.update(entries)
        self._pending.update(pending)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state, pending state included, to a file that any backend can load.

        Args:
            path: The file; if it exists it is replaced, whole or not at all. By custom it ends in
                ``.safetensors``.

        Raises:
            OSError: The file cannot be written.
        """
        checkpoint.write(path, self._state_dict(lambda entry: named(entry.layout.library).to_host))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the state in a file, as ``load_state_dict`` does.

        Raises:
            CheckpointError: The file is damaged, is not ours or does not fit; nothing has changed.
            OSError: The file cannot be read.
        """
        state_dict = checkpoint.read(path)
        try:
            self.load_state_dict(state_dict)
        except ValueError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from error


def _set_scalars(tasks: list[Task], entries: Mapping[str, Entry]) -> None:
    """Give each task the numbers of its step; names alike share one computation."""
    known: dict[tuple[int, int, str], Any] = {}
    for task in tasks:
        entry = entries[task.name]
        key = id(entry.rule), entry.step, task.layout.compute_dtype
        if key not in known:
            try:
                known[key] = entry.rule.coefficients(entry.step + 1, task.layout.compute_dtype)
            except ValueError as error:
                raise ValueError(f"parameter {task.name!r}: {error}") from error
        task.scalars = known[key]
