"""What import contracts (``lint-imports``, in ``pyproject.toml``) cannot say about the layout."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.paths import ROOT
from workers.model.families.registry import FAMILIES

PACKAGES = ("protos", "cluster", "workers", "gateway", "expertmesh")


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the product by its dotted name."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield ".".join(p for p in parts if p != "__init__"), path


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax of a file. CPython 3.11 fails now and then where another thread parses too."""
    text = path.read_text()
    for _ in range(20):
        try:
            return ast.parse(text)
        except SystemError:  # AST constructor recursion depth mismatch
            continue
    return ast.parse(text)


def test_package_files_hold_a_docstring_and_no_import() -> None:
    """``expertmesh`` alone offers names."""
    for path in ROOT.glob("*/**/__init__.py"):
        if path.relative_to(ROOT).parts[0] in PACKAGES and path.parent.name != "expertmesh":
            tree = parsed(path)
            assert ast.get_docstring(tree), path
            kinds = (ast.Import, ast.ImportFrom)
            assert not any(isinstance(node, kinds) for node in ast.walk(tree)), path


def test_every_package_is_listed_for_installation() -> None:
    listed = (ROOT / "pyproject.toml").read_text()
    for path in ROOT.glob("*/**/__init__.py"):
        parts = path.relative_to(ROOT).parent.parts
        if parts[0] in PACKAGES:
            assert f'"{".".join(parts)}"' in listed


def test_only_family_modules_know_families() -> None:
    for module, path in modules():
        if module.startswith("workers.model.families"):
            continue
        texts = {
            node.value
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & FAMILIES.keys(), path
