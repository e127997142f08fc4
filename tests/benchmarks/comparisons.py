"""What is measured, against what, and what it should reach: one table."""

from dataclasses import dataclass
from typing import Any

import multiopt as mo
from multiopt.bench.paired import Side
from multiopt.bench.sides import JAX, OPTAX, TEXTBOOK
from tests.benchmarks import files, low_precision, schedulers, svi, varies
from tests.benchmarks.memory import stream
from tests.benchmarks.norms import accumulated, dot
from tests.benchmarks.orders import every_second, fortran, last_channels, lying, reverse, rows
from tests.benchmarks.ours import distinct, drop_in, on_numpy, on_torch
from tests.benchmarks.peers import in_pyro, in_sklearn, in_torch, in_torch_adafactor

__all__ = [
    "AT_LEAST",
    "COMPARISONS",
    "FASTER",
    "MIB",
    "ROWS",
    "SECONDS",
    "TIME",
    "WITHOUT_FAST",
    "Comparison",
]

# Units of a result: their time by ours, our time by theirs, and quantities by themselves.
FASTER, SHARE = "times as fast", "of the limit"
TIME, EACH = "of its time", "of its time, a parameter"
SECONDS, MIB = "s", "MiB"
#: Of these, a target is a lower bound; of the others, an upper one.
AT_LEAST = (FASTER, SHARE)

#: The row that runs the rules in blocks of NumPy's operations, as an install without Numba does.
WITHOUT_FAST = "without-fast"


@dataclass(frozen=True)
class Comparison:
    """Two sides on one work.

    Args:
        row: What ``--only`` calls it, with others.
        work: A key of ``works``.
        ours: Our side.
        against: The other.
        hot: The target of hot turns in issue 3, if it has one. It holds for float32 Adam on two
            cores.
        cold: The target of cold turns.
        one_thread: The target of either with one thread, if that is another.
        unit: What is reported.
        turns: Which turns are taken.
        threaded: Whether to measure with one thread, with two and so on, or just with the most.
        against_work: The other side's work, if not the same; then the time counts a parameter.
        alike: Whether both sides compute the same numbers.
    """

    row: str
    work: str
    ours: Side
    against: Side
    hot: float | None = None
    cold: float | None = None
    one_thread: float | None = None
    unit: str = FASTER
    turns: tuple[str, ...] = ("hot", "cold")
    threaded: bool = False
    against_work: str | None = None
    alike: bool = True

    @property
    def needs(self) -> tuple[str, ...]:
        """The modules without which it cannot be measured."""
        return tuple(dict.fromkeys(self.ours.needs + self.against.needs))

    def target(self, turn: str, threads: int) -> float | None:
        """The target of hot or of cold turns."""
        if threads == 1 and self.one_thread is not None:
            return self.one_thread
        return self.hot if turn == "hot" else self.cold


NUMPY, TORCH, FUSED = on_numpy(), on_torch(), in_torch("fused")
BLOCKS = on_numpy("NumPy without fast")
CLIP = {"clip_norm": 1.0}
# Every gradient of a work is longer.
OWN, TOGETHER = mo.Clip(norm=1.0), mo.Clip(global_norm=1.0)
CLIPPED_IN_TORCH = in_torch("fused", global_norm=1.0)

#: Where a variation of ten arrays has a target of its own.
VARIATION_TARGETS = {"a gradient missing": 1.2, "two dtypes": 2.1, "two rules": 1.9}

NORM: Any = {"unit": TIME, "turns": ("hot",), "threaded": True, "alike": False}
CHECKPOINT: Any = {"unit": TIME, "turns": ("cold",), "alike": False}

