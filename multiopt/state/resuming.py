"""The rules that names have once the settings of a checkpoint count, before anything is changed.

What ``set_hyperparameters`` set while the saved run went on may change which slots a rule has, so
loaded state must fit the rules as they will be. ``Resuming`` makes new rows with those rules, and
``loading`` registers them together with the state, or not at all.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from multiopt.engine import Group
from multiopt.entry import Entry, changed, changed_for_all, with_rule
from multiopt.kinds import formulas
from multiopt.rules import Rule
from multiopt.state.settings import Settings, record

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = ["Resuming"]

Result = TypeVar("Result")


class Resuming:
    """A registry with the settings of a checkpoint.

    Args:
        registry: The registry.
        settings: The settings, under the names here.
        strict: Whether settings that do not fit are an error; otherwise they are left out.

    Attributes:
        loaded: The settings of the checkpoint.
        rule: The rule for new names, or the callable that chooses it.
        settings: All settings of the registry after the load.
        codes: The codes of the new rows, by name.
        refused: The names whose settings do not fit, with the reason; None for those for all names.

    Raises:
        ValueError: Settings do not fit, and ``strict`` is true.
    """

    def __init__(self, registry: "Registry", settings: Settings, strict: bool) -> None:
        """Make the new rows."""
        self._registry, self.loaded, self._strict = registry, settings, strict
        self.rule, self.refused = registry.rule, dict[str | None, str]()
        self.settings = {name: dict(values) for name, values in registry.settings.items()}
        values = settings.for_all
        if values:
            rule = self._fitting(None, lambda: changed_for_all(registry.rule, values))
            if rule is not None:
                self.rule = rule
                record(self.settings, None, values)
        for name, own in settings.by_name.items():
            if name not in registry:
                self._fitting([name], partial(self._rule, name, own))
        entries: dict[str, Entry] = {}
        seen = registry.names if values else [name for name in settings.by_name if name in registry]
        for names, chain in registry.names_by_rule(seen, lambda n: id(settings.by_name.get(n))):
            # One rule for all of them, so that their rows are made together.
            own = settings.of_name(names[0])
            rule = self._fitting(
                names, partial(changed, partial(list, names), formulas(chain)[0], own)
            )
            if rule is None:
                continue
            for name in names:
                make = partial(with_rule, name, registry.entry(name, chain), rule)
                if (entry := self._fitting([name], make)) is not None:
                    entries[name] = entry
        for name, own in settings.by_name.items():
            if name not in self.refused:
                record(self.settings, [name], own)
        self.codes = registry.placed(entries)

    def _fitting(self, names: Sequence[str] | None, make: Callable[[], Result]) -> Result | None:
        """What a function makes; None if settings do not fit some names, or None for all names."""
        try:
            return make()
        except (TypeError, ValueError) as error:
            if self._strict:
                raise ValueError(
                    f"the loaded settings do not fit: {error}: load with settings=False"
                ) from error
            refused: Sequence[str | None] = [None] if names is None else names
            self.refused |= dict.fromkeys(refused, f"its settings: {error}")
            return None

    def row_of(self, name: str) -> tuple[Group, int]:
        """The group and the row of a name that has been seen."""
        code = self.codes.get(name)
        return self._registry.row_of(name) if code is None else self._registry.at(code)

    def rule_for(self, name: str) -> Rule | None:
        """The rule of a name that has not been seen; None if a callable will choose it.

        Raises:
            TypeError: The rule does not have a hyperparameter that was set.
            ValueError: A value that was set is out of range.
        """
        return self._rule(name, {})

    def _rule(self, name: str, values: Mapping[str, Any]) -> Rule | None:
        if not isinstance(self.rule, Rule):
            return None
        own = {**self.settings.get(name, {}), **values}
        return changed(partial(list, [name]), self.rule, own) if own else self.rule

    def leave(self, names: Collection[str]) -> None:
        """Leave some names as they are, since their state is not used."""
        before = self._registry.settings
        for name in names:
            self.settings.pop(name, None)
            if name in before:
                self.settings[name] = dict(before[name])
        self._registry.free([self.codes.pop(name) for name in names if name in self.codes])

    def commit(self) -> None:
        """Register the new rows, the rule and the settings. This cannot fail."""
        codes, self.codes = self.codes, {}
        self._registry.replace_rows(codes)
        self._registry.rule, self._registry.settings = self.rule, self.settings

    def free(self) -> None:
        """Free the new rows if they were not registered."""
        self._registry.free(self.codes.values())
