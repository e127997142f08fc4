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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

import numpy as np

from multiopt.arrays import Array
from multiopt.entry import check_average, check_clip, check_rule
from multiopt.errors import brief
from multiopt.guard import Guard, exclusive
from multiopt.hyperparameters import set_clips, set_numbers, set_rules
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.rules.average import Average
from multiopt.state.renaming import wanted_names
from multiopt.stateful import Stateful
from multiopt.step.checks import as_dict, gradients_of
from multiopt.step.clip import Clip
from multiopt.step.report import explain
from multiopt.step.skips import check_limit
from multiopt.untraced import untraced

__all__ = ["Optimizer"]


class Optimizer(Stateful):
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

    __slots__ = ()

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
        set_rules(self._registry, rule)

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
        set_numbers(known, labels, values)

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
        set_clips(self._registry, clip)

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
