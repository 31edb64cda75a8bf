"""The words of a report: one word a layer, one sentence a network, and the line of code that would act on it.

The thresholds are ours. They are stated on the page "Reading a report" of the documentation, and tested there.
"""

import math
from collections import Counter
from collections.abc import Sequence
from glob import escape

from orthokit.checks import printable
from orthokit.tables import Row

__all__ = ["CORRELATED", "NEAR", "ORTHOGONAL", "WORDS", "action_of", "ranked", "sentence_of", "word_of"]

WORDS = ("copies", "correlated", "like random", "near-orthogonal", "orthogonal")
"""From what to mend first to what is done."""
ORTHOGONAL = 0.01
"""Largest ``|c|`` (of a tall layer the tightness) up to which a layer is called orthogonal."""
NEAR = 0.5
"""Correlation relative to random filters below which a layer is near-orthogonal."""
CORRELATED = 1.5
"""Correlation relative to random filters above which a layer is correlated."""
LONG = 3.0
"""Mean length of filters from which on the advice leaves lengths alone."""


def word_of(row: Row, pairs: int) -> str | None:
    """The word for a layer's row; None where there is nothing to say (no pair of filters, or filters of one weight).

    ``pairs`` are those of filters that are not zero: the others have no direction, and are not orthogonal to anything.

    ``copies``: two filters with ``|c| > .99``. ``orthogonal``: ``max |c|``, of a tall layer its tightness, is at most .01.
    ``near-orthogonal``, ``like random``, ``correlated``: ``mean |c|`` relative to that of random filters, of a tall layer its
    tightness relative to theirs (``1 / sqrt(o)``), is below .5, in between, above 1.5. Of few pairs the last bound is wider, at
    three standard errors of random filters.
    """
    if not pairs or row["n"] == 1 or row["max_cos"] is None:
        return None
    if row["copies"]:
        return "copies"
    tall = row["shape"] == "tall"
    if (row["tightness"] if tall else row["max_cos"]) <= ORTHOGONAL:
        return "orthogonal"
    relative = row["tightness"] * math.sqrt(row["o"]) if tall else row["x_random"] * row["pairs"] / pairs
    # The standard deviation of |c| is about .76 of its mean.
    bound = max(CORRELATED, 1 + 3 * 0.76 / math.sqrt(pairs))
    return "near-orthogonal" if relative < NEAR else "correlated" if relative > bound else "like random"


def sentence_of(rows: Sequence[Row]) -> str:
    """Summarize the layers: how many have which word, and which are the least orthogonal.

    >>> from orthokit.report.words import sentence_of
    >>> sentence_of(orthokit.report(nn.Linear(4, 4)).rows)
    '1 of 1 layer is like random.'
    """
    worded = [row for row in rows if row["word"]]
    if not worded:
        return "No layer has two filters of two or more weights: there are no angles to tell of."
    counts = Counter(row["word"] for row in worded)
    total = f"{len(worded)} layer{'s' * (len(worded) > 1)}"
    first, *rest = [(word, counts[word]) for word in WORDS if counts[word]]
    told = [f"{first[1]} of {total} {_verb(*first)}", *(f"{count} {_verb(word, count)}" for word, count in rest)]
    text = "; ".join(told) + "."
    if len(worded) > 3 and (worst := ranked(rows)[:3]) and worst[0]["word"] not in ("orthogonal", "near-orthogonal"):
        text += f" The least orthogonal: {', '.join(_shown(row) for row in worst)}."
    return text


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The rows, the least orthogonal layer first; those without a word last."""

    def key(row: Row) -> tuple[int, float]:
        if row["word"] is None:
            return len(WORDS), 0.0
        share = row["copies"] / row["pairs"] if row["copies"] else row["x_random"]
        return WORDS.index(row["word"]), -share

    return sorted(rows, key=key)


def action_of(rows: Sequence[Row]) -> str:
    """The line of Python that would act on the layers that need it; empty where none does."""
    worded = [row for row in rows if row["word"]]
    bad = [row for row in worded if row["word"] in WORDS[:3]]
    if not bad:
        return ""
    lengths = [row["mean_length"] for row in bad]
    penalty = "ok.Disentangled(weights=(0, 1))" if sorted(lengths)[len(lengths) // 2] > LONG else "ok.Disentangled()"
    where = "ok.layers" if len(bad) == len(worded) else _matching(bad, [row for row in worded if row not in bad])
    if all(row["kind"].startswith("Conv") for row in bad) and sum(row["kind"].startswith("Conv") for row in worded) == len(bad):
        where = ""  # every convolution, the default
    return f"ortho = ok.Regularizer(model, {penalty}, strength=0.1{f', where={where}' if where else ''})"


def _matching(bad: Sequence[Row], others: Sequence[Row]) -> str:
    few, negation = (bad, "") if len(bad) <= max(6, len(others)) else (others, "ok.layers & ~")
    return f"{negation}ok.matching({', '.join(repr(escape(row['layer'])) for row in few)})"


def _verb(word: str, count: int) -> str:
    if word == "copies":
        return "holds copies" if count == 1 else "hold copies"
    return f"{'is' if count == 1 else 'are'} {word}"


def _shown(row: Row) -> str:
    name = printable(row["layer"])
    if row["copies"]:
        return f"{name} ({row['copies']:,} cop{'y' if row['copies'] == 1 else 'ies'})"
    return f"{name} ({row['x_random']:.1f} times random)"
