"""The mean over ranks: added in the order of the ranks, rounded once, and taken by buckets."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist

from multiopt.backend import backend_for
from multiopt.distributed import packing
from multiopt.distributed.packing import BUCKET, vectors_of
from multiopt.distributed.reduction import broadcast, mean
from multiopt.distributed.transport import Transport
from tests.ranks.processes import on_ranks
from tests.ranks.training import rank_order_mean

SHAPES = {"empty": (0, 2), "one": (), "few": (7,), "many": (41, 5)}
DTYPES = "float16", "bfloat16", "float32", "float64", "complex64", "complex128"


def _gradient(rank: int, name: str, dtype: str) -> np.ndarray:
    draw = np.random.default_rng([rank, *name.encode(), *dtype.encode()])
    shape = SHAPES[name]
    # Over so many powers of two that the order of addition shows.
    x = draw.standard_normal(shape) * 2.0 ** draw.integers(-9, 9, shape)
    if dtype.startswith("complex"):
        x = x + 1j * draw.standard_normal(shape)
    return np.asarray(x, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def _has(rank: int, name: str, dtype: str) -> bool:
    return (rank + len(name) + len(dtype)) % 5 > 0


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _means(reduction: str, bucket: int) -> dict[str, Any]:
    rank, sent = dist.get_rank(), []

    class Watched(Transport):
        def all_to_all(self, received: torch.Tensor, part: torch.Tensor) -> None:
            sent.append(part.nbytes)
            super().all_to_all(received, part)

    transport = Watched()
    packing.BUCKET = bucket
    arrays: dict[str, Any] = {}
    for dtype in DTYPES:
        for name in SHAPES:
            arrays[f"{dtype} {name} numpy"] = _gradient(rank, name, dtype)
            arrays[f"{dtype} {name} torch"] = _tensor(_gradient(rank, name, dtype))
    # As gradients may be: read-only, with gaps, in another order, conjugates.
    arrays["float64 few numpy"].flags.writeable = False
    arrays["float32 many numpy"] = np.asfortranarray(arrays["float32 many numpy"])
    arrays["float64 many torch"] = arrays["float64 many torch"].T.contiguous().T
    arrays["complex64 many torch"] = arrays["complex64 many torch"].conj().resolve_conj().conj()
    arrays["float32 few torch"] = (
        torch.complex(torch.zeros(7), -arrays["float32 few torch"]).conj().imag
    )
    layouts = {name: backend_for(x, name).layout(x, name) for name, x in arrays.items()}
    grads = {name: x for name, x in arrays.items() if _has(rank, *name.split()[1::-1])}
    try:
        found = mean(transport, vectors_of(layouts, transport.size), grads, reduction)
        values = broadcast(transport, layouts, arrays if rank == 1 else {}, 1)
    finally:
        packing.BUCKET = BUCKET
    assert {backend_for(x, name).layout(x, name) == layouts[name] for name, x in found.items()} == {
        True
    }
    assert max(sent, default=0) <= max(bucket, 8 * transport.size)
    assert len(values) == (0 if rank == 1 else len(arrays))
    return {"mean": _bytes(found), "values": _bytes(values)}


def _bytes(arrays: dict[str, Any]) -> dict[str, bytes]:
    found = {}
    for name, x in arrays.items():
        host = (
            x
            if isinstance(x, np.ndarray)
            else x.contiguous().view(torch.uint8).numpy()
            if x.ndim
            else x.reshape(1).view(torch.uint8).numpy()
        )
        found[name] = host.tobytes()
    return found


@pytest.mark.parametrize("bucket", [500, BUCKET])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_are_added_in_the_order_of_the_ranks(ranks: int, bucket: int) -> None:
    results = on_ranks(ranks, _means, "ordered", bucket)
    for dtype in DTYPES:
        for name in SHAPES:
            every = [_gradient(rank, name, dtype) for rank in range(ranks)]
            has = [_has(rank, name, dtype) for rank in range(ranks)]
            expected = rank_order_mean(
                [x if h else np.zeros_like(x) for x, h in zip(every, has, strict=True)]
            ).tobytes()
            for rank, result in enumerate(results):
                for library in ("numpy", "torch"):
                    key = f"{dtype} {name} {library}"
                    assert result["mean"][key] == expected, key
                    if rank != 1:
                        assert result["values"][key] == every[1].tobytes(), key


def test_another_order_would_give_other_numbers() -> None:
    every = [_gradient(rank, "many", "float32") for rank in range(3)]
    orders = [
        rank_order_mean([every[k] for k in order]).tobytes() for order in ((0, 1, 2), (2, 1, 0))
    ]
    assert orders[0] != orders[1]


def test_fast_leaves_the_order_to_the_process_group() -> None:
    ordered, fast = (on_ranks(2, _means, how, 500) for how in ("ordered", "fast"))
    assert ordered == fast  # two numbers have one sum


def _sixteen_bits() -> list[list[float]]:
    # The sum is beyond float16, and 2049 / 3 is rounded once.
    grads = {"large": np.full(2, 60_000.0, np.float16), "odd": np.full(2, 683.0, np.float16)}
    layouts = {name: backend_for(x, name).layout(x, name) for name, x in grads.items()}
    vectors = vectors_of(layouts, multiple=3)
    found = [mean(Transport(), vectors, grads, kind) for kind in ("ordered", "fast")]
    return [[*one["large"].tolist(), *one["odd"].tolist()] for one in found]


def test_sums_of_16_bits_do_not_overflow() -> None:
    for result in on_ranks(3, _sixteen_bits):
        assert result == [[60_000.0, 60_000.0, 683.0, 683.0]] * 2
