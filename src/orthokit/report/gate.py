"""A condition on a report's columns, such as ``copies > 0 or max_cos > .95``, for continuous integration."""

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orthokit.checks import did_you_mean, printable
from orthokit.report.measure import is_measured
from orthokit.tables import Column, Row

__all__ = ["Condition"]

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
LENGTH = 1000
"""Characters of a condition."""


@dataclass(frozen=True)
class Condition:
    """A condition that a layer's row meets or not.

    Comparisons of a column with a number, a quoted word or another column, combined with ``and``, ``or``, ``not`` and brackets. A
    column without a value for a layer meets no comparison. Nothing is executed.

    Args:
        text: such as ``"copies > 0"``.
        columns: the columns there are.

    Raises:
        ValueError: the text is no such condition; the message says what is wrong.

    >>> from orthokit.report.gate import Condition
    >>> Condition("copies > 0 and max_cos > .95", orthokit.report(nn.Linear(2, 2)).columns).met({"copies": 2, "max_cos": 0.99})
    True
    """

    text: str
    columns: Sequence[Column] = field(repr=False)
    _tree: ast.expr = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.text) > LENGTH:
            raise ValueError(f"a condition has at most {LENGTH} characters; got {len(self.text):,}")
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise self._wrong("it cannot be read") from None
        self._check(tree)
        object.__setattr__(self, "_tree", tree)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns it names."""
        return tuple(dict.fromkeys(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)))

    def met(self, row: Row) -> bool:
        """Whether a row meets it."""
        return self._holds(self._tree, row)

    def failure(self, row: Row) -> str:
        """Why a layer does not pass: ``copies = 3, max_cos = 1``, or that it has no figures to judge; empty if it passes."""
        if not is_measured(row):
            return "NaN, infinite or overflowing weights: nothing to judge"
        return self._values(row) if self.met(row) else ""

    def _values(self, row: Row) -> str:
        values = {name: row[name] for name in self.names}
        shown = {name: f"{value:.4g}" if isinstance(value, float) else printable(value) for name, value in values.items()}
        return ", ".join(f"{name} = {value}" for name, value in shown.items())

    def _wrong(self, why: str) -> ValueError:
        return ValueError(
            f'{self.text[:80]!r}: {why}; a condition compares columns with numbers, such as "copies > 0" or '
            "\"max_cos > .95 and word != 'copies'\""
        )

    def _check(self, node: ast.AST) -> None:
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value)
            case ast.UnaryOp(ast.Not(), operand):
                self._check(operand)
            case ast.Compare(left, ops, others) if all(type(op) in COMPARISONS for op in ops):
                for first, op, second in zip([left, *others], ops, others, strict=False):
                    self._check_comparison(first, op, second)
            case _:
                raise self._wrong("it cannot be read")

    def _check_comparison(self, first: ast.expr, op: ast.cmpop, second: ast.expr) -> None:
        formats = {column.key: column.format for column in self.columns}
        names = [side.id for side in (first, second) if isinstance(side, ast.Name)]
        for name in names:
            if name not in formats:
                raise ValueError(f"{self.text[:80]!r}: no column {name!r}{did_you_mean(name, formats)}")
        if not names:
            raise self._wrong("it cannot be read")
        is_text = formats[names[0]] == "s"
        for side in (first, second):
            if isinstance(side, ast.Name):
                fits = (formats[side.id] == "s") == is_text
            else:
                constant = _constant(side)
                fits = constant is not None and isinstance(constant, str) == is_text
            if not fits:
                raise self._wrong(f"{names[0]} must be compared with {'a quoted word' if is_text else 'a number'}")
        if is_text and not isinstance(op, ast.Eq | ast.NotEq):
            raise self._wrong(f"{names[0]} is a word: it is equal to another (==) or not (!=)")

    def _holds(self, node: ast.AST, row: Row) -> bool:
        match node:
            case ast.BoolOp(ast.And(), values):
                return all(self._holds(value, row) for value in values)
            case ast.BoolOp(ast.Or(), values):
                return any(self._holds(value, row) for value in values)
            case ast.UnaryOp(ast.Not(), operand):
                return not self._holds(operand, row)
            case ast.Compare(left, ops, others):
                operands = [row[side.id] if isinstance(side, ast.Name) else _constant(side) for side in (left, *others)]
                return None not in operands and all(
                    COMPARISONS[type(op)](first, second) for first, op, second in zip(operands, ops, operands[1:], strict=False)
                )
        raise AssertionError(ast.dump(node))


def _constant(node: ast.AST) -> float | str | None:
    match node:
        case ast.Constant(bool()):
            return None
        case ast.Constant(int() | float() | str() as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)) if not isinstance(value, bool):
            return -value
    return None
