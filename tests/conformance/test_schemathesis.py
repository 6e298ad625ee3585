"""schemathesis makes requests of the OpenAPI document: never a 5xx, every answer as it says."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.gateway.stack import Stack

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("EXPERTMESH_FUZZ_EXAMPLES", "50"))
"""Requests for each route."""
schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: pip install expertmesh[clients]"
)


@pytest.mark.filterwarnings("default")  # schemathesis and what it brings are not ours
def test_what_the_document_allows_is_answered_as_it_says(stack: Stack) -> None:
    import hypothesis
    from schemathesis import checks

    wanted = checks.CHECKS.get_by_names(
        [
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_headers_conformance",
            "response_schema_conformance",
        ]
    )
    document = stack.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    counts: dict[str, int] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        name = f"{operation.method} {operation.path}"

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: Any, name: str = name) -> None:
            if isinstance(case.body, dict):
                _bound(case.body)
            response = case.call(base_url=stack.url, timeout=60)
            case.validate_response(response, checks=wanted)
            counts[name] = counts.get(name, 0) + 1

        ask()
    assert sum(counts.values()) > EXAMPLES
    assert len(counts) == len(document["paths"]), json.dumps(counts)


def _bound(body: dict[str, Any]) -> None:
    """Keep answers short: what is tested is the interface, not patience."""
    for name in ("max_tokens", "max_completion_tokens"):
        if type(body.get(name)) is int and body[name] > 8:
            body[name] = 8
    if "messages" in body or "prompt" in body:
        body.setdefault("max_tokens", 8)
