"""``multiopt bench``: how fast a step is on this machine, beside what else is installed.

``comparisons`` is the table of what is measured and against what: begin there. ``work`` has the
parameters, ``ours`` and ``peers`` the two sides, ``paired`` the measuring, ``memory`` the stream of
the memory limit and the peak of a step, ``svi`` a whole step of Pyro's inference, ``fresh`` what
needs a process of its own, ``machine`` what this was measured on, ``show`` the report.
"""
