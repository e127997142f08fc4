"""The project's own measurements: what a step costs, beside every library that it is compared with.

``python -m tests.benchmarks`` measures and prints the table of ``docs/performance.md``.
``comparisons`` says what is measured and against what: begin there. ``ours`` and ``peers`` have the
two sides, ``varies`` steps in which something varies, ``files`` checkpoints, ``memory`` the stream
of the memory limit and the peak of a step, ``svi`` a whole step of Pyro's inference, ``fresh`` what
needs a process of its own, ``plan`` makes jobs of it all, ``show`` the report. ``soak`` is another
program: a long run.
"""
