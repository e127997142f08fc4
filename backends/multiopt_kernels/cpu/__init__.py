"""Compiled kernels: the one place that reaches for addresses, object layouts, threads, object code.

A kernel is made from the printed trace of a rule (``source``, ``update``), from the summation tree
of the spec (``norms``), or reads where arrays are (``look``). It takes the address of a block of
int64 arguments (``batch``) and works on the rows of a table (``rows``), one for each parameter. It
allocates nothing and calls nothing outside itself, except for one function of torch (``look``).

With the same results ``multiopt_kernels.blocks.group`` and the rules as they stand take its place.
"""
