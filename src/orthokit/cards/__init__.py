"""A card for each penalty, in Markdown: what ``orthokit list NAME`` shows, and a page of the documentation."""

import re
from importlib import resources

__all__ = ["read"]


def read(penalty: str) -> str:
    """The card of a penalty, such as ``"SO"``, for a terminal: without picture, marks of numbers, and links to the glossary.

    >>> print(read("SO").splitlines()[0])
    # SO and SO²: soft orthogonality
    """
    text = resources.files(__name__).joinpath(f"{penalty.lower()}.md").read_text("utf-8")
    text = re.sub(r"^!\[.*?\n\n\*.*?\*\n\n|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\{term\}`([^`<]+?)( <[^`]*>)?`", r"\1", text)
