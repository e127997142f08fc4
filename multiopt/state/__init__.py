"""What is saved of a name, and the file of it.

``record.Saved`` is the saved state of a name, wherever it comes from; ``fit`` says what it fits. It
comes from a state dict (``plain_data``) or a file (``file``, earlier ones: ``versions``), and waits
as it is until its name is seen (``loading``). On the way out names are rows of ``tables``, which
``document`` describes, and ``writing`` writes.

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
