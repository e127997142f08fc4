"""The optimizer inside the drop-in, whose names are given to tensors."""

from typing import Any

import numpy as np

from multiopt.backend import named
from multiopt.guard import Guard
from multiopt.optimizer import Optimizer
from multiopt.registry import Registry
from multiopt.rules import Rule
from multiopt.step.report import explain
from multiopt.step.run import Step

__all__ = ["Core"]


class Core(Optimizer):
    """An optimizer of a host that brings its names in and expects clipped gradients.

    The host works on what it knows (``known``), and keeps changes apart by its ``guard``.
    """

    __slots__ = ()

    def __init__(self, rule: Rule, **more: Any) -> None:
        """As ``Optimizer``."""
        super().__init__(rule, **more)
        self._registry.leave_clipped = True
        # Pyro passes over tensors without a gradient, whatever they are.
        self._registry.needs_gradients = False

    @property
    def known(self) -> Registry:
        """What is known by name."""
        return self._registry

    @property
    def guard(self) -> Guard:
        """What keeps changes apart."""
        return self._guard

    def step_tensors(self, names: list[str], tensors: np.ndarray) -> None:
        """``step`` of tensors that have names already, by their own gradients.

        An ``exclusive`` method of the host's calls it.
        """
        guard, known = self._guard, self._registry
        before = known.outcome
        try:
            known.step(names, tensors, None, self._after)
        except BaseException as error:
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
