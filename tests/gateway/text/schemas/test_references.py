"""References within one schema."""

from __future__ import annotations

import pytest

from gateway.text.schemas import references
from gateway.text.schemas.references import References, is_too_deep


@pytest.mark.parametrize(("length", "is_joined"), [(400, True), (100_000, False)])
def test_ids_are_relative_to_an_id_of_limited_length(
    length: int, is_joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part has a key with the id of the whole: 8 MB would otherwise take any memory."""
    joined: list[str] = []

    def join(base: str, address: str) -> str:
        joined.append(f"{base}{address}")
        return joined[-1]

    monkeypatch.setattr(references, "urljoin", join)
    root = f"https://{'a' * length}/"
    parts = {f"p{n}": {"$id": f"b{n}"} for n in range(20)}
    schema = References({"$id": root, "properties": parts})
    found = schema.find("b3")
    assert found is not None
    assert found.schema is parts["p3"]
    assert schema.find(root) is not None
    assert (schema.find(f"{root}b3") is not None) is is_joined
    assert is_joined or max(map(len, joined)) < 2 * length


def test_ids_of_a_schema_that_is_too_large_are_not_all_read() -> None:
    parts = {f"p{n}": {"$id": f"b{n}"} for n in range(20_001)}
    schema = References({"properties": parts})
    assert schema.find("b20000") is not None
    assert schema.find("b0") is None
    assert is_too_deep(schema)
