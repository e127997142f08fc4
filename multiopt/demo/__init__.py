"""``multiopt demo``: stochastic variational inference on baseball data, NumPy alone.

``baseball`` has the data, the model and its gradient, ``posterior`` the exact answer, ``fit`` the
training loop, and ``show`` the report. ``with_pyro`` is imported only if Pyro is installed.
"""
