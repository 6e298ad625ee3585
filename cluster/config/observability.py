"""Options of traces and logs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cluster.core.checks import check, check_each

_OTLP_URL = re.compile(r"https?://[^\s/?#@]+:\d{1,5}/?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ObservabilitySection:
    """Traces of steps and of requests, and logs."""

    log_format: Literal["text", "json"] = "text"
    """Format of log records; ``json`` prints one object per line with request and generation."""
    trace_dir: str | None = None
    """Folder on each worker's host for a timeline of its steps, which Perfetto displays."""
    trace_max_bytes: int = 64 * 1024 * 1024
    """File size at which a worker starts a new timeline; it keeps one older file."""
    otlp_endpoint: str | None = None
    """OpenTelemetry collector (OTLP over gRPC) that gets request traces, such as
    http://HOST:4317."""
    trace_content: bool = False
    """Include prompts and outputs in request traces."""

    def __post_init__(self) -> None:
        url = self.otlp_endpoint
        rule = "must be http://HOST:PORT or https://HOST:PORT"
        check(url is None or _OTLP_URL.fullmatch(url) is not None, "otlp_endpoint", url, rule)
        has_place = url is not None or not self.trace_content
        check(has_place, "trace_content", self.trace_content, "needs otlp_endpoint")
        check(self.trace_dir != "", "trace_dir", "", "must not be empty")
        check_each(self, "trace_max_bytes", lambda size: size >= 1024, "must be >= 1024")
