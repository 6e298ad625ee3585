"""docs/reference/conformance.md is what the code does."""

from __future__ import annotations

from gateway.protocols import ENDPOINTS
from tests.conformance.table import (
    DOCUMENT,
    fields_of,
    parameter_table,
    rendered,
    sent_by_clients,
)


def test_the_document_has_the_current_tables() -> None:
    message = "run: python -m tests.conformance.table"
    assert DOCUMENT.read_text(encoding="utf-8") == rendered(), message


def test_every_field_of_every_body_is_in_the_table() -> None:
    table = parameter_table()
    for endpoint in ENDPOINTS:
        for field in fields_of(endpoint.body) if endpoint.body else ():
            assert f"| `{field}` |" in table
    assert "| `best_of` | yes | 400 |" in table
    assert "| `tools` | 400 | yes |" in table


def test_clients_send_only_what_is_known() -> None:
    """An unknown field of a client is ignored: each such field must be listed."""
    known = {name.strip("`") for line in parameter_table().splitlines() for name in _names(line)}
    for client, routes in sent_by_clients().items():
        for path, seen in routes.items():
            unknown = {field.partition(".")[0] for field in seen["fields"]} - known
            assert not unknown, (client, path, unknown)


def _names(line: str) -> list[str]:
    return [name.strip() for name in line.split("|")[1].split(",")]
