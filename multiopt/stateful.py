"""``Stateful``: the part of the optimizer that shows its state, saves it and loads it.

Whatever an optimizer has learned about its parameters is in its registry. Here it is turned into
snapshots, state dicts and checkpoint files, and taken over from them, whole or not at all.
``optimizer`` adds what changes it: the step, and what users set.

>>> import numpy as np, multiopt as mo
>>> opt = mo.Optimizer(mo.SGD(momentum=0.5))
>>> _ = opt.step({"w": np.zeros(2)}, {"w": np.ones(2)})
>>> opt.state("w")
State(step=1, slots={'momentum_buffer': array([1., 1.])})
>>> other = mo.Optimizer(mo.SGD(momentum=0.5))
>>> other.load_state_dict(opt.state_dict()).pending, other.state("w").step
(('w',), 1)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple, Self

from multiopt.arrays import Array
from multiopt.errors import CheckpointError
from multiopt.guard import Guard, mending
from multiopt.registry import Registry
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
from multiopt.state.settings import described_settings
from multiopt.state.tables import held, waiting
from multiopt.state.writing import write
from multiopt.step.report import Report
from multiopt.step.skips import Skips

__all__ = ["State", "Stateful"]


class State(NamedTuple):
    """A snapshot of the state of one parameter.

    Attributes:
        step: How many steps the parameter has taken.
        slots: Copies of the rule's arrays by name, in the parameter's library; float32 for a 16-bit
            parameter.
    """

    step: int
    slots: dict[str, Array]


class Stateful:
    """An optimizer as far as it shows, saves and loads its state."""

    # Without a dict, a misspelt attribute is an error instead of a setting without effect.
    __slots__ = ("__weakref__", "_guard", "_registry")

    _guard: Guard
    _registry: Registry

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

    def __copy__(self) -> Self:
        """A deep copy: two optimizers never share state."""
        return deepcopy(self)

    def __contains__(self, name: object) -> bool:
        """Whether a name has been seen."""
        return name in self._registry

    def __iter__(self) -> Iterator[str]:
        """The names seen so far, oldest first."""
        return iter(self.names)

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
        settings = described_settings(known.settings)
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
