"""The parameters that are stepped: a few sets of shapes."""

from pathlib import Path

from multiopt.bench.work import Work

__all__ = ["last_level_cache", "works"]

VAE = (
    *((400, 784), (400,), (20, 400), (20,), (20, 400), (20,)),
    *((400, 20), (400,), (784, 400), (784,)),
)
#: Of a hierarchical model's latent variables: of everyone, of groups, of their members.
LATENTS = ((),) * 20 + ((10,),) * 20 + ((100,),) * 10 + ((1000,),) * 4 + ((1000, 5),) * 2


def transformer(width: int, words: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a transformer of three layers: 40 tensors.

    >>> from math import prod
    >>> len(transformer(384, 12_000)), sum(map(prod, transformer(384, 12_000)))
    (40, 10128768)
    """
    biased = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    layer = [shape for matrix in biased for shape in (matrix, matrix[:1])] + [(width,)] * 4
    return ((words, width), (512, width), *layer * 3, (width,), (width,))


def one_array(size: int) -> Work:
    """A work of one array.

    >>> one_array(10_000_000).title
    'one array of 1e7'
    """
    return Work(f"one array of {size:.0e}".replace("e+0", "e"), ((size,),))


def last_level_cache() -> int:
    """The size of the largest cache in bytes; where the system does not say, 64 MiB."""
    sizes = [
        # As in "32768K".
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=2**26)


def works(quick: bool) -> dict[str, Work]:
    """Every work by its key in ``comparisons``.

    Args:
        quick: Whether to make fewer parameters, for a look or a test.
    """
    large, many, most = (300_000, 20, 200) if quick else (10_000_000, 1000, 100_000)
    side, channels = (550, 200) if quick else (3160, 1050)
    forty = transformer(32, 100) if quick else transformer(384, 12_000)
    # Parameter, gradient and two slots of float32. No more than 2 GiB of them.
    beyond = 1_000_000 if quick else min(4 * last_level_cache(), 2**31) // 16
    return {
        "large": one_array(large),
        "matrix": Work(f"a matrix of {side} rows", ((side, side),)),
        "images": Work(f"{channels} x {channels} x 3 x 3", ((channels, channels, 3, 3),)),
        "a tenth": one_array(large // 10),
        "a hundredth": one_array(large // 100),
        "beyond": Work(f"one array of {beyond / 1e6:.0f} million", ((beyond,),)),
        "many small": Work(f"{many} of 10", ((10,),) * many),
        "most small": Work(f"{most} of 10", ((10,),) * most),
        "hundred small": Work("100 of 10", ((10,),) * 100),
        "few small": Work("10 of 10", ((10,),) * 10),
        "thousands": Work(f"{10 * many} of 10", ((10,),) * 10 * many),
        "two thousand": Work(f"{2 * many} of 10", ((10,),) * 2 * many),
        "many new": Work(f"{5 * many} of 10", ((10,),) * 5 * many),
        "many middling": Work(f"{many} of 1000", ((1000,),) * many),
        "vae": Work("a VAE", VAE),
        "forty": Work("40 of a transformer", forty),
        "guide": Work("a guide", tuple(shape for shape in LATENTS for _ in ("loc", "scale"))),
    }
