"""The Penalty protocol, on one page that the library, the command line and the documentation read.

Any callable ``Kernel -> Tensor`` can be minimised. A penalty of this package also says what it is, in the attributes of
:class:`Penalty`, and may offer three methods, each a protocol of its own: :class:`HasGramRule`, :class:`Relaxes`,
:class:`HasNearest`. Nothing is inherited; a class follows a protocol by having its members.
"""

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from orthokit.gram import GramRule, Side
from orthokit.kernel import Kernel, KernelMeasure

__all__ = ["HasGramRule", "HasNearest", "Measure", "Penalty", "Relaxes", "gram_rule_of", "is_squared"]


class Measure(Protocol):
    """A callable: every penalty, and every measure of a caller's own."""

    def __call__(self, kernel: Kernel, /) -> Tensor:
        """One value per leading dimension (batch and groups) of a kernel, of which gradients may be taken."""


class Penalty(Measure, Protocol):
    """A frozen dataclass of a method's options that measures kernels, and says what it is."""

    name: ClassVar[str]
    """Name of the method in the field, and of the class."""
    long_name: ClassVar[str]
    """The name in words, as in the title of its card."""
    source: ClassVar[str]
    """Where it is from: authors, year, link."""
    use: ClassVar[str]
    """When to use it, in one line that goes on from "use it when"."""

    @property
    def squared(self) -> bool:
        """Whether the value is a square; an unsquared one is scaled for grouped layers, and by ``scale=``."""


@runtime_checkable
class HasGramRule(Measure, Protocol):
    """A penalty whose value depends on a Gram matrix alone: its gradient needs no autograd, and layers are worked on together."""

    def gram_rule(self, o: int, n: int, rank: int | None = None) -> tuple[GramRule, Side] | None:
        """The rule and its side for :func:`orthokit.gram.of_gram`; None for layers of a shape where there is no such rule."""


@runtime_checkable
class Relaxes(Measure, Protocol):
    """A penalty that asks for fewer than ``o`` mutually orthogonal filters; kernels bring the number along as ``kernel.rank``."""

    def transition(self, o: int, n: int, name: str = "") -> int:
        """The transition dimension of a layer: see :mod:`orthokit.relax`."""


@runtime_checkable
class HasNearest(Measure, Protocol):
    """A penalty whose nearest minimum is known in closed form: see :meth:`orthokit.Regularizer.retract_`."""

    def nearest(self, kernel: Kernel) -> Tensor:
        """The nearest kernel matrix at the minimum."""


def is_squared(measure: KernelMeasure, otherwise: bool) -> bool:
    """Whether a measure's value is a square; ``otherwise`` where a caller's own measure does not say so."""
    return bool(getattr(measure, "squared", otherwise))


def gram_rule_of(measure: KernelMeasure, o: int, n: int, rank: int | None) -> tuple[GramRule, Side] | None:
    """The Gram rule of a measure on kernels of this shape, if it has one."""
    if not isinstance(measure, HasGramRule):
        return None
    # A class that overrides only the call of a penalty has another value than the rule that it inherits.
    first = next(kind for kind in type(measure).__mro__ if not vars(kind).keys().isdisjoint(("gram_rule", "__call__")))
    return measure.gram_rule(o, n, rank) if "gram_rule" in vars(first) else None
