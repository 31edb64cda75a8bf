"""Diagnostics: measures that we print rather than minimise."""

from orthokit.diagnostics.angles import COPY, Angles, angles, frame_tightness, random_cosine
from orthokit.diagnostics.operator import operator_singular_values
from orthokit.diagnostics.spectrum import effective_rank, singular_values, stable_rank

__all__ = [
    "COPY",
    "Angles",
    "angles",
    "effective_rank",
    "frame_tightness",
    "operator_singular_values",
    "random_cosine",
    "singular_values",
    "stable_rank",
]
