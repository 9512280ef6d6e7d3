"""Names of the package that begin with an underscore are its own: nothing else in the repository reaches for them."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
USERS = ("app", "benchmarks", "demo", "evaluation", "examples", "hub_upload", "training")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_bound_in(tree: ast.AST) -> set[str]:
    """Private functions, classes, variables and attributes that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def names_reached_for_in(tree: ast.AST) -> set[str]:
    """Private attributes of whatever object, and private names in imports from the package."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recoverable_llava"):
            names |= {alias.name for alias in node.names}
    return {name for name in names if is_private(name)}


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


PRIVATE = set().union(*(names_bound_in(parse(path)) for path in (ROOT / "recoverable_llava").rglob("*.py")))


def test_the_check_sees_what_it_is_for():
    assert {"_compress", "_loss", "_density_of"} - PRIVATE == {"_density_of"}
    code = "from recoverable_llava.x import _a\nmodel._compress(1)\nsuper()._loss()\nmodel.__class__\n"
    assert names_reached_for_in(ast.parse(code)) == {"_a", "_compress", "_loss"}


@pytest.mark.parametrize("folder", USERS)
def test_private_names_stay_in_the_package(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        tree = parse(path)
        reached = names_reached_for_in(tree) & PRIVATE - names_bound_in(tree)
        assert not reached, f"{path.relative_to(ROOT)} reaches for {sorted(reached)}"
