"""Orthogonal filters for deep networks: measure a layer's kernel, minimise the measure, or print it."""

from importlib.metadata import version

from orthokit.estimate import estimate
from orthokit.gram import welch_bound
from orthokit.integrations.optimizer import attach
from orthokit.kernel import Kernel, kernel_of
from orthokit.penalties import (
    DSO,
    MC,
    PENALTIES,
    SO,
    SRIP,
    Coherence,
    Disentangled,
    OffDiagonal,
    coherence,
    disentangled_orthogonality,
    double_soft_orthogonality,
    mutual_coherence,
    off_diagonal_orthogonality,
    soft_orthogonality,
    spectral_restricted_isometry,
)
from orthokit.regularizer import Regularizer, sqrt_filters
from orthokit.relax import (
    cardinality,
    expected_cardinality,
    feasible,
    fraction,
    plan,
    ranks,
    share,
    transition_dimension,
    welch,
)
from orthokit.report import report
from orthokit.schedules import chain, constant, cosine, linear, piecewise, warmup
from orthokit.select import (
    Predicate,
    convs,
    depthwise,
    layers,
    linears,
    matching,
    pointwise,
    select,
    spatial,
    stem,
)

__version__ = version("orthokit")

__all__ = [
    "DSO",
    "MC",
    "PENALTIES",
    "SO",
    "SRIP",
    "Coherence",
    "Disentangled",
    "Kernel",
    "OffDiagonal",
    "Predicate",
    "Regularizer",
    "attach",
    "cardinality",
    "chain",
    "coherence",
    "constant",
    "convs",
    "cosine",
    "depthwise",
    "disentangled_orthogonality",
    "double_soft_orthogonality",
    "estimate",
    "expected_cardinality",
    "feasible",
    "fraction",
    "kernel_of",
    "layers",
    "linear",
    "linears",
    "matching",
    "mutual_coherence",
    "off_diagonal_orthogonality",
    "piecewise",
    "plan",
    "pointwise",
    "ranks",
    "report",
    "select",
    "share",
    "soft_orthogonality",
    "spatial",
    "spectral_restricted_isometry",
    "sqrt_filters",
    "stem",
    "transition_dimension",
    "warmup",
    "welch",
    "welch_bound",
]
