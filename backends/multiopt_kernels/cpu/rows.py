"""The columns of the table that kernels work on; it has one row for each parameter.

A row is a sequence of int64 words, so one address and one width are all that a kernel needs to find
everything about any parameter.

Here Python does what a kernel does to read the parameter in row 1:

>>> import numpy as np
>>> from ctypes import c_double, c_int64
>>> from multiopt.layout import address
>>> param, table = np.array([0.5, 2.0]), np.zeros((3, FIRST_SLOT), np.int64)
>>> table[1, [PARAM, SIZE]] = address(param), param.size
>>> start, width = address(table), table.shape[1]  # what a kernel is given
>>> row = (c_int64 * width).from_address(start + 1 * width * 8)
>>> (c_double * row[SIZE]).from_address(row[PARAM])[:]
[0.5, 2.0]
"""

__all__ = ["FIRST_SLOT", "GRAD", "NDIM", "PARAM", "SHAPE", "SIZE", "STRIDES", "WALK", "WIDE"]

#: The addresses of the parameter and of the gradient, the number of elements, the number of
#: dimensions, the address of the shape, the address of the strides in elements or 0 for C order,
#: whether the arrays of a 16-bit parameter are lent as float32 copies, the address of a plan if the
#: parameter or the gradient does not lie as the slots do (``boxes``) or 0, the address of the first
#: slot. The addresses of the other slots follow, and then float64 numbers: the hyperparameters, or
#: the coefficients if the host computes them.
PARAM, GRAD, SIZE, NDIM, SHAPE, STRIDES, WIDE, WALK, FIRST_SLOT = range(9)
