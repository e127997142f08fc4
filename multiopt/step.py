"""One step of a plan: everything is looked at and checked before anything is changed."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from multiopt.backend import Array, Layout, Now, Result, Scaling, Task, backend_of, by_backend
from multiopt.inputs import apart, check_no_shared_memory, checked_gradient, own_gradient
from multiopt.plan import Outcome, Part, Plan

if TYPE_CHECKING:
    from multiopt.clipping import Norms
    from multiopt.entry import Entry

__all__ = ["Step"]


class _Lent(NamedTuple):
    """The arrays of one parameter that a batch works on in their place.

    Attributes:
        param: The parameter's own memory, or a copy.
        grad: The gradient's own memory, or a copy.
        slots: The slots' own memory, or copies.
        in_place: Whether ``param`` is the parameter's own memory.
        grad_is_copy: Whether ``grad`` is a copy.
    """

    param: np.ndarray
    grad: np.ndarray
    slots: tuple[np.ndarray, ...]
    in_place: bool
    grad_is_copy: bool


class Step:
    """A step of a plan on the arrays of now.

    The methods are called in their order; nothing is changed before ``run``, which does not fail.
    A signal may come between what ``run`` does; who calls it keeps them off.

    Args:
        plan: The names.
        params: Their arrays.
        grads: Their gradients; None for a name that is to be left alone.
        own: Whether the gradients are the parameters' own.
        leaves: Whether it is known that the parameters may have gradients of their own.
        count: The number of the step of the optimizer.
        now: The rules at this step, if the schedules were asked already.
        threads: The largest number of threads, or None.

    Attributes:
        outcome: After ``check``, what the step does; which gradients are clipped ``tell`` adds.
        replaced: After ``check``, by position, the arrays that take the place of parameters that
            cannot be written.
        left_over: After ``tell``, the clipped gradients that could not be left in their own place,
            in the namespace of the computation, each with its parameter and its task.
    """

    outcome: Outcome

    def __init__(
        self,
        plan: Plan,
        params: np.ndarray,
        grads: np.ndarray,
        *,
        own: bool,
        leaves: bool,
        count: int,
        now: Sequence[Now] | None,
        threads: int | None,
    ) -> None:
        """Nothing is looked at yet."""
        self._plan, self._params, self._grads = plan, params, grads
        self._own, self._leaves, self._threads = own, leaves, threads
        self._count, self._now = count, now
        # By position, whether it takes part; None for all.
        self._active: np.ndarray | None = None
        self._skipped: list[int] = []
        # What Python looked at: it is in no batch, or its batch does not take it as it is.
        self._tasks: dict[int, Task] = {}
        self._lent: dict[int, _Lent] = {}
        self._was_apart = True
        self._writes_grads = False
        self._scaling: Scaling | None = None
        self._norms: Norms | None = None
        self._results: list[tuple[int, Task, Result]] = []
        # Parts that work in place, and others, that have worked on copies.
        self._waiting: list[tuple[Part, np.ndarray]] = []
        self._found: list[tuple[Part, np.ndarray, np.ndarray]] = []
        # What is written at last, and where slots and masters go that are not in their place.
        self._writes: list[tuple[Task, Array]] = []
        self._homes: list[tuple[Entry, tuple[Array, ...] | None, Array | None]] = []
        self._steps = plan.steps
        self.replaced: dict[int, Array] = {}
        self.left_over: list[tuple[Array, Task, Array]] = []

    def look(self, closely: Sequence[int]) -> dict[int, Layout]:
        """Look at the arrays.

        Args:
            closely: Positions that Python is to look at in any case.

        Returns:
            By position, the layout of parameters that are not of the layout of their entry.

        Raises:
            TypeError: Something is no usable array.
            ValueError: A gradient has not the shape of its parameter.
        """
        odd = self._plan.look(self._params, self._grads, self._leaves)
        if closely:
            odd = np.union1d(odd, closely)
        return self._examine(odd) if odd.size else {}

    def check(self, policy: str, leave_clipped: bool) -> None:
        """Check and prepare all that may fail, memory included.

        Args:
            policy: What to do about gradients that are not finite.
            leave_clipped: Whether clipped gradients are left behind in the gradients' place.

        Raises:
            TypeError: The arrays cannot be used here and now.
            ValueError: They cannot be written, share memory, or are not finite.
        """
        for backend, tasks in by_backend(self._tasks.values()):
            backend.check_surroundings(f"parameter {tasks[0].name!r}")
        for i, task in self._tasks.items():
            task.backend.check_writable(self._params[i], f"parameter {task.name!r}")
        self._lend(self._tasks)
        # What is left behind clipped is written, once for all who share it.
        self._writes_grads = leave_clipped and self._plan.clipping is not None
        self._was_apart = self._is_apart()
        if not self._was_apart:
            rest = [i for i in self._plan.everything.tolist() if self._has(i)]
            self._examine(np.array([i for i in rest if i not in self._tasks], np.int64))
            # Raises if parameters share memory. Gradients that share it are lent as copies.
            check_no_shared_memory(list(self._tasks.values()))
            self._lend(self._tasks, copy=True)
        if policy != "propagate":
            self._check_finite(policy)
        if self._now is None:
            self._now = self._plan.rules_now(self._active, self._count)
            if self._now:
                self._look_again()
        self._measure()
        self._prepare(self._now, leave_clipped)

    def run(self) -> None:
        """Update the parameters."""
        for part, index in self._waiting:
            self._found.append((part, index, part.batch.run()))
        for task, ready in self._writes:
            task.backend.write(task, ready)
        for entry, slots, master in self._homes:
            if slots is not None:
                entry.slots = slots
            if master is not None:
                entry.master = master
        self._plan.advance(self._steps)

    def tell(self, leave_clipped: bool) -> None:
        """Say which gradients were clipped, and find those that are to be left behind."""
        clipped = self.outcome.clipped
        if clipped is None:
            return
        for part, index, found in self._found:
            clipped[part.where[index]] = found[index]
            if leave_clipped:
                part.backend.touch(self._grads[part.where[clipped[part.where]]])
        if not leave_clipped:
            return
        for i, lent in self._lent.items():
            if clipped[i] and lent.grad_is_copy:
                self.left_over.append((self._params[i], self._tasks[i], lent.grad))
        for i, task, result in self._results:
            if clipped[i] or bool(result.limited):
                self.left_over.append((self._params[i], task, result.grad))

    # Looking

    def _examine(self, positions: np.ndarray) -> dict[int, Layout]:
        moved = {}
        for i in positions.tolist():
            name, param, grad = self._plan.names[i], self._params[i], self._grads[i]
            label = f"parameter {name!r}"
            if grad is None:
                if self._own:
                    own_gradient(name, param)
                self._leave_out(i)
                continue
            backend = backend_of(param, label)
            layout = backend.layout(param, label)
            grad = backend.bare(checked_gradient(name, grad, layout))
            param = backend.bare(param)
            if layout.is_complex:
                param, grad = backend.parts(param), backend.parts(grad)
            entry = self._plan.entries[i]
            if layout != entry.layout:
                moved[i] = layout
            rule = entry.rule
            self._tasks[i] = Task(
                *(name, backend, param, grad, layout, entry.slots),
                *(rule.update, rule.elementwise, entry.master, None),
            )
        return moved

    def _leave_out(self, position: int) -> None:
        if self._active is None:
            self._active = np.ones(len(self._plan.names), bool)
        self._active[position] = False

    def _has(self, position: int) -> bool:
        return self._active is None or bool(self._active[position])

    def _index(self, part: Part) -> np.ndarray:
        """The positions in a part that take part."""
        if self._active is None:
            return part.everything
        return np.flatnonzero(self._active[part.where])

    def _loose(self) -> list[tuple[int, Task]]:
        """What is in no batch."""
        if not self._plan.loose.size:
            return []
        loose = set(self._plan.loose.tolist())
        return [(i, task) for i, task in self._tasks.items() if i in loose and self._has(i)]

    # Memory

    def _lend(self, tasks: Mapping[int, Task], copy: bool = False) -> None:
        """Give batches arrays that they take in the place of those that they do not.

        Args:
            tasks: Whose, by position.
            copy: Whether no gradient's own memory is lent.
        """
        for i, task in tasks.items():
            if self._plan.part_of[i] < 0:
                continue
            part, position = self._plan.parts[self._plan.part_of[i]], int(self._plan.local[i])
            param, grad = (self._memory(task, array) for array in (task.param, task.grad))
            in_place = param is not None and param.flags.writeable
            if param is None or not in_place:
                param = np.array(task.backend.resumed(task), order="C")
            grad_is_copy = grad is None or copy
            if grad is None or copy:
                grad = self._copied(task, task.grad)
            slots = part.batch.slots_of(position)
            if slots is None:
                slots = tuple(self._copied(task, slot) for slot in task.slots)
            lent = _Lent(param, grad, slots, in_place, grad_is_copy)
            self._lent[i] = lent
            part.batch.lend(position, lent.param, lent.grad, lent.slots)

    def _memory(self, task: Task, array: Array) -> np.ndarray | None:
        """The array's own memory, if a batch takes it as it is."""
        memory = task.backend.memory_of(array)
        if memory is None or not (memory.flags.c_contiguous and memory.flags.aligned):
            return None
        return memory if memory.dtype == task.layout.compute_dtype else None

    def _copied(self, task: Task, array: Array) -> np.ndarray:
        copy: np.ndarray = np.array(task.backend.opened(array, task.layout), order="C")
        return copy

    def _is_apart(self) -> bool:
        """Whether what is written shares memory with nothing else that is written or read."""
        plan, writes_grads = self._plan, self._writes_grads
        if not plan.empty_differ(self._params):
            return False
        if not self._tasks and plan.whole is not None and plan.whole.batch.is_apart(writes_grads):
            return True
        elsewhere, written = [], [np.empty((2, 0), np.int64)]
        read: list[np.ndarray] = []
        for i, task in self._tasks.items():
            memory = task.backend.memory(task.param)
            if memory is None or task.layout.device != "cpu" or not memory.size:
                elsewhere.append(task)
            elif i not in self._lent or not self._lent[i].in_place:
                bounds = np.lib.array_utils.byte_bounds(memory)
                written.append(np.array(bounds).reshape(2, 1))
        check_no_shared_memory(elsewhere)
        for part in plan.parts:
            params, grads = part.batch.spans(self._index(part))
            written.append(params)
            (written if writes_grads else read).append(grads)
        return apart(written, read)

    # Gradients

    def _check_finite(self, policy: str) -> None:
        plan = self._plan
        finite = np.ones(len(plan.names), bool)
        for part in plan.parts:
            index = self._index(part)
            finite[part.where[index]] = part.batch.finite(index, self._threads)
        loose = self._loose()
        where = {id(task): i for i, task in loose}
        for backend, tasks in by_backend(task for _, task in loose):
            for task, is_finite in zip(tasks, backend.finite(tasks), strict=True):
                finite[where[id(task)]] = is_finite
        bad = np.flatnonzero(~finite).tolist()
        if bad and policy == "raise":
            names = ", ".join(repr(plan.names[i]) for i in bad)
            raise ValueError(
                f"the gradient of {names} has infinities or NaNs; expected finite numbers, as "
                "on_nonfinite='raise' asks: nothing was changed"
            )
        for i in bad:
            self._leave_out(i)
            self._tasks.pop(i, None)
            self._lent.pop(i, None)
        self._skipped = bad

    def _measure(self) -> None:
        """Measure the norms, and what they scale the gradients by."""
        clipping = self._plan.clipping
        if clipping is None:
            return
        active = self._active
        if active is None:
            active = np.ones(len(self._plan.names), bool)
        self._scaling, self._norms = clipping.scaling(active, self._sums_of_squares)
        for i, task in self._loose():
            task.scales = [float(self._scaling.own[i]), float(self._scaling.shared[i])]
            bound = float(self._scaling.bound[i])
            task.bound = None if bound == np.inf else bound

    def _sums_of_squares(self, where: np.ndarray, own: np.ndarray, factor: float) -> np.ndarray:
        plan = self._plan
        if plan.whole is not None:
            return plan.whole.batch.sums_of_squares(where, own, factor, self._threads)
        sums = np.empty(len(where))
        for number, part in enumerate(plan.parts):
            mine = plan.part_of[where] == number
            if mine.any():
                index = plan.local[where[mine]]
                sums[mine] = part.batch.sums_of_squares(
                    index, own[part.where], factor, self._threads
                )
        loose = [(k, i) for k, i in enumerate(where.tolist()) if plan.part_of[i] < 0]
        place = {}
        for k, i in loose:
            self._tasks[i].scales = [float(own[i])]
            place[id(self._tasks[i])] = k
        for backend, tasks in by_backend(self._tasks[i] for _, i in loose):
            found = backend.sums_of_squares(tasks, factor)
            for task, total in zip(tasks, found, strict=True):
                sums[place[id(task)]] = total
        return sums

    # Preparing

    def _look_again(self) -> None:
        """Make sure that the arrays are where they were: a schedule is the caller's code."""
        odd = self._plan.look(self._params, self._grads, self._leaves)
        if any(i not in self._tasks and self._has(i) for i in odd.tolist()):
            raise ValueError("a schedule changed the arrays of the step that it was asked for")
        for i, lent in self._lent.items():
            part = self._plan.parts[self._plan.part_of[i]]
            part.batch.lend(int(self._plan.local[i]), lent.param, lent.grad, lent.slots)
        if self._was_apart and not self._is_apart():
            raise ValueError("a schedule changed the arrays of the step that it was asked for")

    def _prepare(self, now: Sequence[Now], leave_clipped: bool) -> None:
        """All that may fail of running."""
        plan = self._plan
        loose = self._loose()
        rules = {i: rule for rule, where in now for i in where.tolist()} if loose else {}
        where = {id(task): i for i, task in loose}
        for i, task in loose:
            rule = rules.get(i, plan.entries[i].rule)
            task.scalars = rule.coefficients(int(plan.steps[i]) + 1, task.layout.compute_dtype)
        clipped = None if self._scaling is None else np.zeros(len(plan.names), bool)
        on_devices: dict[int, Any] = {}
        for backend, tasks in by_backend(task for _, task in loose):
            for task, result in zip(tasks, backend.run(tasks), strict=True):
                i = where[id(task)]
                self._results.append((i, task, result))
                self._place(i, task, result.param)
                self._homes.append((plan.entries[i], result.slots, result.master))
                if clipped is not None:
                    clipped[i] = any(scale != 1 for scale in task.scales)
                if task.bound is not None:
                    on_devices[i] = result.limited
        for number, part in enumerate(plan.parts):
            self._prepare_part(number, part, now, leave_clipped)
        self._place_lent()
        self._steps = plan.steps + (1 if self._active is None else self._active)
        self.outcome = Outcome(self._active, tuple(self._skipped), self._norms, clipped, on_devices)

    def _prepare_part(
        self, number: int, part: Part, now: Sequence[Now], leave_clipped: bool
    ) -> None:
        plan, index, scaling, steps = self._plan, self._index(part), self._scaling, self._plan.steps
        if part is not plan.whole:
            split = [(rule, where[plan.part_of[where] == number]) for rule, where in now]
            now = [Now(rule, plan.local[where]) for rule, where in split if where.size]
            scaling = None if scaling is None else scaling.at(part.where)
            steps = steps[part.where]
        part.batch.prepare(index, steps, now, scaling, leave_clipped, self._threads)
        if not part.backend.in_place:
            # It works on copies alone. New arrays of what comes out of them may fail to be made.
            self._found.append((part, index, part.batch.run()))
            return
        positions = part.where[index]
        if self._lent:
            copied = [i for i, lent in self._lent.items() if not lent.in_place]
            positions = positions[~np.isin(positions, copied)]
        part.backend.touch(self._params[positions])
        self._waiting.append((part, index))

    def _place_lent(self) -> None:
        """Let what batches were lent go where it belongs."""
        plan = self._plan
        for i, lent in self._lent.items():
            task = self._tasks[i]
            closed = task.backend.closed
            slots = master = None
            if task.master is not None:
                master = closed(lent.param, task.param)
            if plan.parts[plan.part_of[i]].batch.slots_of(int(plan.local[i])) is None:
                slots = tuple(closed(slot, task.param) for slot in lent.slots)
            if slots is not None or master is not None:
                self._homes.append((plan.entries[i], slots, master))
        copied = {i: lent for i, lent in self._lent.items() if not lent.in_place}
        where = {id(self._tasks[i]): i for i in copied}
        for backend, tasks in by_backend(self._tasks[i] for i in copied):
            computed = [copied[where[id(task)]].param for task in tasks]
            for task, ready in zip(tasks, backend.all_ready(tasks, computed), strict=True):
                self._place(where[id(task)], task, ready)

    def _place(self, position: int, task: Task, ready: Array) -> None:
        """Let an update that is computed in a copy be written, or take the parameter's place."""
        if task.backend.in_place:
            self._writes.append((task, ready))
        else:
            whole = task.backend.whole
            self.replaced[position] = whole(ready) if task.layout.is_complex else ready
