"""The engines of the CPU, for every library whose arrays are in the host's memory or copied there.

The update of a rule is traced once (``trace``), as a list of operations. From the trace comes the
text of a compiled kernel (``cpu``), or, where there is no compiler, a tape of NumPy operations
(``blocks``). Both give the same bits as the rule itself. ``engines`` chooses between them.
"""
