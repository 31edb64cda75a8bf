"""Diagnostics: measures that we print rather than minimise."""

from orthokit.diagnostics.angles import COPY, Angles, angles, frame_tightness
from orthokit.diagnostics.spectrum import effective_rank, singular_values, stable_rank

__all__ = ["COPY", "Angles", "angles", "effective_rank", "frame_tightness", "singular_values", "stable_rank"]
