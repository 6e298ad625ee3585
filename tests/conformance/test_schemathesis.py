"""schemathesis makes requests of the OpenAPI document: never a 5xx, every answer as it says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest

from tests.gateway.stack import WAIT_S, Stack

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("EXPERTMESH_FUZZ_EXAMPLES", "50"))
"""Requests for each route, most of them with a body."""
LIMIT = "x-request-timeout-ms"
schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install schemathesis"
)


@pytest.mark.filterwarnings("default")  # schemathesis and what it brings are not ours
def test_what_the_document_allows_is_answered_as_it_says(stack: Stack) -> None:
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as of_documents

    wanted = [
        checks.not_a_server_error,
        of_documents.status_code_conformance,
        of_documents.content_type_conformance,
        of_documents.response_headers_conformance,
        of_documents.response_schema_conformance,
    ]
    document = stack.http.get("/openapi.json").json()
    operations = [
        found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()
    ]
    assert len(operations) == len(document["paths"])
    statuses: set[int] = set()
    for operation in operations:
        statuses |= fuzz(stack.url, operation, wanted)
    assert {200, 400} <= statuses


def fuzz(url: str, operation: Any, wanted: Sequence[Any]) -> set[int]:
    """Send requests of one route, check the answers; the statuses that came."""
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            _bound(case.body)
        limit = (case.headers or {}).get(LIMIT, "")
        if limit.isdecimal() and 0 < int(limit) < 60_000:
            case.headers[LIMIT] = "60000"  # 504 is what a client's own limit may lead to
        response = case.call(base_url=url, timeout=WAIT_S)
        case.validate_response(response, checks=wanted)
        statuses.add(response.status_code)

    ask()
    return statuses


def _bound(body: dict[str, Any]) -> None:
    """Keep answers short: what is tested is the interface, not patience."""
    for name in ("max_tokens", "max_completion_tokens"):
        if type(body.get(name)) is int and body[name] > 8:
            body[name] = 8
    if "messages" in body or "prompt" in body:
        body.setdefault("max_tokens", 8)
