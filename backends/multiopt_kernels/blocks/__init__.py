"""The engine that needs no compiler: a trace run as NumPy operations on blocks of cache size.

``tape`` turns a trace into a program of NumPy calls, ``runs`` applies it to one large parameter or
to many small ones at once, and ``group`` decides which rows of a step go into which run.
"""
