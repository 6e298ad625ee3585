"""The generated pages of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs.generate.command_line import command_line
from docs.generate.errors import errors
from docs.generate.grpc_api import grpc_api
from docs.generate.http_api import http_api
from docs.generate.metrics import metrics
from docs.generate.options import options

REFERENCE = Path(__file__).resolve().parent.parent / "reference"
PAGES: dict[str, Callable[[], str]] = {
    "command-line.md": command_line,
    "errors.md": errors,
    "grpc-services.md": grpc_api,
    "http.md": http_api,
    "metrics.md": metrics,
    "options.md": options,
}
"""What makes the text of each page in ``docs/reference``."""
