"""A row of the table that kernels work on, one for each parameter."""

__all__ = ["FIRST_SLOT", "GRAD", "NDIM", "PARAM", "SHAPE", "SIZE"]

#: Columns of a row of int64 words: addresses, the number of elements, the shape, then an address
#: for each slot, then the hyperparameters, which are float64.
PARAM, GRAD, SIZE, NDIM, SHAPE, FIRST_SLOT = range(6)
