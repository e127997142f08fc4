"""The optimizer inside the drop-in, whose names are given to tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from multiopt.arrays import Array
from multiopt.backend import named
from multiopt.changes import change
from multiopt.entry import Entry, chosen_average, restored, restored_average, slot_shapes
from multiopt.layout import Layout
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.skipping import Skips
from multiopt.step.clip import Clip
from multiopt.step.report import explain
from multiopt.step.run import Step

__all__ = ["Core"]


class Core(Optimizer):
    """An optimizer of a host that brings its names in and expects clipped gradients."""

    __slots__ = ()

    def __init__(self, rule: Rule, **more: Any) -> None:
        """As ``Optimizer``."""
        super().__init__(rule, **more)
        self._registry.leave_clipped = True
        # Pyro passes over tensors without a gradient, whatever they are.
        self._registry.needs_gradients = False

    def check_whole(self, what: str) -> None:
        """Refuse to show what is torn."""
        self._guard.check_whole(what)

    def end_torn(self) -> bool:
        """Whether it was torn; then it holds nothing any more, and may begin anew."""
        if self._guard.torn is None:
            return False
        with self._guard:
            self._registry.forget(self._registry.known())
            self._guard.torn = None
        return True

    def forget_all(self, names: Iterable[str]) -> None:
        """Drop all that is held of some names."""
        self._registry.forget(names)

    def check_free(self, what: str) -> None:
        """Refuse a change in the middle of a step."""
        self._guard.check(what)

    def step_tensors(self, names: list[str], tensors: np.ndarray) -> None:
        """``step`` of tensors that have names already, by their own gradients.

        Torch's compiler is to be out of reach, as it is of an ``exclusive`` method.
        """
        guard, known = self._guard, self._registry
        before = known.outcome
        guard.check("step")
        try:
            guard.busy = True
            known.step(names, tensors, None, self._after)
            guard.busy = False
        except BaseException as error:
            guard.busy = False
            explain(error, before, known.outcome, guard.torn)
            raise

    def _after(self, step: Step) -> None:
        """Leave the clipped gradients behind."""
        backend = named("torch")
        for param, member, grad in step.left_over():
            (clipped,) = backend.closed([grad], member.layout)
            if member.layout.is_complex:
                clipped = backend.whole(clipped)
            if 0 in param.grad.stride():
                # Expanded by a backward with create_graph=True: no place for each element.
                param.grad = clipped.to(param.grad.dtype)
            else:
                param.grad.detach().copy_(clipped)

    def enter(self, name: str, label: str, rule: Rule, clip: Clip | None, layout: Layout) -> None:
        """Take a name in before its first step.

        Args:
            name: The name.
            label: What a callable of the user's knows it by.
            rule: Its rule.
            clip: Its clip.
            layout: Its layout.
        """
        slot_shapes(name, rule, layout)
        chosen = chosen_average(self._registry.average, label)
        average = restored_average(name, None, chosen, layout)
        self._registry.put({name: Entry(rule, clip, 0, {}, layout, average)})

    def entry(self, name: str) -> Entry:
        """What is held of a name."""
        return self._registry.entry(name)

    def slots(self, name: str) -> dict[str, Array]:
        """The slots of a name as they are in memory: who writes them changes them."""
        entry = self._registry.entry(name)
        backend = named(entry.layout.library)
        return entry.converted(backend.whole if entry.layout.is_complex else lambda slot: slot)

    def average_entry(self, name: str) -> Entry | None:
        """What is held of the average of a name, if one is kept and there was a step."""
        average = self._registry.entry(name).average
        return average if average is not None and average.step else None

    def set_clock(self, name: str, step: int) -> None:
        """Set how many steps a name has taken."""
        group, row = self._registry.row_of(name)
        group.set_clock(row, step)

    def start_anew(self, name: str) -> None:
        """Drop the clock and the slots of a name, and nothing else."""
        self._registry.put({name: self._registry.entry(name)._replace(step=0, slots={})})

    def rule_of(self, name: str) -> Rule:
        """The rule of a name."""
        return self._registry.rule_of(name)

    def set_numbers(self, names: Sequence[str], values: Mapping[str, Any]) -> None:
        """Change some hyperparameters of some names."""
        self._registry.set_numbers(names, values)

    def clock(self, name: str) -> int:
        """How many steps a name has taken."""
        return self._registry.clock(name)

    def change(self, rules: Mapping[str, Rule], clips: Mapping[str, Clip | None]) -> None:
        """Change the rules of some names, and the clips of some of them."""
        change(self._registry, rules, clips)

    def resume(self, steps: int) -> None:
        """Go on counting the steps of the optimizer from a number."""
        self._registry.steps = steps

    def restore(self, states: Mapping[str, tuple[Mapping[str, Any], Rule, Clip | None]]) -> None:
        """Give names loaded state with the rules that came with it, and clips for those.

        Raises:
            ValueError: A state does not fit; nothing has changed.
        """
        known, skips = self._registry, dict(self._registry.skips)
        made = {}
        for name, (stored, rule, clip) in states.items():
            _, _, _, _, layout, average = known.entry(name)
            entry = restored(name, stored, rule, clip, layout, known.masters)
            if average is not None:
                average = restored_average(name, stored.get("average"), average.rule, layout)
            made[name] = entry._replace(average=average)
            if counts := stored.get("skips"):
                skips[name] = Skips(*counts)
        with self._guard:
            known.put(made)
            known.skips = skips
