"""What must not be in the product, and what ``docs/security.md`` promises of its tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.paths import ROOT

PACKAGES = ("protos", "cluster", "workers", "gateway")
UNPICKLERS = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"})
DANGEROUS = frozenset(
    {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "numpy.load", "np.load"}
    | {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "jinja2.Environment", "jinja2.Template"}
)


def sources() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_nothing_unpickles() -> None:
    found = [(path, name) for path, tree in sources() for name in imports(tree)]
    assert found
    assert [(path, name) for path, name in found if name in UNPICKLERS] == []


def test_nothing_runs_what_it_reads() -> None:
    calls = [
        (path, ast.unparse(node.func), node)
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    assert [(path, name) for path, name, _ in calls if name in DANGEROUS] == []
    shells = [
        path
        for path, _, node in calls
        if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords)
    ]
    assert shells == []


def rows() -> list[list[str]]:
    """Cells of the threat table."""
    text = (ROOT / "docs" / "security.md").read_text()
    table = text.partition("## Threats")[2].partition("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_threat_table_is_there() -> None:
    assert len(rows()) >= 15


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:40])
def test_every_threat_has_a_test(row: list[str]) -> None:
    tests = re.findall(r"`([\w/.]+\.py)::(\w+)`", row[-1])
    assert tests, row
    for file, name in tests:
        source = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^(async )?def {name}\(", source, re.M), (file, name)
