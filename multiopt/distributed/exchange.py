"""The exchange of names, values, states and gradients in a step.

Every rank holds every name that has had a gradient on any rank. So all ranks take the same step, of
the same names with the same gradients, and norms, skips and clocks are equal without another word.

    first message    whether something is wrong, and hashes of what this rank knows
    names            only of ranks with a list of names that has not been told before
    new names        value and state, from the lowest rank that has the name
    gradients        averaged over the ranks
    last message     everything is checked and prepared; from here on ranks write
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from multiopt.arrays import Array
from multiopt.distributed.messages import Messages
from multiopt.distributed.names import Names, Plan, Told, plan_of, read
from multiopt.distributed.packing import Vector, vectors_of
from multiopt.distributed.reduction import REDUCTIONS, broadcast, mean
from multiopt.distributed.transport import Transport
from multiopt.errors import brief
from multiopt.layout import Layout
from multiopt.step.checks import check_layout

__all__ = ["Agreed", "Exchange"]

#: How many lists of names, and how many combinations of them, are remembered.
REMEMBERED = 1024

#: The state of so many names travels at once that their values take about as many bytes.
BATCH = 2**26


class Agreed(NamedTuple):
    """What the step is of, on every rank.

    Attributes:
        grads: The means of the gradients, by name.
        values: The values of names that come from another rank, by name.
        states: The states of these names, as files; a name that is in none of them has no state.
        steps: The largest number of steps that the optimizer of any rank has taken.
        layouts: The layouts that the parameters have here, by name.
    """

    grads: dict[str, Array]
    values: dict[str, Array]
    states: list[bytes]
    steps: int
    layouts: dict[str, Layout]


class Exchange:
    """What the ranks have in common.

    Args:
        group: The process group; None for the default one.
        reduction: ``"ordered"`` or ``"fast"``.
        check_new: Raises an error if names that all ranks are about to hold cannot be held here;
            it gets the array of each, or None where another rank has it.
        state_of: Returns the state of some parameters as a file; empty if there is none.

    Attributes:
        messages: The small messages between the ranks.
        held: The layouts of the names that all ranks hold.

    Raises:
        RuntimeError: There is no process group.
        TypeError: ``group`` is not one.
        ValueError: ``reduction`` is neither of the two, or the group does not have this process.
    """

    def __init__(
        self,
        group: Any,
        reduction: str,
        check_new: Callable[[Mapping[str, Array | None]], object],
        state_of: Callable[[Mapping[str, Array]], bytes],
    ) -> None:
        """Start with no names; nothing is sent."""
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be 'ordered' or 'fast'; got {brief(reduction)}")
        self._transport = Transport(group)
        self.messages = Messages(self._transport)
        self._reduction, self._check_new, self._state_of = reduction, check_new, state_of
        self._names = Names()
        self.held: dict[str, Layout] = {}
        # The number of steps, and a hash of the names in ``held`` in whatever order.
        self._steps = self._hash = 0
        self._lists: dict[bytes, dict[str, Told]] = {}
        self._plans: dict[bytes, Plan] = {}
        #: How the gradients of the last step were packed, and for which names, here and together.
        self._packed: tuple[dict[str, Layout], list[Vector]] = {}, []
        self._known: tuple[Plan | None, Mapping[str, Layout] | None] = None, None

    def agree(
        self, params: Mapping[str, Array], grads: Mapping[str, Array | None], steps: int
    ) -> Agreed:
        """Exchange what the ranks need for a step; nothing is changed.

        Args:
            params: The parameters that this rank has at hand.
            grads: Their gradients; None or missing for those without one.
            steps: How many steps the optimizer has taken.

        Raises:
            Exception: As ``Messages.send``.
            RuntimeError: The ranks are not at the same step, or do not hold the same names.
            TypeError: An array cannot be exchanged, or ranks have other dtypes.
            ValueError: An array does not fit, ranks have other shapes or reductions.
        """
        text = self._names.told(params, grads)
        layouts = self._names.layouts
        if layouts is not self._known[1]:
            for name in layouts.keys() & self.held.keys():
                check_layout(name, layouts[name], self.held[name])
        digest = xxh3_128_digest(text)
        facts = REDUCTIONS.index(self._reduction), self._steps, self._hash
        two = np.frombuffer(digest, np.int64).tolist()
        table = self.messages.send(*facts, *two, len(text), steps)
        with self.messages.alike():
            _check_alike(table[:, :3])
        digests = [row.tobytes() for row in table[:, 3:5]]
        self._hear(text, digests, table[:, 5].tolist())
        with self.messages.alike():
            plan = self._plan(digests)
        here, vectors = self._packing(plan, layouts)
        new = [name for name in here if name not in self.held]
        values, states = self._join(new, plan.sources, here, params) if new else ({}, [])
        means = mean(self._transport, vectors, grads, self._reduction)
        return Agreed(means, values, states, int(table[:, 6].max()), here)

    def _hear(self, text: bytes, digests: Sequence[bytes], lengths: Sequence[int]) -> None:
        """Get the lists of names that have not been told before."""
        if len(self._lists) + len(digests) > REMEMBERED:
            self._lists, self._plans = {}, {}
        unknown: dict[bytes, int] = {}
        for rank, digest in enumerate(digests):
            if digest not in self._lists:
                unknown.setdefault(digest, rank)
        asked = {rank: lengths[rank] for rank in unknown.values()}
        for rank, told in self._transport.send_bytes(text, asked).items():
            self._lists[digests[rank]] = read(told)

    def _plan(self, digests: Sequence[bytes]) -> Plan:
        key = b"".join(digests)
        if key not in self._plans:
            if len(self._plans) >= REMEMBERED:
                self._plans = {}
            self._plans[key] = plan_of([self._lists[digest] for digest in digests])
        return self._plans[key]

    def _packing(
        self, plan: Plan, layouts: Mapping[str, Layout]
    ) -> tuple[dict[str, Layout], list[Vector]]:
        """The layouts of a plan as they are on this rank, and where its gradients are packed."""
        # Most steps have the names of the one before.
        if plan is not self._known[0] or layouts is not self._known[1]:
            here = {name: self._layout(name, layouts, plan) for name in plan.layouts}
            if here != self._packed[0]:
                self._packed = here, vectors_of(here, self._transport.size)
            self._known = plan, layouts
        return self._packed

    def _layout(self, name: str, layouts: Mapping[str, Layout], plan: Plan) -> Layout:
        """The layout that a parameter has on this rank."""
        found = layouts.get(name) or self.held.get(name) or plan.layouts[name]
        if found.library == "torch" and name not in layouts and name not in self.held:
            return found._replace(device=str(self._transport.own_device(found.device)))
        return found

    def _join(
        self,
        names: Sequence[str],
        sources: Mapping[str, int],
        layouts: Mapping[str, Layout],
        params: Mapping[str, Array],
    ) -> tuple[dict[str, Array], list[bytes]]:
        """Get the values and the states of new names from the lowest rank that has each."""
        self._check_new({name: params.get(name) for name in names})
        batches, rank = _batches(names, sources, layouts), self._transport.rank
        mine, states = batches.get(rank, []), list[bytes]()
        for k in range(max(map(len, batches.values()))):
            batch = mine[k] if k < len(mine) else []
            state = self._state_of({name: params[name] for name in batch}) if batch else b""
            lengths = enumerate(self.messages.send(len(state))[:, 0].tolist())
            found = self._transport.send_bytes(
                state, {r: length for r, length in lengths if length}
            )
            states += [data for source, data in found.items() if source != rank]
        values: dict[str, Array] = {}
        for source, parts in batches.items():
            sent = {name: layouts[name] for part in parts for name in part}
            values |= broadcast(self._transport, sent, params, source)
        return values, states

    def hold(self, layouts: Mapping[str, Layout]) -> None:
        """Count a step that all ranks have taken, after which they hold the names in it."""
        self._steps += 1
        for name, layout in layouts.items():
            if name not in self.held:
                self._hash ^= _hash_of(name)
            if self.held.get(name) != layout:
                self.held[name], self._known = layout, (None, None)

    def drop(self, names: Iterable[str]) -> None:
        """Hold some names no longer. All ranks must do so before the same step."""
        for name in names:
            del self.held[name]
            self._known = None, None
            self._hash ^= _hash_of(name)


def _check_alike(table: np.ndarray) -> None:
    """Check the facts that must be the same on all ranks.

    Raises:
        RuntimeError: The ranks are not at the same step, or do not hold the same names.
        ValueError: The ranks have other reductions.
    """
    reductions, steps, hashes = table.T.tolist()
    if len(set(reductions)) > 1:
        listed = ", ".join(repr(REDUCTIONS[k]) for k in reductions)
        raise ValueError(f"reduction must be the same on all ranks; got {listed}, by rank")
    if len(set(steps)) > 1:
        listed = ", ".join(map(str, steps))
        raise RuntimeError(
            f"the ranks have taken {listed} steps; expected as many on each, for all take part in "
            "every step: load a checkpoint in new processes"
        )
    if len(set(hashes)) > 1:
        raise RuntimeError(
            "the ranks do not hold the same names; expected names to be forgotten, renamed and "
            "replaced on all ranks between the same steps"
        )


def _batches(
    names: Iterable[str], sources: Mapping[str, int], layouts: Mapping[str, Layout]
) -> dict[int, list[list[str]]]:
    """The names that each rank sends, in the order of the ranks, in batches."""
    batches: dict[int, list[list[str]]] = {}
    room: dict[int, int] = {}
    for name in names:
        source, layout = sources[name], layouts[name]
        size = prod(layout.storage_shape) * getattr(torch, layout.storage_dtype).itemsize
        if source not in room or room[source] < size:
            batches.setdefault(source, []).append([])
            room[source] = BATCH
        batches[source][-1].append(name)
        room[source] -= size
    return dict(sorted(batches.items()))


def _hash_of(name: str) -> int:
    """A number of 63 bits."""
    return xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) >> 1