COMPARISONS = (
    Comparison("pyro", "many small", drop_in(), in_pyro(), 120, 40),
    Comparison("pyro", "many small", drop_in(CLIP), in_pyro(CLIP), 250, 80),
    Comparison("svi", "many small", svi.with_drop_in(), svi.with_pyro(), turns=("cold",)),
    Comparison("svi", "many small", svi.with_drop_in(CLIP), svi.with_pyro(CLIP), turns=("cold",)),
    Comparison("torch", "many small", TORCH, FUSED, 10, 8),
    Comparison("torch", "many small", TORCH, in_torch("foreach")),
    Comparison("torch", "many small", TORCH, in_torch("loop")),
    Comparison("torch", "few small", TORCH, FUSED, 6),
    Comparison("torch", "many middling", TORCH, FUSED),
    Comparison("torch", "guide", TORCH, FUSED),
    Comparison("torch", "vae", TORCH, FUSED, threaded=True),
    Comparison("optax", "many small", NUMPY, OPTAX, 30),
    Comparison("optax", "many small", JAX, OPTAX),
    Comparison("large", "large", TORCH, FUSED, 1.05, unit=TIME, threaded=True),
    Comparison("large", "large", NUMPY, FUSED, 1.05, unit=TIME, threaded=True),
    Comparison("textbook", "large", NUMPY, TEXTBOOK, 10, threaded=True),
    Comparison("textbook", "large", NUMPY, in_sklearn(), threaded=True),
    Comparison("textbook", "many small", NUMPY, TEXTBOOK),
    Comparison("textbook", "many small", NUMPY, in_sklearn()),
    Comparison(WITHOUT_FAST, "large", BLOCKS, TEXTBOOK, 3),
    Comparison(WITHOUT_FAST, "many small", BLOCKS, TEXTBOOK, 8),
    Comparison(
        WITHOUT_FAST, "many small", distinct(), BLOCKS, 1.3, unit=TIME, turns=("hot",), alike=False
    ),
    *(
        Comparison(WITHOUT_FAST, work, accumulated(), dot(), 1.2, **NORM)
        for work in ("a hundredth", "a tenth", "large")
    ),
    Comparison(
        "distinct", "many small", distinct(), NUMPY, 1.1, unit=TIME, turns=("hot",), alike=False
    ),
    *(
        Comparison(
            *("clip", "large", on_numpy(f"NumPy, {word}", clip), NUMPY, 2.0, 2.0, 1.6),
            unit=TIME,
            threaded=True,
            alike=False,
        )
        for word, clip in (("norm clipped", OWN), ("global norm clipped", TOGETHER))
    ),
    Comparison(
        *("clip", "many small", on_numpy("NumPy, norm clipped", OWN), NUMPY, 2.0, 2.0),
        unit=TIME,
        alike=False,
    ),
    *(
        Comparison(
            *("clip", work, on_torch("torch, global norm clipped", TOGETHER), CLIPPED_IN_TORCH),
            hot=target,
            cold=target,
            one_thread=0.95,
            unit=TIME,
            threaded=True,
        )
        for work, target in (("forty", 0.8), ("large", 1.1))
    ),
    Comparison(
        *("whole", "forty", on_numpy("NumPy, LAMB", rule=mo.LAMB()), NUMPY, 2.8, 2.8),
        unit=TIME,
        threaded=True,
        alike=False,
    ),
    Comparison(
        *("whole", "many small", on_torch("torch, LAMB", rule=mo.LAMB()), FUSED, 6, 6),
        alike=False,
    ),
    *(
        Comparison(
            *("whole", work, on_torch("torch, Adafactor", rule=mo.Adafactor())),
            in_torch_adafactor(),
            *(target, target),
            threaded=work == "forty",
        )
        for work, target in (("forty", 1.4), ("many small", 25))
    ),
    *(
        Comparison(
            *("16 bits", "large", low_precision.ours(dtype, **options), low_precision.fused(dtype)),
            hot=target,
            cold=target,
            unit=TIME,
            threaded=True,
            alike=False,
        )
        for dtype, plain, with_masters in (("bfloat16", 0.7, 0.8), ("float16", 1.0, 1.3))
        for options, target in (({}, plain), ({"master_weights": True}, with_masters))
    ),
    *(
        Comparison(
            *("16 bits", "large", low_precision.ours(dtype), low_precision.ours("float32"), 0.9),
            unit=TIME,
            turns=("hot",),
            threaded=True,
            alike=False,
        )
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Comparison(
            *("16 bits", "many small", low_precision.ours(dtype), low_precision.fused(dtype), 12),
            turns=("hot",),
            alike=False,
        )
        for dtype in ("bfloat16", "float16")
    ),
    *(
        Comparison(
            *("orders", work, lying(name, param, grad), NUMPY, target, target),
            unit=TIME,
            threaded=True,
        )
        for work, target, name, param, grad in (
            ("matrix", None, "Fortran order", fortran, fortran),
            ("images", None, "channels_last", last_channels, last_channels),
            ("large", 3.0, "[::2]", every_second, every_second),
            ("matrix", 3.0, "[::2, ::2]", every_second, every_second),
            ("matrix", 3.0, "reversed", reverse, reverse),
            ("matrix", 3.5, "parameter Fortran, gradient C", fortran, rows),
            ("matrix", 3.5, "parameter C, gradient Fortran", rows, fortran),
        )
    ),
    *(
        Comparison(
            "many",
            "most small",
            side,
            side,
            3,
            unit=EACH,
            turns=("hot",),
            against_work="many small",
            alike=False,
        )
        for side in (NUMPY, TORCH)
    ),
    *(
        Comparison("checkpoint", "large", side(library), against, cold=1.6, **CHECKPOINT)
        for library in ("NumPy", "torch")
        for side, against in (
            (files.save, files.safetensors_save()),
            (files.load, files.safetensors_load()),
        )
    ),
    *(
        Comparison(
            *("varies", "few small", varies.varying(what), NUMPY, VARIATION_TARGETS.get(what, 2.5)),
            unit=TIME,
            turns=("hot",),
            alike=False,
        )
        for what in varies.VARIATIONS
    ),
    *(
        Comparison("varies", work, side, NUMPY, target, unit=TIME, turns=("hot",), alike=False)
        for work, side, target in (
            ("many small", varies.changed_rate(), 1.15),
            ("many small", varies.varying("a schedule"), 1.15),
            ("many new", varies.one_new(), 2.0),
        )
    ),
    *(
        Comparison(
            *("varies", work, varies.drawn(library), varies.in_turn(library), target),
            unit=TIME,
            turns=("hot",),
            alike=False,
        )
        for library, targets in (("NumPy", (1.3, 1.8)), ("torch", (1.3, 2.2)))
        for work, target in zip(("many small", "thousands"), targets, strict=True)
    ),
    *(
        Comparison(
            "varies", work, side("drop-in"), side("pyro.optim"), target, alike=False, turns=("hot",)
        )
        for work, side, target in (
            ("many small", varies.drawn_by, 35),
            ("thousands", varies.drawn_by, 35),
            ("two thousand", varies.one_of_all, 2.5),
            ("many small", varies.moved_by, 20),
        )
    ),
    *(
        Comparison(
            *("scheduler", work, schedulers.ours(each), schedulers.ours(each, 1.0), 1.1),
            unit=TIME,
            turns=("hot",),
            alike=False,
        )
        for work, each in (
            ("few small", False),
            ("hundred small", False),
            ("many small", False),
            ("many small", True),
        )
    ),
    *(
        Comparison(
            *("scheduler", work, schedulers.ours(each), schedulers.fused(each), target, target)
        )
        for work, each, target in (
            ("few small", False, None),
            ("hundred small", False, None),
            ("many small", False, 8),
            ("many small", True, 8),
        )
    ),
    Comparison(
        *("stream", "beyond", NUMPY, stream()),
        unit=SHARE,
        turns=("hot",),
        threaded=True,
        alike=False,
    ),
)

#: What ``--only`` can name. The last ones are measured in processes of their own.
ROWS = (
    *dict.fromkeys(c.row for c in COMPARISONS),
    *("replicas", "ranks", "memory", "import", "first-step"),
)
