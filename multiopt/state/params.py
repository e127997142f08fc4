"""Parameters in a checkpoint: written beside the state of the same moment, and put back.

Parameters are rows of tables, as slots are, but in their own dtype. They can come from any library
and go to any other. Loading has two parts: ``matched`` checks and converts everything, and the
``write`` of what it returns, which cannot fail, fills the arrays that the caller gave.

>>> import io
>>> import numpy as np, multiopt as mo
>>> opt, file = mo.Optimizer(mo.SGD(lr=1.0)), io.BytesIO()
>>> params = opt.step({"w": np.zeros(2)}, {"w": np.ones(2)})
>>> opt.save(file, params=params)
>>> _ = file.seek(0)
>>> mo.Optimizer(mo.SGD(lr=1.0)).load(file, params={"w": np.zeros(2)}).params
{'w': array([-1., -1.])}
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from multiopt.arrays import Array, Member
from multiopt.backend import backend_for, backend_named, slot_of
from multiopt.errors import answer
from multiopt.layout import COMPUTE_DTYPE, Layout
from multiopt.state.misnamed import by_ending, pairs, remedy
from multiopt.state.record import Saved, Slot
from multiopt.state.tables import PARAM, SavedTable, pieces, table_of_params
from multiopt.step.checks import as_dict, check_layout, check_name, check_no_shared_memory

if TYPE_CHECKING:
    from multiopt.registry import Registry

__all__ = ["Matched", "matched", "tables_of"]


def tables_of(registry: "Registry", params: Mapping[str, Array]) -> list[SavedTable]:
    """The tables of parameters, one for each shape and dtype.

    Large arrays are not copied if NumPy can view their memory.

    Args:
        registry: The state beside which they are saved; it need not have all of the names.
        params: The parameters.

    Raises:
        TypeError: Something is not a usable array, or ``params`` is not a mapping.
        ValueError: A parameter has another shape than its state.
    """
    layouts: dict[str, Layout] = {}
    params = as_dict("params", params)
    for name, param in params.items():
        check_name("params", name)
        label = f"parameter {name!r}"
        layouts[name] = layout = backend_for(param, label).layout(param, label)
        if name in registry:
            group, row = registry.row_of(name)
            check_layout(name, layout, group.layout_at(row))
    alike: dict[tuple[tuple[int, ...], str, bool], list[int]] = {}
    names = list(params)
    for place, layout in enumerate(layouts.values()):
        key = layout.storage_shape, layout.storage_dtype, layout.is_complex
        alike.setdefault(key, []).append(place)
    tables = []
    for (shape, dtype, is_complex), places in alike.items():
        mine = [names[place] for place in places]
        arrays = [params[name] for name in mine]
        rows = partial(_stored, arrays, [layouts[name] for name in mine])
        column = pieces(rows, len(mine), [shape])
        tables.append(table_of_params(Slot(PARAM, shape, dtype), is_complex, mine, places, column))
    return tables


def _stored(params: Sequence[Array], layouts: Sequence[Layout], row: int, k: int) -> np.ndarray:
    """The numbers of the parameter in a row, as a file has them."""
    layout = layouts[row]
    backend = backend_named(layout.library)
    param = backend.as_real(params[row], layout)
    memory = backend.memory(param)
    # A backend may know the addresses of an array but not its dtype.
    if memory is not None and memory.dtype.name == layout.storage_dtype != "bfloat16":
        return memory
    return _narrowed(backend.to_host(backend.to_compute(param, layout)), layout.storage_dtype)


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of a dtype as a file has them; they come as float32 or float64, which hold them."""
    if dtype != "bfloat16":
        return values.astype(dtype, copy=False)
    # NumPy has no bfloat16. It is the upper half of a float32.
    return (np.asarray(values, order="C").view(np.uint32) >> 16).astype(np.uint16)


