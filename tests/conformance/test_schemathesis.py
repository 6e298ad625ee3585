"""schemathesis makes requests of the OpenAPI document: never a 5xx, every answer as it says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.gateway.stack import Stack
from tests.harness.clients import program

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "clients" / "use_schemathesis.py"
EXAMPLES = os.environ.get("EXPERTMESH_FUZZ_EXAMPLES", "50")
"""Requests for each route, most of them with a body."""
LIMIT_S = 540.0


def test_what_the_document_allows_is_answered_as_it_says(stack: Stack, tmp_path: Path) -> None:
    kept = Path(".hypothesis/schemathesis").absolute()
    words = [program("python", "schemathesis"), str(PROGRAM), stack.url, EXAMPLES, str(kept)]
    done = subprocess.run(words, cwd=tmp_path, timeout=LIMIT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-9000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    paths = stack.http.get("/openapi.json").json()["paths"]
    assert summary["operations"] == sum(map(len, paths.values()))
    assert {200, 400} <= set(summary["statuses"])
