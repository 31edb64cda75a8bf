"""The type checker behind the shape annotations in a test run: ints pass as floats, as static checkers have it.

jaxtyping checks every call anew, which took four fifths of the time of the core's tests. Here functions without shapes are
left to beartype, which is faster. Of the others a call that passed is remembered, by all that annotations can see of its
arguments and its result, and the like of it is not checked again. jaxtyping imports this module when it decorates the first
function; ``lightly`` decorates all others.
"""

import dataclasses
import enum
import functools
import inspect
import types
from collections import defaultdict
from collections.abc import Collection

import jaxtyping
import torch
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
config, thoroughly = jaxtyping.config, jaxtyping.jaxtyped

MOST = 2000  # calls remembered of one function
BY_VALUE = (int, str, type(None), torch.Size, enum.Enum, type)  # an annotation may name them: an axis "{o}", a Literal, type[...]

passed = defaultdict(dict)  # by code, as an inner function is decorated whenever the outer one runs: {arguments: {results}}


def lightly(fn=None, *, typechecker):
    """``jaxtyping.jaxtyped``, faster."""
    if fn is None:
        return functools.partial(lightly, typechecker=typechecker)
    if dataclasses.is_dataclass(fn) and not hasattr(fn.__init__, "__wrapped__"):
        fn.__init__ = lightly(fn.__init__, typechecker=typechecker)
    if not inspect.isfunction(fn):
        return fn
    hints = fn.__annotations__.values()
    with_shapes = any("jaxtyping." in str(hint) for hint in hints)
    to_be_resolved = any(isinstance(hint, str) for hint in hints)  # "Figure": beartype fails where it is for static checkers only
    return remembering(fn) if with_shapes or to_be_resolved or "<locals>" in fn.__qualname__ else plain(fn)


def plain(fn):
    """Check by beartype alone: of a function of the module or a method, without shapes."""
    checked = None

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        nonlocal checked
        if config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if checked is None:
            checked = check(fn)
        return checked(*args, **kwargs)

    return wrapper


def look(value):
    """All that a check can see of ``value``; None if it sees more than fits in here: of a list it draws one entry at random."""
    if isinstance(value, torch.Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, BY_VALUE):
        return type(value), value
    if isinstance(value, tuple):
        entries = tuple(map(look, value))
        return None if None in entries else (type(value), entries)
    return None if isinstance(value, Collection) else type(value)


def remembering(fn):
    """Check by jaxtyping what does not look like a call that has passed."""
    calls, results = passed[fn.__code__], []
    echo = types.FunctionType((lambda *_, **__: results.pop()).__code__, fn.__globals__, closure=(types.CellType(results),))

    @functools.cache
    def checking(run):
        return thoroughly(functools.wraps(fn)(run) if run is echo else run, typechecker=check)

    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
        __tracebackhide__ = True
        if config.jaxtyping_disable:
            return fn(*args, **kwargs)
        arguments = look((args, tuple(kwargs), *kwargs.values()) if kwargs else args)
        if arguments in calls:
            result = fn(*args, **kwargs)
            if (outcome := look(result)) in calls[arguments]:
                return result
            results.append(result)
            checking(echo)(*args, **kwargs)
        else:
            result = checking(fn)(*args, **kwargs)
            outcome = look(result)
        if arguments is not None and outcome is not None:
            if len(calls) >= MOST:
                calls.clear()
            calls.setdefault(arguments, set()).add(outcome)
        return result

    return wrapper


jaxtyping.jaxtyped = lightly
