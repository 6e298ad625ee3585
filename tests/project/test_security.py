"""The tests that ``docs/reference/security.md`` names."""

from __future__ import annotations

import re

import pytest

from tests.paths import ROOT


def rows() -> list[list[str]]:
    """Cells of the threat table."""
    text = (ROOT / "docs" / "reference" / "security.md").read_text()
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
