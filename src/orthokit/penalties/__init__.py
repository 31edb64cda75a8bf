"""Penalties: measures of a kernel that are small where its filters are orthogonal, one paper's method a file."""

from orthokit.penalties.base import Penalty
from orthokit.penalties.coherence import MC, Coherence, coherence, mutual_coherence
from orthokit.penalties.conv_orth import ConvOrth, Lorth, convolution_orthogonality, lorth
from orthokit.penalties.disentangled import Disentangled, disentangled_orthogonality
from orthokit.penalties.dispersion import EADC, EADK, angular_dispersion, convolution_angular_dispersion
from orthokit.penalties.dso import DSO, double_soft_orthogonality
from orthokit.penalties.group import GOR, group_orthogonality
from orthokit.penalties.off_diagonal import OffDiagonal, off_diagonal_orthogonality
from orthokit.penalties.so import SO, soft_orthogonality
from orthokit.penalties.srip import SRIP, spectral_restricted_isometry

PENALTIES: tuple[type[Penalty], ...] = (SO, DSO, MC, Coherence, SRIP, OffDiagonal, Disentangled, ConvOrth, Lorth, EADK, EADC, GOR)

__all__ = [
    "DSO",
    "EADC",
    "EADK",
    "GOR",
    "MC",
    "PENALTIES",
    "SO",
    "SRIP",
    "Coherence",
    "ConvOrth",
    "Disentangled",
    "Lorth",
    "OffDiagonal",
    "Penalty",
    "angular_dispersion",
    "coherence",
    "convolution_angular_dispersion",
    "convolution_orthogonality",
    "disentangled_orthogonality",
    "double_soft_orthogonality",
    "group_orthogonality",
    "lorth",
    "mutual_coherence",
    "off_diagonal_orthogonality",
    "soft_orthogonality",
    "spectral_restricted_isometry",
]
