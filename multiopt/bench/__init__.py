"""``multiopt bench``: a step of Adam on this machine, beside the other libraries installed here.

A machine changes its speed from one second to the next, so two times say something only if they
were taken in turn: a ``Side`` knows how to begin on a ``Work``, and ``measured`` times two of them.

>>> from multiopt.bench.paired import measured
>>> from multiopt.bench.sides import NUMPY, TEXTBOOK
>>> from multiopt.bench.work import Work
>>> ours, theirs = (side.begin(Work("ten", ((10,),) * 10), 1) for side in (NUMPY, TEXTBOOK))
>>> measured(ours, theirs, quick=True).ratio > 0
True

``sides`` holds the works and what is compared on them; ``show`` checks that both sides compute the
same numbers, times them and prints; ``machine`` says where that was. The project's own benchmarks,
which measure much more, are in ``tests/benchmarks``.
"""
