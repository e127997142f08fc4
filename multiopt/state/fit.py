"""Whether saved state fits a rule and a parameter.

The names of the slots must be those of the rule, and their shapes and dtypes must suit the
parameter. Nothing is adapted silently: the error names the parameter, what differs, and the remedy.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from multiopt.engine import MASTER
from multiopt.entry import slot_shapes
from multiopt.layout import Layout
from multiopt.rules import Rule
from multiopt.rules.average import AVERAGE

if TYPE_CHECKING:
    from multiopt.state.record import Form, Saved, Slot

__all__ = ["SHOWN_AVERAGE", "check_average", "check_fit", "check_slot_names"]

#: The name of an average's slot in a state dict.
SHOWN_AVERAGE = "average"


def check_slot_names(
    name: str,
    have: Collection[str],
    step: int,
    settings: Mapping[str, Any],
    rule: Rule,
    names: Iterable[str] | None = None,
) -> None:
    """Raise an error unless the slots of saved state are those of a rule.

    Args:
        name: The name of the parameter.
        have: The names of the saved slots.
        step: The clock of the saved state.
        settings: The name and the hyperparameters of the saved rule.
        rule: The rule that is to use the state.
        names: The names of its slots, if the shape of the parameter is known.

    Raises:
        ValueError: The slots are those of another rule.
    """
    have, want = sorted(have), sorted(rule.slots if names is None else names)
    if names is None and MASTER in have:
        # It is not known yet whether the parameter has 16 bits.
        want = sorted([*want, MASTER])
    elif MASTER in have and MASTER not in want:
        raise ValueError(
            f"the loaded state of parameter {name!r} has the slot {MASTER!r}; expected none, for "
            "a parameter of 32 or 64 bits or an optimizer without master_weights=True: for one of "
            "16 bits make the optimizer with master_weights=True, else forget the name to start "
            "over"
        )
    # The slots of a rule that is not elementwise may depend on the shape.
    is_exact = names is not None or rule.elementwise
    is_unstepped = step == 0 and not have
    if (have != want if is_exact else not set(have) <= set(want)) and not is_unstepped:
        raise ValueError(
            f"the loaded state of parameter {name!r} has the slots {have} (of "
            f"{settings.get('name', 'an unknown rule')}); expected {want}, those of its rule "
            f"{rule!r}: load with the rule that was saved, step, then assign opt.rule"
        )


def check_fit(name: str, saved: "Saved", rule: Rule, layout: Layout, masters: bool) -> None:
    """Raise an error unless saved state fits a parameter; its average is not checked.

    State without a master copy fits: the copy is made from the parameter. State at step 0 fits
    without slots.

    Args:
        name: The name of the parameter.
        saved: The saved state.
        rule: The rule of the parameter.
        layout: The layout of the parameter.
        masters: Whether 16-bit parameters have master copies.

    Raises:
        ValueError: A slot does not fit the rule, the shape or the dtype.
    """
    form, shapes = saved.form, slot_shapes(name, rule, layout)
    if masters and layout.storage_dtype != layout.compute_dtype and MASTER in form.own:
        shapes[MASTER] = layout.storage_shape
    check_slot_names(name, form.own, saved.step, form.rule.settings, rule, shapes)
    for slot in form.slots if not saved.is_unstepped else ():
        if slot.name != AVERAGE:
            _check_slot(name, slot, form, shapes[slot.name], layout)


def check_average(name: str, saved: "Saved", layout: Layout) -> None:
    """Raise an error unless the average in saved state fits a parameter.

    Raises:
        ValueError: Its slot does not fit the parameter's shape or dtype.
    """
    for slot in saved.form.slots:
        if slot.name == AVERAGE:
            shown = slot._replace(name=SHOWN_AVERAGE)
            _check_slot(name, shown, saved.form, layout.storage_shape, layout)


def _check_slot(
    name: str, slot: "Slot", form: "Form", shape: tuple[int, ...], layout: Layout
) -> None:
    is_complex = form.is_complex
    # A complex slot may come as a real array of its two parts.
    fits = slot.shape == shape and is_complex <= layout.is_complex
    if fits and (form.cast or slot.dtype == layout.compute_dtype):
        return
    given = Layout("", slot.shape, slot.dtype, "", is_complex)
    if fits:
        expected = layout.dtype if is_complex else layout.compute_dtype
        why = (
            f"dtype {given.dtype}; expected {expected}, for a parameter of dtype "
            f"{layout.dtype}: load it with cast=True, or forget the name to start over"
        )
    elif is_complex == layout.is_complex:
        why = (
            f"shape {given.shape}; expected {layout.shape if is_complex else shape} for a "
            f"parameter of shape {layout.shape}: forget the name to start over"
        )
    else:
        why = (
            f"dtype {given.dtype} and shape {given.shape}; expected a "
            f"{'complex' if layout.is_complex else 'real'} one, for a parameter of dtype "
            f"{layout.dtype} and shape {layout.shape}: forget the name to start over"
        )
    raise ValueError(f"the loaded slot {slot.name!r} of parameter {name!r} has {why}")
