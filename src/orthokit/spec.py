"""Penalties, relaxation policies, schedules and layer choices as plain data, for recipes and the command line.

``{"name": "srip", "steps": 2}`` is ``SRIP(steps=2)``; a bare name stands for one without options, a nested one goes under its
option (``{"name": "disentangled", "relax": {"name": "share", "q": 0.1}}``). In Python pass the objects themselves.
"""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

from orthokit.checks import did_you_mean, printable
from orthokit.kernel import KernelMeasure
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
    spatial,
    stem,
    tall,
    tied,
    zeros,
)
from orthokit.penalties import PENALTIES
from orthokit.relax import feasible, fraction, ranks, share, welch
from orthokit.schedules import Schedule, as_schedule, chain, constant, cosine, linear, piecewise, warmup

__all__ = ["POLICIES", "PREDICATES", "SCHEDULES", "config_of", "penalty_of", "schedule_of", "where_of"]

POLICIES: tuple[type, ...] = (feasible, fraction, share, ranks)
SCHEDULES: tuple[type, ...] = (constant, piecewise, linear, cosine, warmup, chain)
NESTED: dict[str, tuple[type, ...]] = {"relax": POLICIES, "ceiling": (welch,), "schedule": SCHEDULES, "parts": SCHEDULES}
"""Options whose value is itself a name or a table, and the classes it may name."""
LONGEST, DEEPEST = 2000, 100
"""Limits of an expression of layers: its characters, and its operators inside each other."""
PREDICATES = {
    predicate.name: predicate
    for predicate in (convs, linears, layers, spatial, pointwise, depthwise, stem, tall, zeros, embeddings, tied, head)
}


def penalty_of(config: Mapping[str, Any] | str) -> KernelMeasure:
    """The penalty that ``config`` describes.

    Raises:
        ValueError: an unknown name or option (the message names the known ones), or a value out of range.

    >>> from orthokit.spec import penalty_of
    >>> penalty_of({"name": "srip", "steps": 3}), penalty_of("so")
    (SRIP(steps=3), SO())
    """
    return cast(KernelMeasure, _build(config, PENALTIES, "penalty"))


def schedule_of(config: Mapping[str, Any] | float) -> Schedule:
    """The schedule that ``config`` describes; a number is a constant one.

    >>> from orthokit.spec import schedule_of
    >>> schedule_of({"name": "piecewise", "pieces": {"0": 0.1, "20": 0.01}})
    piecewise({0: 0.1, 20: 0.01})
    """
    return cast(Schedule, _build(config, SCHEDULES, "schedule")) if isinstance(config, (Mapping, str)) else as_schedule(config)


def config_of(value: object) -> Any:
    """The plain data from which :func:`penalty_of` or :func:`schedule_of` builds ``value``; defaults are left out.

    >>> from orthokit.spec import config_of, penalty_of
    >>> config_of(penalty_of({"name": "disentangled", "relax": {"name": "share", "q": 0.1}, "form": "welch"}))
    {'name': 'disentangled', 'relax': {'name': 'share', 'q': 0.1}, 'form': 'welch'}
    """
    if isinstance(value, constant):
        return value.strength
    if isinstance(value, (tuple, list)):
        return [config_of(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    options: dict[str, Any] = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, chain):
        options = {"parts": [*value.parts, value.last]}
    options = {
        name: {str(key): item for key, item in option} if name in ("pieces", "by_name") else config_of(option)
        for name, option in options.items()
        if name not in (defaults := _defaults(type(value))) or option != defaults[name]
    }
    return {"name": type(value).__name__.lower(), **options}


def where_of(text: str) -> Predicate:
    """The predicate that an expression of predicates' names describes, as written in Python and as printed.

    Raises:
        ValueError: something else than names of predicates, ``matching("...")``, ``&``, ``|``, ``~`` and brackets.

    >>> from orthokit.spec import where_of
    >>> where_of("convs & ~(stem | matching('layer1.*'))")
    (convs & ~(stem | matching('layer1.*')))
    """

    def read(node: ast.AST, depth: int = 0) -> Predicate:
        if depth > DEEPEST:
            raise ValueError
        read_inside = functools.partial(read, depth=depth + 1)
        match node:
            case ast.Name(name) if name in PREDICATES:
                return PREDICATES[name]
            case ast.UnaryOp(ast.Invert(), operand):
                return ~read_inside(operand)
            case ast.BinOp(left, ast.BitAnd(), right):
                return read_inside(left) & read_inside(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return read_inside(left) | read_inside(right)
            case ast.Call(ast.Name("matching"), [*patterns], []) if patterns:
                return matching(*(ast.literal_eval(pattern) for pattern in patterns))
        raise ValueError

    try:
        if len(text) > LONGEST:
            raise ValueError
        return read(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # the last is the parser's, of deep brackets
        names = ", ".join(PREDICATES)
        raise ValueError(
            f"where must combine {names} and matching('pattern', ...) with & | ~ and brackets, "
            f"at most {LONGEST:,} characters and {DEEPEST} operators deep; got {printable(repr(text), 100)}"
        ) from None


def _build(config: object, classes: tuple[type, ...], kind: str) -> object:
    if isinstance(config, str):
        config = {"name": config}
    if not isinstance(config, Mapping) or not isinstance(name := config.get("name"), str):
        raise ValueError(f"a {kind} is a name, or a table with a name and options; got {config!r}")
    classes_by_name = {cls.__name__.lower(): cls for cls in classes}
    if (cls := classes_by_name.get(name.lower())) is None:
        raise ValueError(f"no {kind} {name!r}{did_you_mean(name.lower(), classes_by_name)}")
    parameters = inspect.signature(cls).parameters
    options = {key: _option(key, value) for key, value in config.items() if key != "name"}
    for key in options:
        if key not in parameters:
            raise ValueError(f"{kind} {name} has no option {key!r}{did_you_mean(key, parameters)}")
    try:
        return cls(*options["parts"]) if cls is chain and options else cls(**options)
    except TypeError as error:  # a missing option, or a value of the wrong kind
        raise ValueError(f"{kind} {name}: {str(error).removeprefix(f'{cls.__name__}.__init__() ')}") from None
    except ValueError as error:
        raise ValueError(f"{kind} {name}: {error}") from None


def _option(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_option(key, item) for item in value)
    if key in NESTED and isinstance(value, (Mapping, str)):
        return _build(value, NESTED[key], key)
    if key == "pieces" and isinstance(value, Mapping):
        return {int(step) if str(step).isdecimal() else step: strength for step, strength in value.items()}
    return value


def _defaults(cls: type) -> dict[str, object]:
    return {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
