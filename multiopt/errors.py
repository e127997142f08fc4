"""The exception classes of multiopt; other errors are built-in ones."""

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint file is damaged, is not ours, or does not fit the optimizer that loads it.

    >>> issubclass(CheckpointError, ValueError)
    True
    """
