"""schemathesis makes requests of a server's OpenAPI document; prints the statuses that came.

Fails on a 5xx, and on an answer that is not as the document says. ``python use_schemathesis.py
http://127.0.0.1:8000 50 folder`` sends 50 requests for each route, and keeps failed ones in
``folder`` for the next run.
"""

import json
import sys
import urllib.request

import hypothesis
import schemathesis
from hypothesis.database import DirectoryBasedExampleDatabase
from schemathesis import checks
from schemathesis.specs.openapi import checks as of_documents

WANTED = [
    checks.not_a_server_error,
    of_documents.status_code_conformance,
    of_documents.content_type_conformance,
    of_documents.response_headers_conformance,
    of_documents.response_schema_conformance,
]
LIMIT = "x-request-timeout-ms"
WAIT_S = 120.0


def main() -> None:
    url, num_examples, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    with urllib.request.urlopen(f"{url}/openapi.json") as reply:
        document = json.load(reply)  # from_url leaves out the document's own route
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: set[int] = set()
    for operation in operations:
        statuses |= fuzz(url, operation, num_examples, folder)
    print(json.dumps({"operations": len(operations), "statuses": sorted(statuses)}))


def fuzz(url, operation, num_examples: int, folder: str) -> set[int]:
    """Send requests of one route, check the answers; the statuses that came."""
    statuses: set[int] = set()

    @hypothesis.settings(
        max_examples=num_examples,
        deadline=None,
        database=DirectoryBasedExampleDatabase(folder),
        derandomize=False,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy())
    def ask(case) -> None:
        if isinstance(case.body, dict):
            bound(case.body)
        limit = (case.headers or {}).get(LIMIT, "")
        if limit.isdecimal() and 0 < int(limit) < 60_000:
            case.headers[LIMIT] = "60000"  # 504 is what a client's own limit may lead to
        response = case.call(base_url=url, timeout=WAIT_S)
        case.validate_response(response, checks=WANTED)
        statuses.add(response.status_code)

    ask()
    return statuses


def bound(body: dict) -> None:
    """Keep answers short: what is tested is the interface, not patience."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if type(body.get(name)) is int and body[name] > 8:
            body[name] = 8
    if "messages" in body or "prompt" in body:
        body.setdefault("max_tokens", 8)
    elif body.get("max_output_tokens") is None:
        body["max_output_tokens"] = 8  # of Responses; others ignore it


if __name__ == "__main__":
    main()
