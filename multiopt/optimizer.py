"""The optimizer that users call; ``spec/registry.md`` states what they can rely on.

``Optimizer`` checks what it is given and puts it into words: the registry keeps the state, and
``multiopt.state`` saves and loads it. Every method that changes anything goes through the guard,
so that a change is never interrupted or interleaved with another.

>>> import numpy as np, multiopt as mo
>>> opt = mo.Optimizer(mo.SGD(lr=0.5))
>>> opt.step({"w": np.zeros(2)}, {"w": np.ones(2)})
{'w': array([-0.5, -0.5])}
>>> opt.names, opt.steps
(('w',), 1)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any, Literal, NamedTuple

import numpy as np

from multiopt.arrays import Array
from multiopt.entry import check_average, check_clip, check_rule
from multiopt.errors import CheckpointError, brief
from multiopt.guard import Guard, exclusive, mending
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.rules.average import Average
from multiopt.state.file import read
from multiopt.state.file_objects import Source, Target, label
from multiopt.state.fit import SHOWN_AVERAGE
from multiopt.state.loading import load
from multiopt.state.params import tables_of
from multiopt.state.plain_data import check_state_dict, contents_of, shown, state_dict
from multiopt.state.plateaus import pending_now, warn_of_left_behind
from multiopt.state.record import plain
from multiopt.state.renaming import renamed, wanted_names
from multiopt.state.report import LoadReport
from multiopt.state.settings import described_settings, warn_of_lost
from multiopt.state.tables import held, waiting
from multiopt.state.writing import write
from multiopt.step.checks import as_dict, gradients_of
from multiopt.step.clip import Clip
from multiopt.step.report import Report, explain
from multiopt.step.skips import Skips, check_limit
from multiopt.untraced import untraced

__all__ = ["Optimizer", "State"]


class State(NamedTuple):
    """A snapshot of the state of one parameter.

    Attributes:
        step: How many steps the parameter has taken.
        slots: Copies of the rule's arrays by name, in the parameter's library; float32 for a 16-bit
            parameter.
    """

    step: int
    slots: dict[str, Array]


class Optimizer:
    """Optimizes named parameters that may appear at any time, on any array library.

    Args:
        rule: A rule for all names, or a callable ``name -> rule``, called once for each name, at
            first sight.
        clip: A clip for all names, or a callable ``name -> Clip or None``, called once for each
            name as well; None for no clipping.
        on_nonfinite: What a step does about a gradient with an infinity or a NaN, before clipping.
            ``"propagate"``: it uses the gradient. ``"raise"``: it raises ``ValueError``, and
            nothing has changed. ``"skip"``: it leaves those names alone, counts them in ``skips``,
            and updates the others; their clocks stand still, and no norm includes them.
        max_consecutive_skips: With ``"skip"``, how many steps in a row may skip a name. The next
            one raises ``ValueError``, and nothing has changed. None for no limit.
        threads: The largest number of threads for large parameters on the CPU. The default, which
            is also the most, is what torch uses if it is loaded, otherwise the number of cores that
            the process may run on; the environment variable ``MULTIOPT_NUM_THREADS`` bounds both.
        master_weights: Keep a float32 copy of each float16 and bfloat16 parameter, and round the
            parameter from it at every step, so that changes too small for 16 bits add up. The copy
            is the slot ``master_param``, takes 4 bytes an element and is saved with the others. If
            somebody else changes the parameter, its new value counts.
        average: An average to keep of every parameter, or a callable ``name -> Average or None``,
            called once for each name; None for none. ``average(name)`` reads it.
        in_place: Whether a step writes the arrays that it is given, where their library can. If
            not, it returns a new array for each parameter that it updates and leaves the old one
            untouched, so read-only arrays, views, and one array under several names are parameters
            like any other. A new tensor is a leaf with the ``requires_grad`` of the old one.

    Raises:
        TypeError: ``rule``, ``clip`` or ``average`` is neither of its class nor a callable.
        ValueError: ``on_nonfinite`` is none of the three, ``threads`` or ``max_consecutive_skips``
            is not an integer >= 1, or there is a limit on skips but nothing is skipped.

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
    __slots__ = ("__weakref__", "_guard", "_registry")

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
        in_place: bool = True,
    ) -> None:
        """Create an optimizer that has not seen any parameter yet."""
        check_rule(rule)
        check_clip(clip)
        check_average(average)
        if on_nonfinite not in ("propagate", "raise", "skip"):
            raise ValueError(
                f"on_nonfinite must be 'propagate', 'raise' or 'skip'; got {brief(on_nonfinite)}"
            )
        if threads is not None and not (type(threads) is int and threads >= 1):
            raise ValueError(f"threads must be an integer >= 1 or None; got {brief(threads)}")
        check_limit(max_consecutive_skips, on_nonfinite)
        self._guard = Guard()
        self._registry = Registry(
            *(rule, clip, on_nonfinite, max_consecutive_skips, threads, master_weights),
            guard=self._guard,
            average=average,
        )
        self._registry.needs_gradients = True
        self._registry.in_place = in_place

    def __getstate__(self) -> dict[str, Any]:
        """Return everything except the guard."""
        self._guard.check_whole("copy")
        return {"_registry": self._registry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, with a new guard."""
        self._registry = state["_registry"]
        self._guard = self._registry.guard

    # Looking

    @property
    def last(self) -> Report:
        """What the last step did."""
        outcome = self._registry.outcome
        return Report() if outcome is None else outcome.report()

    @property
    def names(self) -> tuple[str, ...]:
        """The names seen so far, oldest first."""
        return self._registry.names

    @property
    def pending(self) -> tuple[str, ...]:
        """The names whose loaded state waits for the parameter."""
        return tuple(self._registry.pending)

    @property
    def skips(self) -> dict[str, Skips]:
        """How often each name was skipped; names that never were are left out.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.SGD(), on_nonfinite="skip", max_consecutive_skips=5)
        >>> _ = opt.step({"w": np.ones(2)}, {"w": np.array([1.0, np.nan])})
        >>> opt.skips
        {'w': Skips(total=1, consecutive=1)}
        """
        return dict(self._registry.skips)

    def state(self, name: str) -> State:
        """Return a snapshot of a parameter's clock and slots, also if its loaded state is pending.

        Pending slots are arrays of the library in which they came; NumPy arrays if they came from
        a file.

        Raises:
            KeyError: The name is neither seen nor pending.
        """
        self._guard.check_whole("state")
        known = self._registry
        if name in known.pending:
            saved, _ = plain(known.pending[name])
            return State(saved["step"], saved["slots"])
        entry = known.entry(name)
        return State(entry.step, entry.converted(shown(entry.layout)))

    def hyperparameters(self, name: str) -> dict[str, Any]:
        """Return the hyperparameters that a parameter's next step will use, schedules as numbers.

        For a name whose loaded state is pending, these are the ones that it would start with: a
        callable rule is asked for it, as at first sight.

        Raises:
            KeyError: The name is neither seen nor pending.
            ValueError: A schedule does not return a number, or returns one out of range.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.SGD(lr=mo.schedules.Linear(0.0, 1.0, steps=4)))
        >>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
        >>> opt.hyperparameters("w")["lr"]
        0.25
        """
        known = self._registry
        if name in known.pending:
            rule, step = known.rule_for(name), known.pending[name].step
        else:
            entry = known.entry(name)
            rule, step = entry.rule, entry.step
        try:
            now = rule.at(step + 1, self.steps + 1)
        except ValueError as error:
            raise ValueError(f"parameter {name!r}: {error}") from error
        return {f.name: getattr(now, f.name) for f in fields(now)}

    def average(self, name: str) -> Array:
        """Return the average of a parameter, also if its loaded state is pending.

        Returns:
            A copy, float32 for a 16-bit parameter, of the library that ``state`` has slots in.

        Raises:
            KeyError: No average is kept, or the parameter has not been stepped yet.
        """
        self._guard.check_whole("average")
        known = self._registry
        if name in known.pending:
            _, entry = plain(known.pending[name])
            if entry is not None and entry["step"]:
                return entry["slots"][SHOWN_AVERAGE]
        elif name in known:
            mean = known.entry(name).average
            if mean is not None and mean.step:
                return shown(mean.layout)(mean.slots[SHOWN_AVERAGE])
        raise KeyError(f"no average of parameter {name!r}: none is kept")

    @property
    def steps(self) -> int:
        """How many steps it has taken in which anything was updated.

        Schedules count the steps of their parameter instead, except for ``schedules.Shared``.
        """
        return self._registry.steps

    def __len__(self) -> int:
        """The number of names seen."""
        return len(self._registry)

    def __bool__(self) -> bool:
        """True, also before the first step."""
        return True

    def __copy__(self) -> "Optimizer":
        """A deep copy: two optimizers never share state."""
        return deepcopy(self)

    def __contains__(self, name: object) -> bool:
        """Whether a name has been seen."""
        return name in self._registry

    def __iter__(self) -> Iterator[str]:
        """The names seen so far, oldest first."""
        return iter(self.names)

    def __repr__(self) -> str:
        """The rule, the clip and how many names there are."""
        known = self._registry
        parts = [repr(known.rule)]
        if known.clip is not None:
            parts.append(f"clip={known.clip!r}")
        if known.on_nonfinite != "propagate":
            parts.append(f"on_nonfinite={known.on_nonfinite!r}")
        if not known.in_place:
            parts.append("in_place=False")
        pending = f", {len(known.pending)} pending" if known.pending else ""
        return f"<Optimizer({', '.join(parts)}): {len(self)} names{pending}>"

    # Changing

    @property
    def rule(self) -> Rule | Callable[[str], Rule]:
        """The rule for all names, or the callable ``name -> rule``.

        Assigning changes the rule of all names. Slots that both rules have are kept; others start
        at zero. Clocks go on, but if the new rule has slots and none of them is kept, the clock
        starts again with them, because bias corrections belong to the steps that slots have seen.
        """
        return self._registry.rule

    @rule.setter
    @exclusive
    def rule(self, rule: Rule | Callable[[str], Rule]) -> None:
        check_rule(rule)
        self._registry.set_rules(rule)

    @exclusive
    def set_hyperparameters(self, names: Iterable[str] | str | None = None, **values: Any) -> None:
        """Change some hyperparameters, for all the names or for none.

        Slots and clocks are kept. A value that changes which slots there are has the effect of
        assigning a rule with it to ``rule``. What is set is part of the state: a checkpoint has it,
        and a load brings it back over the rule of the constructor. Assigning ``rule`` ends that.

        Args:
            names: The names, seen or pending, or one name; by default all, and those still to come.
            **values: The hyperparameters with their new values: numbers, or schedules.

        Raises:
            KeyError: A name is neither seen nor pending.
            TypeError: The rule of a name has no such hyperparameter.
            ValueError: A value is out of range, or the pending state of a name does not fit a rule
                with it.

        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.Adam(lr=0.5))
        >>> _ = opt.step({"w": np.ones(2)}, {"w": np.ones(2)})
        >>> opt.set_hyperparameters(lr=0.25)
        >>> opt.rule.lr, opt.hyperparameters("w")["lr"], opt.state("w").step
        (0.25, 0.25, 1)
        """
        labels, known = wanted_names(names), self._registry
        for name in labels or ():
            if name not in known.pending:
                known.row_of(name)
        known.set_numbers(labels, values)

    @property
    def clip(self) -> Clip | Callable[[str], Clip | None] | None:
        """The clip for all names, the callable ``name -> Clip or None``, or None.

        Assigning changes the clip of all names.
        """
        return self._registry.clip

    @clip.setter
    @exclusive
    def clip(self, clip: Clip | Callable[[str], Clip | None] | None) -> None:
        check_clip(clip)
        self._registry.set_clips(clip)

    @exclusive
    def forget(self, name: str) -> None:
        """Drop a name with its state, seen or pending, and its skips. Seen again, it starts over.

        Raises:
            KeyError: The name is neither seen nor pending, and was never skipped.
        """
        if name not in self._registry.known():
            raise KeyError(f"cannot forget parameter {name!r}: it is neither seen nor pending")
        self._registry.forget([name])

    @exclusive
    def rename(self, names: Mapping[str, str]) -> None:
        """Rename names, seen or pending, together with their state, rule, clip and skips.

        Args:
            names: Old names to new ones. Names may be swapped.

        Raises:
            KeyError: An old name is neither seen nor pending, and was never skipped.
            ValueError: Two names would become one.
            TypeError: A new name is not a string, or ``names`` not a mapping.
        """
        if not isinstance(names, Mapping):
            raise TypeError(f"expected a mapping of old names to new ones; got {brief(names)}")
        names = dict(names)
        known = self._registry.known()
        for old, new in names.items():
            if old not in known:
                raise KeyError(f"cannot rename parameter {old!r}: it is neither seen nor pending")
            if not isinstance(new, str):
                raise TypeError(
                    f"cannot rename parameter {old!r} to {brief(new)}: expected a string"
                )
        renamed = Counter(names.get(name, name) for name in known)
        for new in names.values():
            if renamed[new] > 1:
                raise ValueError(f"cannot rename: two parameters would be called {new!r}")
        self._registry.rename(names)

    # The step

    def step(
        self, params: Mapping[str, Array], grads: Mapping[str, Array | None] | None = None
    ) -> dict[str, Array]:
        """Update the parameters that have a gradient.

        NumPy arrays and torch tensors are updated in place and returned as the same objects, so a
        copy of the dict is no snapshot; for arrays that cannot be written, JAX's for one, and with
        ``in_place=False`` for all, new ones are returned. The gradients are never written. A name
        without a gradient (missing or None) is left alone, and its clock stands still. Everything
        is checked and made before anything is changed.

        Ctrl-C waits until a step that has begun to write has ended; a note of the
        ``KeyboardInterrupt`` says whether it did.

        Args:
            params: Arrays by name: float16, bfloat16, float32, float64, complex64 or complex128, of
                any mix of libraries, devices and shapes.
            grads: Gradients by name, each of its parameter's library, shape, dtype and device. If
                left out, they are read from the ``.grad`` of the parameters (torch).

        Returns:
            The up-to-date parameters, in the order of ``params``.

        Raises:
            KeyError: A gradient has no parameter.
            ValueError: A shape does not fit; a parameter cannot be written; two parameters share
                memory; pending state does not fit; a schedule left its range; a gradient is not
                finite and ``on_nonfinite`` is ``"raise"``.
            TypeError: Something is not a usable array: a scalar, a list, one of another dtype, a
                gradient of another dtype or device than its parameter's, a tracer; there are no
                gradients to read; or a CUDA graph is being captured.
            RuntimeError: A signal handler, a schedule, a callable or another thread calls it in the
                middle of a step or another change of this optimizer.
        """
        guard, known = self._guard, self._registry
        guard.check("step")
        before = known.outcome
        try:
            # As ``exclusive`` does, in 0.1 us less.
            guard.busy = True
            params = as_dict("params", params)
            count, gradients = len(params), None
            if grads is not None:
                if type(grads) is not dict:
                    grads = as_dict("grads", grads)
                gradients = gradients_of(params, grads)
            arrays = np.fromiter(params.values(), object, count)
            names = list(params)
            replaced = untraced(Registry.step)(known, names, arrays, gradients)
            if replaced:
                params.update((names[place], array) for place, array in replaced.items())
            guard.busy = False
            return params
        except BaseException as error:
            guard.busy = False
            explain(error, before, known.outcome, guard.torn)
            raise

    # State

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data: copies, never views.

        Returns:
            ``{"version", "steps", "entries": {name: {"rule", "step", "slots"}}, "pending"}``: the
            rule as a dict of its name, its hyperparameters at that step and its schedules, slots as
            arrays of the parameter's library; under ``"pending"`` likewise, slots as arrays of the
            library in which they came, NumPy arrays if they came from a file. With averages also
            ``"averages"`` and ``"pending_averages"``, of the same form. With skips also
            ``"skips"``: by name, how many in all and how many in a row. If hyperparameters were
            set also ``"settings"``: those for all names, those by name, and their schedules.

        >>> import multiopt as mo
        >>> mo.Optimizer(mo.SGD()).state_dict()
        {'version': 4, 'steps': 0, 'entries': {}, 'pending': {}}
        """
        self._guard.check_whole("state_dict")
        warn_of_left_behind(self._registry)
        return state_dict(self._registry)

    @mending
    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        names: Iterable[str] | str | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        cast: bool = False,
        settings: bool = True,
    ) -> LoadReport:
        """Take over the state of names from a state dict, whole or not at all.

        The state of a name already seen is replaced at once. That of another name waits in
        ``pending`` until its parameter is seen. Names that the state dict does not have stay as
        they are. This optimizer's rules stay; the state dict's are only a description, except for
        what a ``schedules.Plateau`` has seen, which one in the same place takes over, and for what
        ``set_hyperparameters`` had set, which is set here again. The report says what differs.

        Args:
            state_dict: As ``state_dict`` gives it, with arrays of any library, which are copied.
            strict: Whether state that does not fit is an error. If not, it is left out, name by
                name, and the report says why.
            names: The names, or the one name, whose state is wanted, as the state dict has them;
                by default all.
            rename: What to call names here: new ones by old ones, or a callable.
            cast: Whether slots are converted to the dtype that their parameter needs; otherwise
                another dtype does not fit.
            settings: Whether what ``set_hyperparameters`` had set is set here again.

        Returns:
            What became of the state of each name.

        Raises:
            KeyError: The state dict has none of a name in ``names`` or ``rename``.
            TypeError: A new name is not a string.
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
        check_state_dict(state_dict)
        wanted = wanted_names(names)
        contents = contents_of(state_dict, wanted, strict)
        new = renamed(contents.names, wanted, rename)
        return load(self._registry, contents, new, strict, cast, settings)

    def save(
        self,
        path: Target,
        metadata: Mapping[str, Any] | None = None,
        *,
        params: Mapping[str, Array] | None = None,
    ) -> None:
        """Write the state, pending state included, to a file that any backend can load.

        When it returns, the file is whole and on the disk. A crash at any moment leaves the old
        file or the new one. Nobody may step the optimizer in the meantime.

        Args:
            path: The file; if it exists it is replaced, whole or not at all. By custom it ends in
                ``.safetensors``. Or a binary file object, such as an ``io.BytesIO`` or what
                ``gzip.open`` gives: all bytes are handed over to its ``write``, in order, and what
                becomes of them is its affair; it is neither flushed nor closed.
            metadata: What else to keep in the file: a mapping of what JSON can hold, numbers that
                are not finite, and NumPy's numbers, which come back as Python's. ``load`` returns
                it, and ``multiopt show`` prints it.
            params: The parameters of the same moment, by name, to be kept in the file: arrays as
                ``step`` takes them, with or without state.

        Raises:
            OSError: The file cannot be written; the old one is untouched.
            TypeError: The metadata is not a mapping, a parameter is not a usable array or has
                another dtype than its state, or ``path`` is neither a path nor a binary file
                object.
            ValueError: The metadata or a name is not what JSON can hold, a parameter has another
                shape than its state, a schedule is nested too deep, or there are too many names for
                one file (2 500 000; some 300 000 of different shapes).

        >>> import io
        >>> import numpy as np, multiopt as mo
        >>> opt = mo.Optimizer(mo.Adam())
        >>> _ = opt.step({"w": np.zeros(2)}, {"w": np.ones(2)})
        >>> file = io.BytesIO()
        >>> opt.save(file, metadata={"epoch": np.int64(7), "loss": float("nan")})
        >>> _ = file.seek(0)
        >>> mo.Optimizer(mo.Adam()).load(file).metadata
        {'epoch': 7, 'loss': nan}
        """
        self._guard.check_whole("save")
        warn_of_left_behind(self._registry)
        known = self._registry
        settings, lost = described_settings(known.settings)
        warn_of_lost(lost, "saved")
        tables = [*held(known), *waiting(pending_now(known))]
        param_tables = None if params is None else tables_of(known, params)
        counts = known.steps, known.skips
        write(path, tables, *counts, metadata, settings=settings, params=param_tables)

    @mending
    def load(
        self,
        path: Source,
        *,
        strict: bool = True,
        names: Iterable[str] | str | None = None,
        rename: Mapping[str, str] | Callable[[str], str] | None = None,
        cast: bool = False,
        settings: bool = True,
        params: Mapping[str, Array] | None = None,
    ) -> LoadReport:
        """Take over the state in a file, as ``load_state_dict`` does, and the parameters in it.

        Args:
            path: The file. What is not wanted is not read. Or a binary file object, which is read
                from where it is to its end, by way of a temporary file.
            strict: Whether state or a parameter that does not fit, whose checksum is wrong, or
                which is on one side only, is an error. If not, it is left out, name by name, and
                the report says why.
            names: The names, or the one name, whose state is wanted; by default all.
            rename: What to call names here: new ones by old ones, or a callable.
            cast: Whether slots and parameters are converted to the dtype that is needed.
            settings: Whether what ``set_hyperparameters`` had set is set here again.
            params: The arrays to load the parameters of the file into, by name. NumPy arrays and
                torch tensors are written, unless ``in_place=False``; for others there are new ones.

        Returns:
            What became of the state of each name, the metadata of the file, and the parameters.

        Raises:
            CheckpointError: The file is damaged, is not ours or does not fit; nothing has changed.
            KeyError: The file has none of a name in ``names`` or ``rename``.
            OSError: The file cannot be read.
            TypeError: A new name is not a string, something in ``params`` is not a usable array, or
                ``path`` is neither a path nor a binary file object.
            ValueError: Two names would become one.

        >>> import io
        >>> import numpy as np, multiopt as mo
        >>> opt, file = mo.Optimizer(mo.Adam()), io.BytesIO()
        >>> params = opt.step({"w": np.zeros(2)}, {"w": np.ones(2)})
        >>> opt.save(file, params=params)
        >>> _ = file.seek(0)
        >>> report = mo.Optimizer(mo.Adam()).load(file, params={"w": np.zeros(2)})
        >>> np.array_equal(report.params["w"], params["w"])
        True
        """
        wanted = wanted_names(names)
        contents = read(path, wanted, params is not None)
        new = renamed(contents.all_names(), wanted, rename)
        if strict:
            contents.check_whole(path)
        try:
            return load(self._registry, contents, new, strict, cast, settings, params)
        except ValueError as error:
            raise CheckpointError(f"{label(path)}: {error}") from error
