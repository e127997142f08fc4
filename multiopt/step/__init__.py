"""What a step does: look at the arrays, check them, clip, prepare and run.

``Registry.step`` finds the rows of its names and hands them over as parts, one for each group.
Everything that can fail comes before the first write, so a step is all or nothing. ``run.Step``
takes all parts through these stages:

    look      each engine finds its arrays; Python examines the arrays that it cannot use as they
              are, and lends it copies or raises an error (``checks``)
    check     no two parameters share memory, and gradients are finite if they have to be
    clip      norms are measured, and the factors of gradients computed from them (``clip``)
    prepare   everything else that can fail
    run       parameters, slots and clocks are updated; nothing fails any more, and Ctrl-C waits

``numbers`` calls schedules, ``skips`` counts skipped names, and ``report`` says what a step did.

>>> import numpy as np
>>> from multiopt.arrays import Arrays
>>> from multiopt.registry import Registry
>>> from multiopt.rules import SGD
>>> from multiopt.step.run import Step
>>> registry, w = Registry(SGD(lr=0.5)), np.zeros(2)
>>> params, grads = (np.fromiter([x], object, 1) for x in (w, np.ones(2)))
>>> _ = registry.step(["w"], params, grads)                     # the first step makes the row
>>> arrays = Arrays()
>>> arrays.take(params, grads, own=False)
>>> step = Step(registry.find(["w"]), arrays, (), threads=None, leave_clipped=False)
>>> step.look(), step.prepare(), w.tolist()
({}, None, [-0.5, -0.5])
>>> step.run()
>>> w.tolist(), registry.clock("w")
([-1.0, -1.0], 2)
"""
