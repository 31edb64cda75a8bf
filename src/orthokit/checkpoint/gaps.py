"""Notes on what of a network was not read, which a gate must not pass over."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["Gap"]


class Gap(str):
    """A note among others, on layers or parts of a network that were not read.

    Args:
        text: the note.
        missing: the reasons, by the names of the layers or parts.
    """

    missing: Mapping[str, str]

    def __new__(cls, text: str, missing: Mapping[str, str] = MappingProxyType({})) -> "Gap":
        """The note with its reasons."""
        gap = super().__new__(cls, text)
        gap.missing = dict(missing)
        return gap
