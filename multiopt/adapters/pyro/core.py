"""The optimizer inside the drop-in, whose names are given to tensors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from multiopt.averaging import Average
from multiopt.backend import Array, Layout, named
from multiopt.clipping import Clip
from multiopt.entry import Entry, chosen, new_entry, restored, with_rule
from multiopt.interruption import uninterrupted
from multiopt.optimizer import Optimizer
from multiopt.rules import Rule
from multiopt.skipping import Skips
from multiopt.step import Step

__all__ = ["Core"]


class Core(Optimizer):
    """The registry of a host that brings its names in and expects clipped gradients."""

    _leave_clipped = True
    # Pyro passes over tensors without a gradient, whatever they are.
    _needs_gradients = False

    def _after(self, step: Step) -> None:
        backend = named("torch")
        for param, task, grad in step.left_over:
            clipped = backend.closed(grad, task.param)
            if task.layout.is_complex:
                clipped = backend.whole(clipped)
            if 0 in param.grad.stride():
                # Expanded by a backward with create_graph=True: no place for each element.
                param.grad = clipped.to(param.grad.dtype)
            else:
                param.grad.detach().copy_(clipped)

    def step_tensors(self, names: list[str], tensors: np.ndarray) -> None:
        """``step`` of tensors that have names already, by their own gradients."""
        before, undo = self._outcome, []  # type: ignore[var-annotated]
        try:
            self._changing = True
            if self._averages is None:
                self._advance(names, tensors, None, undo)
            else:
                self._advance_and_average(names, tensors, None, undo)
            self._changing = False
        except BaseException as error:
            self._changing = False
            with uninterrupted():
                for take_back in undo:
                    take_back()
                self._explain(error, before)
            raise

    def enter(self, name: str, label: str, rule: Rule, clip: Clip | None, layout: Layout) -> None:
        """Take a name in before its first step.

        Args:
            name: The name.
            label: What a callable of the user's knows it by.
            rule: Its rule.
            clip: Its clip.
            layout: Its layout.
        """
        entry = new_entry(name, rule, clip, layout, self._masters)
        if self._averages is not None:
            self._choices[name] = chosen(self._average, label, Average, "average")
        self._entries = {**self._entries, name: entry}

    def entry(self, name: str) -> Entry:
        """What is held for a name."""
        return self._entries[name]

    def slots(self, name: str) -> dict[str, Array]:
        """The slots of a name as they are in memory: who writes them changes them."""
        entry = self._entries[name]
        backend = named(entry.layout.library)
        whole = backend.whole if entry.layout.is_complex else lambda slot: slot
        return entry.named_slots(whole)

    def average_entry(self, name: str) -> Entry | None:
        """What is held for the average of a name, if one is kept and there was a step."""
        return None if self._averages is None else self._averages._entries.get(name)

    def set_clock(self, name: str, step: int) -> None:
        """Set how many steps a name has taken."""
        entries = self._entries
        self._entries = {**entries, name: replace(entries[name], step=step)}

    def start_anew(self, name: str) -> None:
        """Drop the clock and the slots of a name, and nothing else."""
        old = self._entries[name]
        fresh = new_entry(name, old.rule, old.clip, old.layout, self._masters)
        self._entries = {**self._entries, name: fresh}

    def change(self, changes: Mapping[str, tuple[Rule, Clip | None]]) -> None:
        """Change the rules and the clips of some names."""
        entries = self._entries
        self._entries = entries | {
            name: replace(with_rule(name, entries[name], rule), clip=clip)
            for name, (rule, clip) in changes.items()
        }

    def resume(self, steps: int) -> None:
        """Go on counting the steps of the optimizer from a number."""
        self._steps = steps

    def restore(self, states: Mapping[str, tuple[Mapping[str, Any], Rule, Clip | None]]) -> None:
        """Give names loaded state with the rules that came with it, and clips for those.

        Raises:
            ValueError: A state does not fit; nothing has changed.
        """
        entries, averages, skips = self._entries, {}, dict(self._skips)
        made = {}
        for name, (stored, rule, clip) in states.items():
            layout = entries[name].layout
            made[name] = restored(name, stored, rule, clip, layout, self._masters)
            choice = None if self._averages is None else self._choices[name]
            if choice is not None and (average := stored.get("average")) is not None:
                averages[name] = restored(name, average, choice, None, layout)
            if counts := stored.get("skips"):
                skips[name] = Skips(*counts)
        with uninterrupted():
            self._entries, self._skips = entries | made, skips
            if self._averages is not None:
                kept = self._averages._entries
                kept = {n: entry for n, entry in kept.items() if n not in made}
                self._averages._entries = kept | averages
