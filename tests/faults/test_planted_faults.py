"""The suite fails when the code is wrong: faults are planted in a copy, which is then tested."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """A change of one place, and the test that must notice it."""

    what: str
    file: str
    old: str
    new: str
    test: str


FAULTS = [
    Fault(
        "eps inside the root",
        "multiopt/rules/adam.py",
        "c.root_scale * xp.sqrt(exp_avg_sq) + c.eps",
        "c.root_scale * xp.sqrt(exp_avg_sq + c.eps)",
        "rules/test_peers.py::test_two_hundred_steps_follow_the_peer[Adam()-float64]",
    ),
    Fault(
        "one clock for all names",
        "backends/multiopt_kernels/cpu/update.py",
        "step, bound = steps[r] + 1, bounds[r]",
        "step, bound = steps[index[k0]] + 1, bounds[r]",
        "engines/test_backends.py::test_a_late_parameter_equals_one_that_started_alone",
    ),
    Fault(
        "clipping switched off",
        "backends/multiopt_kernels/cpu/norms.py",
        "owns[r] = number(coefficient(bounds[r], found, eps[r]))",
        "owns[r] = 1.0",
        "registry/test_clipping.py::test_clipped_steps_equal_those_of_the_rule_as_it_stands",
    ),
    Fault(
        "value clipping switched off",
        "backends/multiopt_kernels/cpu/update.py",
        "grad = clamp(grad, bound)\n{element}",
        "pass\n{element}",
        "registry/test_clipping.py::test_value_clipping_is_exact",
    ),
    Fault(
        "a step that does nothing",
        "multiopt/reference.py",
        "self.backend.write(computed.member.param, computed.param)",
        "pass",
        "engines/test_backends.py::test_every_rule_over_fifty_steps[numpy-compiled-SGD()-float32]",
    ),
    Fault(
        "a sum whose parts have too many bits",
        "multiopt/rules/pieces.py",
        "(53 - bits(numbers.shape[0])) // 2",
        "(55 - bits(numbers.shape[0])) // 2",
        "rules/test_exact_sums.py",
    ),
    Fault(
        "a global norm that is rounded for each parameter",
        "multiopt/step/clip.py",
        "norm = sum(others, total).norm()",
        "norm = float(np.sqrt(sum(x.rounded() for x in (total, *others))))",
        "registry/test_norms.py::test_a_global_norm_over_libraries_is_rounded_once",
    ),
    Fault(
        "a length in the order of the library",
        "multiopt/rules/lamb.py",
        "norm(xp, param), norm(xp, direction)",
        "norm(xp, param), xp.sqrt(xp.sum(xp.asarray(direction, dtype=xp.float64) ** 2))",
        "rules/test_whole_rules.py::test_lamb_is_the_text_of_the_spec",
    ),
    Fault(
        "arrays of a whole rule in any order",
        "multiopt/reference.py",
        "(_in_rows(xp, x) for x in (param, grad))",
        "(xp.asarray(x, copy=True) for x in (param, grad))",
        "rules/test_whole_rules.py::test_arrays_come_in_row_major_order",
    ),
    Fault(
        "a limb that is not carried",
        "backends/multiopt_kernels/cpu/sums.py",
        "limbs[k + 1] += limbs[k] >> LIMB",
        "pass",
        "registry/test_norms.py::test_norms_are_the_definition[numpy-compiled-moderate]",
    ),
    Fault(
        "an element that is counted twice",
        "backends/multiopt_kernels/cpu/norms.py",
        "add(limbs, row, first, min(BLOCK, end - first), own)",
        "add(limbs, row, first, min(BLOCK + 1, end - first), own)",
        "registry/test_norms.py::test_norms_are_the_definition[numpy-compiled-moderate]",
    ),
    Fault(
        "sums of a pass that are not added",
        "backends/multiopt_kernels/cpu/whole_group.py",
        "self._known += self._of_pass",
        "self._known = self._of_pass",
        "engines/test_whole_kernels.py::test_lamb_is_the_rule_as_it_stands[None-2-float32]",
    ),
    Fault(
        "a slot that is read after it has changed",
        "backends/multiopt_kernels/passes.py",
        "held = {value: k for value, k in self._held.items() if k not in writes}",
        "held = dict(self._held)",
        "engines/test_whole_kernels.py::test_what_cannot_be_cut_is_not_traceable",
    ),
    Fault(
        "pieces of a tall column that are not added",
        "backends/multiopt_kernels/cpu/numbers.py",
        "deposit(limbs, lower, exponent - LOWEST)",
        "pass",
        "engines/test_whole_kernels.py::test_adafactor_is_the_rule_as_it_stands[None-1-float64]",
    ),
    Fault(
        "bits that two pieces do not hold",
        "backends/multiopt_kernels/cpu/numbers.py",
        "<= 2 * BITS - FRACTION - 1",
        "<= 2 * BITS",
        "engines/test_whole_kernels.py::test_a_tie_that_the_smallest_number_breaks",
    ),
    Fault(
        "means of columns that count the columns",
        "backends/multiopt_kernels/cpu/matrix_text.py",
        "inverse(rows) * sum_of_column(room, j, is_tall)",
        "inverse(columns) * sum_of_column(room, j, is_tall)",
        "engines/test_whole_kernels.py::test_hyperparameters_of_adafactor",
    ),
    Fault(
        "lanes that overflow",
        "backends/multiopt_kernels/cpu/sums.py",
        "FEW = 1024",
        "FEW = 2**20",
        "registry/test_norms.py::test_more_squares_than_the_lanes_of_a_kernel_hold",
    ),
    Fault(
        "products and sums contracted into one operation",
        "backends/multiopt_kernels/cpu/toolbox.py",
        '"error_model": "numpy",',
        '"error_model": "numpy", "fastmath": {"contract"},',
        "engines/test_backends.py::test_every_rule_over_fifty_steps[numpy-compiled-SGD()-float32]",
    ),
    Fault(
        "blocks in another order of operations",
        "backends/multiopt_kernels/blocks/tape.py",
        "np.bitwise_xor(bits, b, out=bits)",
        "np.bitwise_or(bits, b, out=bits)",
        "engines/test_tape.py::test_every_rule_is_traced_and_equal",
    ),
    Fault(
        "a stride taken for another",
        "backends/multiopt_kernels/cpu/walk.py",
        "steps = FIRST_AXIS + PARAM_STEP + which",
        "steps = FIRST_AXIS + PARAM_STEP",
        "engines/test_strides.py::test_large_arrays_are_walked_by_all_threads",
    ),
    Fault(
        "flags and dtypes not looked at again",
        "backends/multiopt_kernels/cpu/look.py",
        "if ndim != row[NDIM] or (halves(o + 64)[0] & needed) != needed or a[5] != descr:",
        "if ndim != row[NDIM]:",
        "registry/test_staleness.py::test_an_array_may_become_another",
    ),
    Fault(
        "a memory order taken for another",
        "backends/multiopt_kernels/cpu/look.py",
        "strides[d] != expected[d] * itemsize",
        "strides[d] != strides[d]",
        "engines/test_orders.py::test_an_order_may_change[5-numpy-compiled]",
    ),
    Fault(
        "a kernel found under the name of another rule",
        "backends/multiopt_kernels/cpu/kernels.py",
        "[text, dtype, storage_dtype], make, update)",
        "[dtype, storage_dtype], make, update)",
        "engines/test_kernels.py::test_an_edited_rule_is_compiled_again_and_ten_runs_leave_one_file",
    ),
    Fault(
        "a literal in float64",
        "backends/multiopt_kernels/cpu/update.py",
        'lambda x: f"dtype({x!r})"',
        "repr",
        "engines/test_trace.py::test_literals_are_of_the_working_dtype_on_every_library",
    ),
    Fault(
        "a switch that chooses what it should not",
        "backends/multiopt_kernels/recorder.py",
        '"where", (switch.number, x, y)',
        '"where", (switch.number, y, x)',
        "engines/test_trace.py::test_switches_that_numbers_turn",
    ),
    Fault(
        "a division by a number that has a trace",
        "backends/multiopt_kernels/operations.py",
        'if function == "divide" and Kind.NUMBER in kinds:',
        'if function == "none":',
        "engines/test_trace.py::test_an_update_is_refused_by_name",
    ),
    Fault(
        "somebody's rule traced once and for all",
        "backends/multiopt_kernels/engines.py",
        " or not _is_ours(rule)",
        "",
        "engines/test_trace.py::test_an_edited_rule_is_a_new_one_for_the_next_optimizer[SCALE-3.0-compiled]",
    ),
    Fault(
        "JAX computed by XLA",
        "backends/multiopt_jax/backend.py",
        'return layout.device.startswith("cpu")',
        "return False",
        "registry/test_clipping.py::test_norms_neither_overflow_nor_underflow",
    ),
    Fault(
        "roots taken by torch on the CPU",
        "backends/multiopt_torch/backend.py",
        'return layout.device == "cpu"',
        "return False",
        "engines/test_backends.py::test_every_rule_over_fifty_steps[torch-Adam(lr=0.1,eps=0.1)-float32]",
    ),
    Fault(
        "a write that torch does not see",
        "backends/multiopt_torch/backend.py",
        "torch.autograd.graph.increment_version(tensors.tolist())",
        "pass",
        "engines/test_torch.py",
    ),
    Fault(
        "16 bits computed in 16 bits",
        "multiopt/layout.py",
        '"float16": "float32",',
        '"float16": "float16",',
        "engines/test_backends.py::test_sixteen_bits_keep_float32_slots",
    ),
    Fault(
        "an L2 penalty computed where it is off",
        "multiopt/rules/decay.py",
        "return grad + c.weight_decay * param if c.penalizes else grad",
        "return grad + c.weight_decay * param",
        "registry/test_registry.py::test_a_decay_that_is_off_is_not_computed",
    ),
    Fault(
        "pending state lost by saving",
        "multiopt/stateful.py",
        "[*held(known), *waiting(pending_now(known))]",
        "[*held(known)]",
        "state/test_checkpoint.py::test_pending_state_survives_save_load_save",
    ),
    Fault(
        "settings that a file does not have",
        "multiopt/stateful.py",
        "settings=settings, params=param_tables",
        "settings=None, params=param_tables",
        "state/test_resumed_runs.py::test_a_run_goes_on_in_a_new_process",
    ),
    Fault(
        "a bfloat16 parameter that is read as the wrong half",
        "multiopt/state/params.py",
        "(stored.astype(np.uint32) << 16)",
        "(stored.astype(np.uint32) << 15)",
        "state/test_params.py::test_parameters_go_from_any_library_to_any[torch-bfloat16]",
    ),
    Fault(
        "a step that Ctrl-C can tear",
        "multiopt/guard.py",
        "self._came = number, frame",
        "raise KeyboardInterrupt",
        "faults/test_faults.py::test_an_interrupt_leaves_each_name_as_before_or_as_after[plain]",
    ),
    Fault(
        "gradients that do not fit their parameters",
        "multiopt/step/checks.py",
        'if have != want:\n            raise error(\n                f"{label} has {what}',
        'if have is None:\n            raise error(\n                f"{label} has {what}',
        "registry/test_errors.py",
    ),
    Fault(
        "rows of a step in another order than its names",
        "multiopt/table.py",
        "rows = codes - number * GROUP if number else codes",
        "rows = np.sort(codes - number * GROUP)",
        "registry/test_rows.py::test_every_name_is_as_if_it_were_alone",
    ),
    Fault(
        "a number that is set and not used",
        "multiopt/columns.py",
        "self.numbers[rows, column] = values[column]",
        "self.numbers[rows[:1], column] = values[column]",
        "registry/test_rows.py::test_every_name_is_as_if_it_were_alone",
    ),
    Fault(
        "a schedule that is asked for one of its names",
        "multiopt/step/numbers.py",
        "(step + 1, seen + 1), rows[which])",
        "(step + 1, seen + 1), rows[which[:1]])",
        "registry/test_rows.py::test_every_name_is_as_if_it_were_alone",
    ),
    Fault(
        "a rounding to 16 bits that is not to even",
        "backends/multiopt_kernels/cpu/narrow.py",
        "u32(0x7FFF) + ((u >> u32(16)) & u32(1)))",
        "u32(0x8000))",
        "engines/test_low_precision.py::test_conversions_are_those_of_numpy",
    ),
    Fault(
        "a NaN that becomes an infinity when it is rounded",
        "backends/multiopt_kernels/cpu/narrow.py",
        "found = u32(0x7E00) if size > infinity else found",
        "found = found",
        "engines/test_low_precision.py::test_conversions_are_those_of_numpy",
    ),
    Fault(
        "a row that is still taken for a copy in float32",
        "backends/multiopt_kernels/cpu/table.py",
        "self._table[row, WIDE] = self._table[row, WALK] = 0\n",
        "self._table[row, WALK] = 0\n",
        "engines/test_low_precision.py::test_copies_are_lent_of_what_is_not_aligned",
    ),
    Fault(
        "a master copy of what somebody else has changed",
        "backends/multiopt_kernels/cpu/update.py",
        "param = master if load(store(master)) == param else param",
        "param = master",
        "engines/test_low_precision.py::test_a_parameter_that_was_set_is_taken_as_it_is",
    ),
    Fault(
        "a clock that is counted by the kernel and by the host",
        "backends/multiopt_kernels/cpu/group.py",
        "self._shares.run()\n            if self.backend.in_place:",
        "self._shares.run()\n        if self.backend.in_place:",
        "registry/test_rows.py::test_every_name_is_as_if_it_were_alone",
    ),
    Fault(
        "a step that goes on with the row of a name that is forgotten",
        "multiopt/registry.py",
        "for n, made in self.settings.items() if n not in gone}\n            self.last = NOTHING",
        "for n, made in self.settings.items() if n not in gone}",
        "registry/test_rows.py::test_every_name_is_as_if_it_were_alone",
    ),
    Fault(
        "a row with the columns of the one before it",
        "multiopt/columns.py",
        "getattr(self, name)[rows] = value",
        "pass",
        "registry/test_rows.py::test_every_name_is_as_if_it_were_alone",
    ),
]


#: Processes that have imported the libraries, which takes 4 of the 7 s of most tests here.
BEGUN = multiprocessing.get_context("forkserver")
LIBRARIES = ["array_api_strict", "jax", "numba", "pytest", "torch"]

#: Added to the answer of pytest: a program that raises ends with 1, as tests that fail do.
ENDED = 100

PROGRAM = """
import os, sys, pytest
sys.stdout = sys.stderr = open(os.devnull, "w")
os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stderr.fileno(), 2)
os.chdir({folder!r})
sys.exit({ended} + pytest.main({arguments!r}))
"""


def run_in_copy(folder: Path, *tests: str) -> int:
    """Run tests in a copy of the project; 0 if they pass, 1 if one fails."""
    BEGUN.set_forkserver_preload(LIBRARIES)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    program = PROGRAM.format(folder=str(folder), arguments=arguments, ended=ENDED)
    process = BEGUN.Process(target=exec, args=(program, {}))
    process.start()
    process.join()
    return (process.exitcode or 0) - ENDED


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the tests need."""
    for name in ("multiopt", "backends", "spec", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_noticed(project: Path, fault: Fault) -> None:
    path = project / fault.file
    source = path.read_text()
    assert source.count(fault.old) == 1, "the fault no longer fits the code"
    path.write_text(source.replace(fault.old, fault.new))
    assert run_in_copy(project, fault.test) == 1


#: Faults that ``check_rule`` finds too, and a rule that shows them.
RULES = {
    "eps inside the root": "mo.Adam(), vectors='spec/vectors/adam.json'",
    "one clock for all names": "mo.Adam()",
    "value clipping switched off": "mo.SGD()",
    "products and sums contracted into one operation": "mo.SGD(momentum=0.9, weight_decay=0.1)",
    "sums of a pass that are not added": "mo.LAMB()",
    "none": "mo.SGD()",
}


@pytest.mark.parametrize("what", RULES)
def test_check_rule_finds_faults(project: Path, what: str) -> None:
    for fault in FAULTS:
        if fault.what == what:
            path = project / fault.file
            path.write_text(path.read_text().replace(fault.old, fault.new))
    program = f"""
import multiopt as mo
from multiopt.testing import check_rule
assert mo.__file__.startswith({str(project)!r})
try:
    check_rule({RULES[what]})
except AssertionError as error:
    print("found:", error)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (project, project / "backends")))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=project, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("found:") == (what != "none"), done.stdout


def test_the_copy_passes_without_a_fault(project: Path) -> None:
    # Otherwise a copy that fails for a reason of its own would look like a fault noticed.
    assert run_in_copy(project, *dict.fromkeys(fault.test for fault in FAULTS)) == 0
