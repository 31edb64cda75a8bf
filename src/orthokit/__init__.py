"""Orthogonal filters for deep networks: measure a layer's kernel, minimise the measure, or print it."""

# First, as importing the rest takes seconds.
from orthokit import starting  # noqa: F401

# isort: split

from importlib.metadata import version

from orthokit.estimate import estimate
from orthokit.gram import welch_bound
from orthokit.groups import param_groups
from orthokit.integrations.logs import log
from orthokit.integrations.optimizer import attach
from orthokit.kernel import Kernel, kernel_of
from orthokit.layers import (
    Predicate,
    convs,
    depthwise,
    embeddings,
    head,
    layers,
    linears,
    matching,
    pointwise,
    select,
    spatial,
    stem,
    tall,
    tied,
    zeros,
)
from orthokit.penalties import (
    DSO,
    EADC,
    EADK,
    GOR,
    MC,
    PENALTIES,
    SO,
    SRIP,
    Coherence,
    ConvOrth,
    Disentangled,
    Lorth,
    OffDiagonal,
    angular_dispersion,
    coherence,
    convolution_angular_dispersion,
    convolution_orthogonality,
    disentangled_orthogonality,
    double_soft_orthogonality,
    group_orthogonality,
    lorth,
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
from orthokit.report import Report, duplicates, merge_copies, operators, report
from orthokit.schedules import chain, constant, cosine, linear, piecewise, warmup
from orthokit.testing import check_penalty

__version__ = version("orthokit")

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
    "Kernel",
    "Lorth",
    "OffDiagonal",
    "Predicate",
    "Regularizer",
    "Report",
    "angular_dispersion",
    "attach",
    "cardinality",
    "chain",
    "check_penalty",
    "coherence",
    "constant",
    "convolution_angular_dispersion",
    "convolution_orthogonality",
    "convs",
    "cosine",
    "depthwise",
    "disentangled_orthogonality",
    "double_soft_orthogonality",
    "duplicates",
    "embeddings",
    "estimate",
    "expected_cardinality",
    "feasible",
    "fraction",
    "group_orthogonality",
    "head",
    "kernel_of",
    "layers",
    "linear",
    "linears",
    "log",
    "lorth",
    "matching",
    "merge_copies",
    "mutual_coherence",
    "off_diagonal_orthogonality",
    "operators",
    "param_groups",
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
    "tall",
    "tied",
    "transition_dimension",
    "warmup",
    "welch",
    "welch_bound",
    "zeros",
]
