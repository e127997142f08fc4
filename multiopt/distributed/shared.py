"""The parameters that all ranks hold, and their steps, whatever optimizer takes them.

``Replicas`` and the drop-in for Pyro differ in where parameters come from and where their state is:
that is a ``Host``. Everything else is here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from multiopt.arrays import Array
from multiopt.distributed.exchange import Agreed, Exchange
from multiopt.distributed.local import Local
from multiopt.distributed.state import copied, with_values
from multiopt.registry import Registry
from multiopt.step.clip import Clip

__all__ = ["Host", "Shared"]


class Host(Protocol):
    """An optimizer of one rank.

    Attributes:
        registry: Its registry.
        arrays: The parameters that all ranks hold, by name, as this rank has them.
    """

    registry: Registry
    arrays: dict[str, Array]

    def unknown(self) -> Collection[str]:
        """The names in ``arrays`` that have no state, or no longer that array."""

    def find(self, name: str) -> Array | None:
        """An array of a name that this rank has, although it was not passed."""

    def clip_of(self, name: str, array: Array | None) -> Clip | None:
        """The clip of a name, seen or not."""

    def state_of(self, arrays: Mapping[str, Array]) -> bytes:
        """The state of some parameters as a file; empty if there is none."""

    def with_state(
        self, names: Sequence[str], arrays: Mapping[str, Array], states: Sequence[bytes], steps: int
    ) -> AbstractContextManager[None]:
        """Let the next step begin with state from other ranks; undone if it does not happen.

        Args:
            names: The names that come from other ranks, whose state here is dropped.
            arrays: The parameters that are held after the step.
            states: The states.
            steps: How many steps the optimizer is to have taken.
        """

    def step(self, params: dict[str, Array], grads: dict[str, Array]) -> dict[str, Array]:
        """Take a step, whole or not at all; return the up-to-date parameters."""


class Shared:
    """The parameters that all ranks hold.

    Args:
        host: The optimizer of this rank.
        group: As for ``Replicas``.
        local: As for ``Replicas``.
        reduction: As for ``Replicas``.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``group`` is not one, or ``local`` is neither a callable nor None.
        ValueError: ``reduction`` is unknown, or the group does not have this process.
    """

    def __init__(
        self, host: Host, group: Any, local: Callable[[str], bool] | None, reduction: str
    ) -> None:
        """Start with no parameters; nothing is sent."""
        self._host, self._registry, self._local = host, host.registry, Local(local)
        self._exchange = Exchange(group, reduction, self._check_new, host.state_of)
        #: The arrays that were passed on this rank, held by all ranks or not yet.
        self._passed: dict[str, Array] = {}
        #: The optimizer's clip, and the names whose clips have been checked under it.
        self._checked: tuple[Any, set[str]] = None, set()

    def step(
        self, begin: Callable[[], tuple[dict[str, Array], Mapping[str, Array | None]]]
    ) -> dict[str, Array]:
        """Take a step on all ranks.

        Args:
            begin: Returns the parameters of this rank and their gradients. What it raises, all
                ranks raise.

        Returns:
            The up-to-date parameters of this rank, in the same order.

        Raises:
            Exception: As ``Replicas.step``.
        """
        with self._exchange.messages.step():
            params, grads = begin()
            own = self._local.among(params)
            shared = {n: x for n, x in params.items() if n not in own} if own else params
            self._drop_unknown()
            self._check_clips(params)
            agreed = self._exchange.agree(shared, grads, self._registry.steps)
            stepped = self._take(agreed, shared, own, grads)
            return {**params, **{name: stepped[name] for name in own if name in stepped}}

    def _take(
        self,
        agreed: Agreed,
        shared: dict[str, Array],
        own: Mapping[str, Array],
        grads: Mapping[str, Array | None],
    ) -> dict[str, Array]:
        """Step the parameters with a gradient on any rank, and the local ones."""
        registry, before, held = self._registry, self._registry.outcome, self._host.arrays
        passed = self._passed | shared
        for name in {**held, **agreed.values}.keys() - passed.keys():
            if (array := self._host.find(name)) is not None:
                passed[name] = array
        # The first array that is passed of a name that is held takes over its value.
        first = (held.keys() & passed.keys()) - self._passed.keys()
        values = {name: held[name] for name in first}
        values |= {name: value for name, value in agreed.values.items() if name in passed}
        arrays = passed | held | shared | {name: passed[name] for name in first}
        for name in agreed.values.keys() - passed.keys():
            arrays[name] = copied(agreed.values[name])
        stepped = {name: arrays[name] for name in agreed.grads}
        after = {name: arrays[name] for name in {**held, **stepped}}
        all_grads = {**agreed.grads, **{n: g for n in own if (g := grads.get(n)) is not None}}
        state = agreed.states, agreed.steps
        with (
            with_values(registry, passed, values),
            self._host.with_state(list(agreed.values), after, *state),
        ):
            registry.before_writing = self._exchange.messages.send_last
            try:
                return self._host.step({**stepped, **own}, all_grads)
            finally:
                registry.before_writing = None
                if registry.outcome is not before:
                    self._exchange.hold(agreed.layouts)
                    self._passed = passed
                    self._host.arrays = after

    def _drop_unknown(self) -> None:
        """Hold no names that the optimizer was told to forget, or that it has skipped so far."""
        host, known = self._host, self._host.arrays
        if gone := host.unknown():
            self._exchange.drop(gone)
            host.arrays = {name: array for name, array in known.items() if name not in gone}
            for name in gone:
                # A name that was skipped is not forgotten.
                if name not in self._registry.skips:
                    self._passed.pop(name, None)

    def _check_new(self, arrays: Mapping[str, Array | None]) -> None:
        self._local.check_new(list(arrays))
        self._check_clips(arrays)

    def _check_clips(self, arrays: Mapping[str, Array | None]) -> None:
        """Check the global norms of names that have not been checked."""
        (clip, checked), now = self._checked, self._registry.clip
        if clip is not now:
            self._local.forget_clips()
            checked, arrays = set(), {**self._host.arrays, **arrays}
        if new := {name: array for name, array in arrays.items() if name not in checked}:
            self._local.check_clips({n: self._host.clip_of(n, new[n]) for n in new})
            checked.update(new)
        self._checked = now, checked