def _widened(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers in a file as float32 or float64."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(COMPUTE_DTYPE[dtype], copy=False)


class Matched(NamedTuple):
    """Parameters of a file, converted and matched with the arrays that the caller gave.

    Attributes:
        params: The caller's arrays by name, with new ones in the place of those that are not
            written.
        unused: For each parameter of the file that does not go anywhere, the reason.
        missing: The given parameters that the file does not have.
        writes: The arrays to be written, with their values.
    """

    params: dict[str, Array]
    unused: dict[str, str]
    missing: list[str]
    writes: list[tuple[Member, Array]]

    def write(self) -> None:
        """Write the values into the caller's arrays. This cannot fail."""
        for member, values in self.writes:
            member.backend.write(member.param, values)


def matched(
    saved: Mapping[str, Saved] | None,
    params: Mapping[str, Array],
    *,
    some: bool,
    strict: bool,
    cast: bool,
    in_place: bool,
) -> Matched:
    """Check and convert the parameters of a file for arrays of the caller's. Nothing is written.

    Args:
        saved: The parameters of the file, by their names here; None if it has none.
        params: The arrays to fill.
        some: Whether only some names were asked for, so that others may be given as well.
        strict: Whether a parameter that does not fit is an error; otherwise it is left out.
        cast: Whether parameters are converted to the dtype of their array.
        in_place: Whether arrays are written, where their library can.

    Raises:
        TypeError: Something is not a usable array, or ``params`` is not a mapping.
        ValueError: A parameter does not fit, or is on one side only, and ``strict`` is true; or an
            array cannot be written.
    """
    params = as_dict("params", params)
    for name in params:
        check_name("params", name)
    if saved is None and strict:
        raise ValueError("there are no parameters in it: save it with params=, or load without")
    saved = {} if saved is None else saved
    unused = {name: "it is not in params" for name in saved if name not in params}
    missing = [name for name in params if name not in saved]
    if strict and (unused or (missing and not some)):
        sides = {"only the file has": unused, "only params has": () if some else missing}
        text = ", and ".join(f"{who} {', '.join(map(repr, n))}" for who, n in sides.items() if n)
        similar = pairs(missing, lambda name: name in unused, by_ending(unused))
        how = f"{remedy(similar)} would match" if similar else "rename= can match them"
        raise ValueError(
            f"the parameters do not match: {text}. {how}, names= choose some, and strict=False "
            "loads those that match"
        )
    members, arrays = [], []
    for place, (name, param) in enumerate(params.items()):
        if name not in saved:
            continue
        member, why = _member(name, place, param, saved[name], cast)
        if why is not None:
            if strict:
                raise ValueError(f"the loaded parameter {name!r} has {why}")
            unused[name] = f"it has {why}"
            continue
        if in_place:
            member.backend.check_writable(param, f"parameter {name!r}")
        (slot,), (array,) = saved[name].form.slots, saved[name].arrays
        with np.errstate(over="ignore"):
            values = _widened(array, slot.dtype).astype(member.layout.compute_dtype, copy=False)
        members.append(member)
        arrays.append(slot_of(values.reshape(slot.shape), member.layout))
    if in_place:
        check_no_shared_memory(members)
    return Matched(params, unused, missing, _placed(params, members, arrays, in_place))


def _member(
    name: str, place: int, param: Array, saved: Saved, cast: bool
) -> tuple[Member, str | None]:
    """A parameter of the caller's, and why the one in the file does not fit it, if it does not."""
    label = f"parameter {name!r}"
    backend = backend_for(param, label)
    layout = backend.layout(param, label)
    real = backend.as_real(param, layout)
    member = Member(name, place, 0, backend, real, real, layout)
    (slot,) = saved.form.slots
    have = Layout("", slot.shape, slot.dtype, "", saved.form.is_complex)
    if have.shape != layout.shape:
        return member, f"shape {have.shape}; expected {layout.shape}, that of the array in params"
    if have.dtype != layout.dtype and not (cast and have.is_complex == layout.is_complex):
        hint = ": load it with cast=True" if have.is_complex == layout.is_complex else ""
        return (
            member,
            f"dtype {have.dtype}; expected {layout.dtype}, that of the array in params{hint}",
        )
    return member, None


def _placed(
    params: dict[str, Array], members: Sequence[Member], arrays: Sequence[Array], in_place: bool
) -> list[tuple[Member, Array]]:
    """Put new arrays into ``params`` where none is written; return what is to be written."""
    writes, made = [], list[tuple[Member, Array]]()
    for member, values in zip(members, arrays, strict=True):
        backend = member.backend
        if not backend.in_place:
            made.append((member, values))
            continue
        if not in_place:
            label = f"parameter {member.name!r}"
            params[member.name] = copy = answer(label, backend.duplicate, params[member.name])
            member.param = backend.as_real(copy, member.layout)
        writes.append((member, values))
    # All of a library in one call, since JAX puts many arrays on a device as fast as one.
    for backend in {member.backend: None for member, _ in made}:
        mine = [(member, values) for member, values in made if member.backend is backend]
        arrays = backend.to_params([member for member, _ in mine], [values for _, values in mine])
        for (member, _), array in zip(mine, arrays, strict=True):
            is_complex = member.layout.is_complex
            params[member.name] = backend.as_complex(array) if is_complex else array
    return writes
