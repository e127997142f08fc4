"""Compiled kernels: the only code with addresses, object layouts, threads and machine code.

There are four sorts of kernels. Those of ``update`` are compiled from the printed trace of a rule
(``source``), those of ``norms`` measure gradients with exact sums (``sums``), those of ``look``
find out where arrays are, and those of ``walk`` run others on arrays with gaps, box by box. A
kernel takes the address of a block of int64 arguments and works on a table with one row per
parameter (``rows``). It allocates nothing, and calls nothing outside itself except for one function
of torch (``look``) and another kernel (``walk``).

Where kernels cannot be used, ``multiopt_kernels.blocks`` and the reference engine give the same
results.
"""
