"""Colours of pages and figures: arms, the words of a report, ink and ground. They read on white and on dark grounds."""

__all__ = ["ARMS", "BASELINE", "COLOURS", "DARK", "GROUND", "INK", "LINE", "MIDDLE", "SOFT", "WORDS", "mixed", "pen"]

BASELINE = "#8a8a8a"
"""Grey; nothing else in a figure of arms has it."""
ARMS = ("#c8661a", "#2f7fc1", "#a05fc4", "#2a9558", "#d0413f", "#14938c", "#8c7a1e")
"""Colours of the other arms, in their order."""
COLOURS = (BASELINE, *ARMS)
WORDS = {
    "copies": "#c9303f",
    "correlated": "#b5560f",
    "like random": "#6f6f6f",
    "near-orthogonal": "#2b6ca3",
    "orthogonal": "#23834a",
}
"""Colours of a report's words: bars in a figure, chips behind white words."""
INK, SOFT, LINE, GROUND = "#24292f", "#57606a", "#d0d7de", "#ffffff"
"""Colours of text, secondary text, grids and the page."""
MIDDLE = "#808080"
"""Colour of text on an unknown background, such as behind a PNG."""


def mixed(colour: str, other: str, share: float) -> str:
    """A colour with a share of another one.

    >>> mixed("#000000", "#ffffff", 0.5)
    '#808080'
    """
    pairs = zip(*(bytes.fromhex(each[1:]) for each in (colour, other)), strict=True)
    return "#" + "".join(f"{round(one + share * (two - one)):02x}" for one, two in pairs)


def pen(colour: str) -> str:
    """The colour of words about what has ``colour``: darker, as words need more contrast than lines."""
    return mixed(colour, "#000000", 0.2)


DARK = {INK: "#e6edf3", SOFT: "#9ba5b0", LINE: "#3d444d", GROUND: "#131619"} | {
    pen(colour): mixed(colour, "#ffffff", 0.25) for colour in COLOURS
}
"""Replacements for some colours where the page is dark."""
