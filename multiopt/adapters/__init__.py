"""Adapters for other libraries: ``torch_optim`` for torch, ``pyro`` as a drop-in for pyro.optim.

``torch`` holds what both share. The core of multiopt imports neither torch nor Pyro.
"""
