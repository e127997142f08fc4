"""``multiopt demo``: stochastic variational inference on baseball data, NumPy alone.

``baseball`` has the data, the model and its gradient, ``posterior`` the exact answer, ``fit`` the
training loop, ``show`` the report. ``with_pyro`` is imported only where Pyro is installed.
"""
