"""The columns of the table that kernels work on; it has one row for each parameter.

A row is a sequence of int64 words, so one address and one width are all that a kernel needs to find
everything about any parameter.
"""

__all__ = ["FIRST_SLOT", "GRAD", "NDIM", "PARAM", "SHAPE", "SIZE", "WIDE"]

#: The addresses of the parameter and of the gradient, the number of elements, the number of
#: dimensions, the address of the shape, whether the arrays of a 16-bit parameter are lent as
#: float32 copies, the address of the first slot. The addresses of the other slots follow, and then
#: float64 numbers: the hyperparameters, or the coefficients if the host computes them.
PARAM, GRAD, SIZE, NDIM, SHAPE, WIDE, FIRST_SLOT = range(7)
