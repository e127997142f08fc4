"""A row of the table that kernels work on, one for each parameter."""

__all__ = ["FIRST_SLOT", "GRAD", "NDIM", "PARAM", "SHAPE", "SIZE", "WIDE"]

#: Columns of a row of int64 words: addresses, the number of elements, the shape, whether the arrays
#: of a 16-bit parameter are copies in float32, then an address for each slot, then the
#: hyperparameters, which are float64.
PARAM, GRAD, SIZE, NDIM, SHAPE, WIDE, FIRST_SLOT = range(7)
