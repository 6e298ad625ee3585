"""Whole clusters: ``distributed``, but for the two files that are laws and take seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

LAWS = ("test_option_pairs.py", "test_family_pairs.py")
"""Cluster equals local engine, and equals transformers, for every pair of options."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.path.name not in LAWS:
            item.add_marker(pytest.mark.distributed)
