"""Translation between multiopt and torch's optimizers, shared by ``torch_optim`` and ``pyro``.

``settings`` translates parameter groups to rules and back, ``state`` translates the state of one
parameter, and ``file`` reads files of ``torch.save`` without running code.
"""
