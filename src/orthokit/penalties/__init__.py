"""Penalties: measures of a kernel that are small where its filters are orthogonal, one paper's method a file."""

from orthokit.penalties.coherence import MC, Coherence, coherence, mutual_coherence
from orthokit.penalties.disentangled import Disentangled, disentangled_orthogonality
from orthokit.penalties.dso import DSO, double_soft_orthogonality
from orthokit.penalties.off_diagonal import OffDiagonal, off_diagonal_orthogonality
from orthokit.penalties.so import SO, soft_orthogonality
from orthokit.penalties.srip import SRIP, spectral_restricted_isometry

PENALTIES: tuple[type, ...] = (SO, DSO, MC, Coherence, SRIP, OffDiagonal, Disentangled)

__all__ = [
    "DSO",
    "MC",
    "PENALTIES",
    "SO",
    "SRIP",
    "Coherence",
    "Disentangled",
    "OffDiagonal",
    "coherence",
    "disentangled_orthogonality",
    "double_soft_orthogonality",
    "mutual_coherence",
    "off_diagonal_orthogonality",
    "soft_orthogonality",
    "spectral_restricted_isometry",
]
