"""Saved state: what is kept of each parameter, and the checkpoint file that holds it.

The one idea: whatever its source, the saved state of a name is one record, ``record.Saved``.
Loading reads records from a state dict (``plain_data``) or a file (``file``; ``versions`` reads the
older formats), checks that they fit (``fit``), and gives them to their parameters or keeps them
until the name is first seen (``loading``). To save, names of one form become the rows of a table
(``tables``), ``document`` describes the tables as JSON, and ``writing`` writes the file.

Names that were saved alike share one ``Form``, so a million names stay cheap:

>>> import io
>>> import multiopt as mo
>>> import numpy as np
>>> from multiopt.state.file import read
>>> opt, file = mo.Optimizer(mo.Adam()), io.BytesIO()
>>> _ = opt.step({"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)})
>>> opt.save(file)
>>> _ = file.seek(0)
>>> saved = read(file).saved
>>> saved["a"].step, [slot.name for slot in saved["a"].form.slots]
(1, ['exp_avg', 'exp_avg_sq'])
>>> saved["a"].form is saved["b"].form
True
"""
