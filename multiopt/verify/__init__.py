"""``multiopt verify``: whether this machine and its libraries keep what multiopt promises.

Equal results rest on a few operations that IEEE 754 fixes to the last bit. Most machines perform
them as it says, until something is installed that does not. So they are performed here, and held
to results that integers give:

>>> from multiopt.verify.operations import OPERATIONS, cases, wrong
>>> x, y = cases("float32", 100)
>>> bool(wrong(OPERATIONS["less"], [x, y], x < y).any())
False

``operations`` has the right results, ``checks`` what is checked, ``show`` the report.
"""
