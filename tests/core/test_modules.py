"""Every public module says in ``__all__`` what it offers."""

import ast
from pathlib import Path

import pytest

import orthokit

ROOT = Path(orthokit.__file__).parent


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if not any(part.startswith("_") for part in name.split(".")):
            yield pytest.param(ast.parse(path.read_text()).body, id=name or "orthokit")


def bound(body):
    """The names that statements bind at the top of a module."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)
            case ast.Assign(targets=targets):
                yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If(body=inner, orelse=orelse) | ast.Try(body=inner, orelse=orelse):
                yield from bound([*inner, *orelse])


@pytest.mark.parametrize("body", list(modules()))
def test_a_module_says_what_it_offers(body):
    offers = [
        ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if not offers:  # a folder's note, at most
        assert all(isinstance(node, ast.Expr | ast.Import | ast.ImportFrom) for node in body)
        return
    (names,) = offers
    own = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")}
    assert set(names) <= set(bound(body))
    assert own <= set(names), "begin a name with _ or list it"
    kinds = [
        name if len(name) > 1 and name == name.upper() else f"_{name}" if name[0].isupper() else f"~{name}" for name in names
    ]
    assert names == [name for _, name in sorted(zip(kinds, names, strict=True))], "sorted as ruff sorts (RUF022)"
