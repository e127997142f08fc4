"""The names that are a rank's own, which no other rank hears of.

>>> own = Local(lambda name: name.startswith("rank"))
>>> own("rank 0"), own("loc")
(True, False)
"""

from collections.abc import Callable, Mapping, Sequence

from multiopt.arrays import Array
from multiopt.errors import brief
from multiopt.step.clip import Clip

__all__ = ["Local"]


class Local:
    """Which names are local.

    Args:
        local: A callable ``name -> bool``, called once for each name; None for no local names.

    Raises:
        TypeError: ``local`` is neither a callable nor None.
    """

    def __init__(self, local: Callable[[str], bool] | None) -> None:
        """Keep the callable; it is not called yet."""
        if local is not None and not callable(local):
            raise TypeError(f"local must be a callable name -> bool or None; got {brief(local)}")
        self._local = local
        self._known: dict[str, bool] = {}
        #: For names that are local and for those that are not: clips of a global norm, each with a
        #: name that has it.
        self._clips: dict[bool, dict[Clip, str]] = {True: {}, False: {}}

    def __call__(self, name: str) -> bool:
        """Whether a name is local."""
        if self._local is None:
            return False
        if name not in self._known:
            self._known[name] = bool(self._local(name))
        return self._known[name]

    def among(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Those parameters that are local."""
        if self._local is None:
            return {}
        return {name: param for name, param in params.items() if self(name)}

    def check_new(self, names: Sequence[str]) -> None:
        """Refuse names that other ranks exchange and that are local here.

        Raises:
            ValueError: One is.
        """
        for name in names:
            if self(name):
                raise ValueError(
                    f"parameter {name!r} is local here, and on another rank it is not; expected "
                    "local(name) to be the same on all ranks"
                )

    def forget_clips(self) -> None:
        """Forget the clips of the names that were checked."""
        self._clips = {True: {}, False: {}}

    def check_clips(self, found: Mapping[str, Clip | None]) -> None:
        """Refuse a global norm over local names and others: it would differ between ranks.

        Args:
            found: The clips of names that have not been checked.

        Raises:
            ValueError: There is such a norm.
        """
        clips = {local: dict(seen) for local, seen in self._clips.items()}
        for name, clip in found.items() if self._local is not None else ():
            if clip is not None and clip.global_norm is not None:
                clips[self(name)].setdefault(clip, name)
        for clip in clips[True].keys() & clips[False].keys():
            own, shared = clips[True][clip], clips[False][clip]
            raise ValueError(
                f"parameter {own!r} is local, and {shared!r} is not, but both have {clip}, so that "
                "ranks would scale the same gradient differently; expected another clip, or none, "
                "for local names: give a callable name -> clip"
            )
        self._clips = clips
