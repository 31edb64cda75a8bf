"""A card for each penalty, in Markdown: what ``orthokit list NAME`` shows, and a page of the documentation."""

import re
from importlib import resources

__all__ = ["read"]


def read(penalty: str) -> str:
    """The card of a penalty, such as ``"SO"``, for a terminal: without its picture, and without the marks of its numbers.

    >>> print(read("SO").splitlines()[0])
    # SO and SO²: soft orthogonality
    """
    text = resources.files(__name__).joinpath(f"{penalty.lower()}.md").read_text("utf-8")
    return re.sub(r"^!\[.*?\n\n\*.*?\*\n\n|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
