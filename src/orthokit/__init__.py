"""Orthogonal filters for deep networks: measure a layer's kernel, minimise the measure, or print it."""

# First, as importing the rest takes seconds.
from orthokit import starting  # noqa: F401

# isort: split

from importlib.metadata import version

from orthokit import penalties, schedules
from orthokit.estimate import estimate
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
from orthokit.penalties import *  # noqa: F403  # each is named once, there
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
    welch_bound,
)
from orthokit.report import Report, duplicates, merge_copies, operators, report

# Names of before, for one version: see orthokit.schedules.
from orthokit.schedules import chain as chain
from orthokit.schedules import constant as constant
from orthokit.schedules import cosine as cosine
from orthokit.schedules import linear as linear
from orthokit.schedules import piecewise, warmup
from orthokit.testing import check_penalty

__version__ = version("orthokit")

__all__ = [
    "Kernel",
    "Predicate",
    "Regularizer",
    "Report",
    "attach",
    "cardinality",
    "check_penalty",
    "convs",
    "depthwise",
    "duplicates",
    "embeddings",
    "estimate",
    "expected_cardinality",
    "feasible",
    "fraction",
    "head",
    "kernel_of",
    "layers",
    "linears",
    "log",
    "matching",
    "merge_copies",
    "operators",
    "param_groups",
    "piecewise",
    "plan",
    "pointwise",
    "ranks",
    "report",
    "schedules",
    "select",
    "share",
    "spatial",
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
__all__ += penalties.__all__
