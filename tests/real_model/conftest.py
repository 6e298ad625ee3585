"""The model is made once for all tests of this folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_model import maker
from tests.real_model.reference import Reference


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def reference() -> Iterator[Reference]:
    """Skips where the index does not have the model."""
    try:
        dense = maker.read_dense()
    except maker.UnavailableError as err:
        pytest.skip(f"the package {maker.PACKAGES[0]} cannot be had: {err}")
    with tempfile.TemporaryDirectory() as folder:
        folders = {family: dense.write(Path(folder) / family, family) for family in maker.FAMILIES}
        yield Reference(dense=dense.in_transformers(), tokenizer=dense.tokenizer(), folders=folders)
