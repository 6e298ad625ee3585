"""uvicorn's HTTP parser with a bound on what comes before the body.

Without it a client that never ends its headers fills the memory of whoever listens, and needs no
key for it (CVE-2025-48956 of another server). Ray Serve's proxy has no setting for this.
"""

from __future__ import annotations

import json

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cluster.errors import RequestTooLargeError
from gateway.errors import report_error

MAX_HEAD_BYTES = 16 * 1024
"""Request line and headers together."""
MAX_HEADERS = 256
"""Header lines."""
_STATUS = b"HTTP/1.1 431 Request Header Fields Too Large\r\n"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _is_in_head = True
    _num_unread = 0
    _num_head_bytes = 0
    _is_refused = False

    def data_received(self, data: bytes) -> None:
        """Parse what came, as far as it is not too much."""
        if self._is_refused:
            return
        if self._is_in_head:
            self._num_unread += len(data)
        super().data_received(data)
        if self._is_in_head and self._num_unread > MAX_HEAD_BYTES:
            self._refuse()

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._is_in_head, self._num_head_bytes, self._num_unread = True, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A part of the request line."""
        self._num_head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header line."""
        self._num_head_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The body begins."""
        self._is_in_head, self._num_unread = False, 0
        if self._num_head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refuse()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        if not self._is_refused:
            super().on_message_complete()
            self._is_in_head = True

    def _refuse(self) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        limits = f"{MAX_HEAD_BYTES} bytes, {MAX_HEADERS} lines"
        report = report_error(RequestTooLargeError(f"the headers are above the limit of {limits}"))
        content = json.dumps(report.body()).encode()
        lines = (
            _STATUS,
            b"content-type: application/json\r\nconnection: close\r\ncontent-length: ",
            str(len(content)).encode(),
            b"\r\n\r\n",
            content,
        )
        self.transport.write(b"".join(lines))
        self.transport.close()


def bound_headers() -> None:
    """For Serve's proxy, in its process: servers that are made from now on have the bound."""
    name = f"{BoundedHttpProtocol.__module__}:{BoundedHttpProtocol.__name__}"
    uvicorn.config.HTTP_PROTOCOLS["auto"] = name
