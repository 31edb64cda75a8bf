"""The type checker behind the annotations in a test run: ints pass as floats, as static checkers have it.

For every call jaxtyping binds the arguments and keeps a table of sizes, which took a third of the time of all tests. Annotations
without shapes need neither: those functions are left to beartype alone, which checks the same.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
with_shapes = jaxtyping.jaxtyped


def checked(item: Any = None, *, typechecker: Any) -> Any:
    """``jaxtyping.jaxtyped`` as the import hook calls it: with the real one only where an annotation has a shape."""
    if item is None:
        return functools.partial(checked, typechecker=typechecker)
    if dataclasses.is_dataclass(item) and not hasattr(item.__init__, "__wrapped__"):
        item.__init__ = checked(item.__init__, typechecker=typechecker)
    if inspect.isclass(item):
        return item
    hints = {name: _resolved(hint, item) for name, hint in item.__annotations__.items()}
    return with_shapes(item, typechecker=typechecker) if any(map(_has_shape, hints.values())) else _without_shapes(item, hints)


def _resolved(hint: Any, function: Callable[..., Any]) -> Any:
    """An annotation without strings; ``Any`` where one names what is not known yet, as jaxtyping has it."""
    holder = type("Holder", (), {"__annotations__": {"hint": hint}})
    try:
        return typing.get_type_hints(holder, function.__globals__, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))


def _without_shapes(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    """The function as beartype checks it; as it is while a test has the checks off."""
    own, function.__annotations__ = function.__annotations__, hints
    strict = check(function)
    function.__annotations__ = own

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return (function if jaxtyping.config.jaxtyping_disable else strict)(*args, **kwargs)

    return wrapper


jaxtyping.jaxtyped = checked  # the hook asks for it at each function; the first one imports this module
