"""The import table of the code style: every package imports only what stands above it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protos", "cluster", "workers", "gateway")
LEAVES = frozenset(
    f"cluster.{name}"
    for name in (
        "api_keys",
        "config",
        "config_checks",
        "gateway_config",
        "errors",
        "topology",
        "placement",
        "load_profile",
        "load_report",
        "control_frames",
        "spans",
        "span_export",
    )
)
SPAN_EXPORT = "cluster.span_export"
"""The one leaf, and the one module of all, that knows OpenTelemetry."""
REQUEST_TYPES = frozenset(
    f"workers.{name}"
    for name in ("request", "wire", "inspection", "classifier", "prompt_embeds", "prefix_hash")
)
EDGES = frozenset(
    f"cluster.{name}"
    for name in (
        "worker_group",
        "controller_actor",
        "controller_handle",
        "control_server",
        "ray_tools",
        "process",
    )
)
"""Cluster modules that touch Ray, sockets or processes."""
ROOTS = frozenset(
    f"cluster.{name}"
    for name in (
        "launch",
        "launch_plan",
        "cluster_parts",
        "local_ray",
        "state_file",
        "orphans",
        "model_source",
        "checkpoint_check",
        "end_joined",
        "serve_proxy",
        "joining",
        "cluster_calls",
    )
)
"""The composition root, with ``cluster.cli``: may import everything."""
WORKER_EDGES = frozenset(
    f"workers.{name}"
    for name in (
        "actor",
        "actor_classes",
        "attention_worker",
        "expert_worker",
        "colocated_worker",
        "engine_server",
    )
)
GATEWAY_RAY = frozenset({"gateway.app", "gateway.cluster_client"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one module may import of our packages, ray and torch."""

    ours: tuple[str, ...]
    """Allowed modules of ours, packages with all below them."""
    ray: bool = False
    """Whether ray is allowed."""
    torch: bool = False
    """Whether torch is allowed."""
    only: frozenset[str] | None = None
    """Third-party packages allowed; None allows any."""


def rule_for(module: str) -> Rule:
    """The table, row by row."""
    leaves = tuple(LEAVES)
    package = module.partition(".")[0]
    if package == "protos":
        return Rule(ours=("protos",))
    if module == SPAN_EXPORT:
        return Rule(ours=leaves, only=frozenset({"opentelemetry"}))
    if module in LEAVES:
        return Rule(ours=leaves, only=frozenset({"numpy"}))
    if module in ROOTS or module.startswith("cluster.cli"):
        return Rule(ours=PACKAGES, ray=True, torch=True)
    if module in EDGES:
        return Rule(ours=("cluster",), ray=True)
    if package == "cluster":
        return Rule(ours=("cluster",), only=frozenset({"numpy"}))
    if module in REQUEST_TYPES:
        return Rule(ours=("protos", *REQUEST_TYPES, *leaves))
    if module in WORKER_EDGES:
        return Rule(ours=("workers", "protos", *leaves), ray=True, torch=True)
    if package == "workers":
        return Rule(ours=("workers", *leaves), torch=True)
    ours = ("gateway", "protos", *REQUEST_TYPES, *leaves)
    return Rule(ours=ours, ray=module in GATEWAY_RAY)


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


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, also inside of functions and for types only."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or package of ours, not something within one."""
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def violations(module: str, path: Path) -> Iterator[str]:
    """Imports of one module that its rule forbids."""
    rule = rule_for(module)
    for name in imports(path):
        top = name.partition(".")[0]
        if top in PACKAGES:
            is_allowed = any(name == o or name.startswith(f"{o}.") for o in rule.ours)
            is_parent = any(o.startswith(f"{name}.") for o in rule.ours)  # from cluster import x
            if is_module(name) and not is_allowed and not is_parent:
                yield name
        elif not _may_import_library(rule, top):
            yield name


def _may_import_library(rule: Rule, top: str) -> bool:
    if top in ("ray", "torch"):
        return rule.ray if top == "ray" else rule.torch
    return rule.only is None or top in rule.only or top in sys.stdlib_module_names


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda v: str(v).split("/")[-1])
def test_imports_point_down_the_table(module: str, path: Path) -> None:
    assert sorted(set(violations(module, path))) == []


def test_core_modules_do_not_import_the_edges() -> None:
    for module, path in modules():
        is_core = module.startswith("cluster.") and not module.startswith("cluster.cli")
        if is_core and module not in LEAVES | EDGES | ROOTS:
            found = set(imports(path)) & (EDGES | ROOTS)
            assert found == set(), f"{module} imports {found}"


def test_edges_do_not_import_the_composition_root() -> None:
    for module, path in modules():
        if module.startswith(("cluster.", "workers.", "gateway.")) and module not in ROOTS:
            found = {n for n in imports(path) if n in ROOTS or n.startswith("cluster.cli")}
            assert module.startswith("cluster.cli") or found == set(), f"{module} imports {found}"


def test_package_files_hold_a_docstring_and_no_import() -> None:
    for path in ROOT.glob("*/**/__init__.py"):
        if path.relative_to(ROOT).parts[0] in PACKAGES:
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


def test_sources_do_not_print() -> None:
    for module, path in modules():
        for node in ast.walk(parsed(path)):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not is_print, f"{module} line {getattr(node, 'lineno', 0)}"


def test_the_product_does_not_import_transformers() -> None:
    """It is there for tests, benchmarks, and the script that trained the bundled model."""
    for module, path in modules():
        if not module.startswith("workers.demo"):
            assert "transformers" not in {name.split(".")[0] for name in imports(path)}, path


def test_one_module_imports_opentelemetry() -> None:
    """Whoever is not told of a collector does not need the packages."""
    tops = {module: {name.split(".")[0] for name in imports(path)} for module, path in modules()}
    found = {module for module, names in tops.items() if "opentelemetry" in names}
    assert found == {SPAN_EXPORT}


def test_only_family_modules_know_families() -> None:
    for module, path in modules():
        if module.startswith(("workers.families", "workers.demo")):
            continue
        texts = {
            node.value
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & {"olmoe", "dots1", "jetmoe"}, path


def test_a_forbidden_import_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import ray.actor\nfrom gateway import core\nfrom cluster.errors import ConfigError\n"
    )
    assert list(violations("workers.scheduler", path)) == ["ray.actor", "gateway", "gateway.core"]
    assert list(violations("gateway.app", path)) == []
    assert next(violations("cluster.controller", path)) == "ray.actor"
