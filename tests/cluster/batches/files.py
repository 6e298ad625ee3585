"""Batch files for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def line(custom_id: str = "a", **changed: Any) -> dict[str, Any]:
    """A request for a completion."""
    body = {"prompt": custom_id, "max_tokens": 4}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": body,
        **changed,
    }


def write_lines(path: Path, lines: list[Any]) -> Path:
    """A file with these objects, or texts as they are."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file."""
    return [json.loads(text) for text in path.read_text().splitlines()]
