"""What a step does: look at the arrays, check them, clip, run, report.

``Registry.step`` finds the rows of its names, and hands them over as parts, one for each group.
``Step`` takes all parts through the same five calls of their engines (``multiopt.engine``):

    look      one call a part; what an engine does not take as it is, Python looks at (``checks``),
              and says what is wrong, or lends the engine a copy
    check     no parameter may share memory with another; gradients may have to be finite
    clip      norms are measured, and what they scale gradients by (``clip``)
    prepare   everything that may fail
    run       one call a part; from here on nothing fails, and Ctrl-C waits

``report`` says what became of it.
"""
