"""``optimizer.state``: what multiopt keeps of each parameter, live, in torch's terms.

Reading gives the engine's own slots and a clock; writing changes what the next step uses. As a
defaultdict makes what it is asked for, a parameter that was not stepped yet begins its state here:
its slots are zero, and so is its clock.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from multiopt.adapters.torch.loading import AVERAGE_STEP
from multiopt.adapters.torch.shards import like
from multiopt.adapters.torch.state import derived_numbers, offset, scalar
from multiopt.backend import backend_named
from multiopt.state.record import described_rule

if TYPE_CHECKING:
    from multiopt.adapters.torch.optimizer import Optimizer

__all__ = ["Slots", "State"]


class State(MutableMapping[torch.Tensor, Any]):
    """The state of all parameters, by parameter."""

    def __init__(self, owner: "Optimizer") -> None:
        """Make a view of an optimizer's state."""
        self._owner = owner

    def __getitem__(self, param: torch.Tensor) -> "Slots":
        """The clock and the slots of a parameter."""
        owner = self._owner
        key = owner._followed.known(param)
        if key is None or key not in owner._registry:
            owner._enter([param])
        return Slots(owner, param)

    def __setitem__(self, param: torch.Tensor, values: Mapping[str, Any]) -> None:
        """Replace the clock and the slots of a parameter; without any it starts over."""
        followed = self._owner._followed
        followed.look(self._owner.param_groups)
        self._owner._load({followed.key_of(param): values})

    def __delitem__(self, param: torch.Tensor) -> None:
        """Make a parameter start over."""
        self[param] = {}

    def __contains__(self, param: object) -> bool:
        """Whether a tensor has state: it is in a group, and it can be or was updated."""
        followed, registry = self._owner._followed, self._owner._registry
        followed.look(self._owner.param_groups)
        key = followed.known(param)
        return key is not None and (key in registry or getattr(param, "requires_grad", False))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """The parameters that can be updated, or were, in the order of the groups."""
        return iter(self._owner._stateful())

    def __len__(self) -> int:
        """How many parameters have state."""
        return len(self._owner._stateful())

    def __repr__(self) -> str:
        """The text of a dict with the current values."""
        return repr({param: slots.now() for param, slots in self.items()})


class Slots(MutableMapping[str, Any]):
    """The clock and the slots of a parameter under torch's names; the slots are not copies."""

    def __init__(self, owner: "Optimizer", param: torch.Tensor) -> None:
        """Make a view of the state of a parameter that has some."""
        self._owner, self._param = owner, param
        self._key = owner._followed.key_of(param)

    def now(self) -> dict[str, Any]:
        """All of it as a dict, of which a step later only the slots are live."""
        registry = self._owner._registry
        entry = registry.entry(self._key)
        slots, step = dict(entry.slots), entry.step
        if entry.average is not None:
            slots |= entry.average.slots
        if entry.layout.is_complex:
            as_complex = backend_named("torch").as_complex
            slots = {name: as_complex(slot) for name, slot in slots.items()}
        rule = described_rule(entry.rule, step, registry.steps)
        if not step:
            slots = offset(slots, rule, 1)
        shown: dict[str, Any] = {"step": scalar(step), **derived_numbers(rule, step)}
        shown |= {name: like(self._param, slot) for name, slot in slots.items()}
        if entry.average is not None:
            shown[AVERAGE_STEP] = scalar(entry.average.step)
        return shown

    def __getitem__(self, name: str) -> Any:
        """A slot, the clock, or a number that follows from the clock and the settings."""
        return self.now()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Write to a slot or the clock.

        Raises:
            KeyError: There is no such slot.
            CheckpointError: The value does not fit.
        """
        now = self.now()
        if name not in now:
            raise KeyError(f"the state of {self._key!r} has no {name!r}; it has {', '.join(now)}")
        State(self._owner)[self._param] = {**now, name: value}

    def __delitem__(self, name: str) -> NoReturn:
        """Raise an error: the state would be incomplete."""
        raise TypeError(f"the state of {self._key!r} needs {name!r}: set it, or clear the state")

    def clear(self) -> None:
        """Make the parameter start over."""
        State(self._owner)[self._param] = {}

    def __iter__(self) -> Iterator[str]:
        """The names of the clock and the slots."""
        return iter(self.now())

    def __len__(self) -> int:
        """How many there are."""
        return len(self.now())

    def __repr__(self) -> str:
        """The text of a dict with the current values."""
        return repr(self.now())
