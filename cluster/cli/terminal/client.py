"""HTTP client for a running cluster. Imports only the standard library, to start fast."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.progress import waiting
from cluster.cli.terminal.tls import tls_context
from cluster.launch import state_file

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 10.0
"""Longest wait for a connection, and for a response to a call that runs no model, in seconds."""
_PATHS_OF_MODELS = ("/cluster/v1/", "/admin/v1/")
"""Beginnings of the paths that concern the workers of one model, which ``--model`` names."""
_SILENCE_LIMIT_S = 120.0
"""Longest silence in a stream, in seconds: a gateway sends a comment every 15 s."""


def find_url(args: argparse.Namespace) -> str:
    """Return the gateway's URL: ``--url``, ``EXPERTMESH_URL``, a local cluster or the default."""
    if args.url is not None:
        return validate_url(str(args.url), "--url")
    if given := os.environ.get("EXPERTMESH_URL"):
        return validate_url(given, "EXPERTMESH_URL")
    record = find_record(args)
    return DEFAULT_URL if record is None else record.http


def find_record(args: argparse.Namespace) -> state_file.ClusterRecord | None:
    """Return the record of the named, the default or the only cluster of this host, or None.

    Raises ``CommandError`` if the named cluster does not run, or the choice is ambiguous.
    """
    alive = {r.name: r for r in state_file.running_records()}
    name = args.name or os.environ.get("EXPERTMESH_NAME")
    running = ", ".join(map(str, alive.values()))
    if name and name not in alive:
        message = f"no cluster called {name} runs on this host; running: {running or 'none'}"
        raise CommandError(ExitCode.UNREACHABLE, message)
    if not name and state_file.DEFAULT_NAME not in alive and len(alive) > 1:
        message = f"several clusters run on this host: {running}; choose one with --name"
        raise CommandError(ExitCode.USAGE, message)
    return alive.get(name or state_file.DEFAULT_NAME) or next(iter(alive.values()), None)


class _Document(dict[str, Any]):
    """A JSON object in a response. If a field is missing, the server is no gateway."""

    def __missing__(self, key: str) -> Any:
        message = f"the server does not answer like an expertmesh gateway: no field {key}"
        raise CommandError(ExitCode.UNREACHABLE, message)


class Client:
    """Sends requests to one URL. Errors become ``CommandError`` with the matching exit code."""

    def __init__(
        self,
        args: argparse.Namespace,
        admin_url: str = "",
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``admin_url``: admin port to call instead of the gateway of ``args``.

        ``headers``: further headers of every request. ``key`` replaces the keys of ``args`` and
        the environment; empty: send no key.
        """
        self.url = admin_url or find_url(args)
        self._timeout_s: float | None = args.timeout
        self._model: str | None = getattr(args, "model", None)
        self._key = args.api_key or os.environ.get("EXPERTMESH_API_KEY", "")
        self._admin_key = args.admin_key or os.environ.get("EXPERTMESH_ADMIN_KEY", "")
        self._is_admin = bool(admin_url)
        self._more_headers = headers or {}
        if admin_url:
            self._key = self._admin_key or self._key
        if key is not None:
            self._key = self._admin_key = key
        _check_keys(self._key, self._admin_key)
        self.tls = tls_context(args) if self.url.startswith("https:") else None
        """TLS context for https; None for http."""

    def get(self, path: str, any_status: bool = False) -> Any:
        """Return the JSON document at ``path``.

        ``any_status``: return the document of an error response instead of raising an error, unless
        the key is rejected. If the gateway shows only a part of the document to the client's key,
        the client reads the document again with the admin key, if there is one.
        """
        document, key = self._parse(self._read(path, None, any_status)), self._key
        if isinstance(document, dict) and document.get("is_partial") and self._use_admin_key():
            try:
                return self._parse(self._read(path, None, any_status))
            except CommandError as err:
                if err.code is not ExitCode.UNAUTHORISED:
                    raise
                self._key = key  # the admin key is for another cluster
        return document

    def get_text(self, path: str) -> str:
        """Return the response body at ``path``."""
        return self._read(path).decode(errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST ``body`` and return the JSON document of the response."""
        return self._parse(self._read(path, body))

    def run_model(self, path: str, body: dict[str, Any]) -> Any:
        """POST ``body`` for a call that runs the model: only ``--timeout`` limits its time.

        Returns the JSON document of the response.
        """
        with waiting(f"waiting for {self.url}"), self._open(path, body, silence_s=None) as reply:
            return self._parse(bytes(reply.read()))

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request, with the API key."""
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", **key, **self._more_headers}

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a POST request and yield the ``data:`` events of the response up to ``[DONE]``.

        A long prompt may delay the first event: without ``--timeout`` the call fails only if the
        server sends nothing, not even comments. Shows progress until the first event.
        """
        with contextlib.ExitStack() as until_first:
            until_first.enter_context(waiting("waiting for the first token"))
            with self._open(path, body, silence_s=_SILENCE_LIMIT_S) as reply:
                for line in reply:
                    if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                        until_first.close()
                        yield self._parse(line[len(b"data: ") :])

    def _read(
        self, path: str, body: dict[str, Any] | None = None, any_status: bool = False
    ) -> bytes:
        with self._open(path, body, any_status) as reply:
            return bytes(reply.read())

    @contextlib.contextmanager
    def _open(
        self,
        path: str,
        body: dict[str, Any] | None,
        any_status: bool = False,
        silence_s: float | None = DEFAULT_TIMEOUT_S,
    ) -> Iterator[Any]:
        """Send a request (GET without a body) and yield the open response.

        Converts errors to ``CommandError``. ``silence_s``: longest wait for the next bytes without
        ``--timeout``; None: no limit.
        """
        data = None if body is None else json.dumps(body).encode()
        limit_s = self._timeout_s or silence_s
        try:
            try:
                with self._reply(path, data, limit_s) as reply:
                    yield reply
            except urllib.error.HTTPError as err:
                if not any_status or err.code in (401, 403):
                    found = response_error(err.code, err.read())
                    raise self._with_key_option(found, err.code) from err
                yield err
        except http.client.IncompleteRead as err:
            message = f"the response of {self.url} ended before it was complete"
            raise CommandError(ExitCode.UNREACHABLE, message) from err
        except http.client.HTTPException as err:
            raise self._unlike_gateway() from err
        except (OSError, ValueError) as err:
            raise self._unreachable(err, limit_s) from err

    def _with_key_option(self, err: CommandError, status: int) -> CommandError:
        """Add a hint to the error that names the option for the missing or wrong key."""
        if err.code != ExitCode.UNAUTHORISED:
            return err
        which = "admin" if self._is_admin or status == 403 else "api"
        hint = f"--{which}-key or EXPERTMESH_{which.upper()}_KEY gives it"
        return CommandError(err.code, f"{err} ({hint})")

    def _reply(self, path: str, data: bytes | None, limit_s: float | None) -> Any:
        """Send a request; a GET with a rejected key is retried with the admin key."""
        try:
            return self._send(path, data, limit_s)
        except urllib.error.HTTPError as err:
            if err.code not in (401, 403) or data is not None or not self._use_admin_key():
                raise
            err.close()
        return self._send(path, data, limit_s)

    def _send(self, path: str, data: bytes | None, limit_s: float | None) -> Any:
        if self._model is not None and path.startswith(_PATHS_OF_MODELS):
            join = "&" if "?" in path else "?"
            path = f"{path}{join}model={quote(self._model, safe='')}"
        request = urllib.request.Request(f"{self.url}{path}", data=data, headers=self.headers)
        opener = urllib.request.build_opener(_Http(limit_s), _Https(limit_s, self.tls))
        return opener.open(request, timeout=self._timeout_s or DEFAULT_TIMEOUT_S)

    def _use_admin_key(self) -> bool:
        """Use the admin key for further requests; return whether this changes the key."""
        has_changed = self._admin_key not in ("", self._key)
        self._key = self._admin_key or self._key
        return has_changed

    def _parse(self, body: bytes) -> Any:
        """Return a JSON object. Raises ``CommandError`` for any other text: all documents of a
        gateway are objects."""
        try:
            document = json.loads(body, object_hook=_Document)
        except (ValueError, RecursionError) as err:
            raise self._unlike_gateway() from err
        if not isinstance(document, dict):
            raise self._unlike_gateway()
        return document

    def _unlike_gateway(self) -> CommandError:
        message = f"{self.url} does not answer like an expertmesh gateway"
        return CommandError(ExitCode.UNREACHABLE, message)

    def _unreachable(self, err: Exception, limit_s: float | None) -> CommandError:
        reason = getattr(err, "reason", err)
        if isinstance(err, TimeoutError) or isinstance(reason, TimeoutError):
            limit_s = limit_s or DEFAULT_TIMEOUT_S
            message = f"{self.url} did not answer within {limit_s:g} s (--timeout)"
            return CommandError(ExitCode.NOT_READY, message)
        for record in state_file.all_records():
            if record.http == self.url and record.state == "starting" and record.is_alive:
                logs = f"expertmesh logs --name {record.name} --follow"
                message = f"cluster {record.name} is starting at {self.url}: {logs}"
                return CommandError(ExitCode.NOT_READY, message)
        message = f"cannot reach {self.url}: {reason}"
        if self.url == DEFAULT_URL and not any(state_file.all_records()):
            message += " (no cluster is recorded on this host; --url names a server elsewhere)"
        return CommandError(ExitCode.UNREACHABLE, message)


class _Http(urllib.request.HTTPHandler):
    """Opens HTTP connections with one time limit for connecting and another for reading."""

    def __init__(self, read_limit_s: float | None) -> None:
        super().__init__()
        self._read_limit_s = read_limit_s

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)

    def _connection(self, host: str, **options: Any) -> http.client.HTTPConnection:
        return _with_read_limit(http.client.HTTPConnection(host, **options), self._read_limit_s)


class _Https(urllib.request.HTTPSHandler):
    """Opens HTTPS connections with one time limit for connecting and another for reading."""

    def __init__(self, read_limit_s: float | None, tls: ssl.SSLContext | None) -> None:
        super().__init__(context=tls)
        self._tls = tls
        self._read_limit_s = read_limit_s

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request, context=self._tls)

    def _connection(self, host: str, **options: Any) -> http.client.HTTPConnection:
        return _with_read_limit(http.client.HTTPSConnection(host, **options), self._read_limit_s)


def _with_read_limit(
    connection: http.client.HTTPConnection, limit_s: float | None
) -> http.client.HTTPConnection:
    """Make a connection change its time limit to ``limit_s`` once the connection is open."""
    connect = connection.connect

    def connect_then_limit() -> None:
        connect()
        connection.sock.settimeout(limit_s)

    connection.connect = connect_then_limit  # type: ignore[method-assign]
    return connection


def require_full_status(status: Mapping[str, Any], what: str) -> None:
    """Raise ``CommandError`` if the status is partial because the key is not an admin key.

    ``what``: the missing part, for the message.
    """
    if status.get("is_partial"):
        message = f"the server shows {what} to admin keys only: give --admin-key"
        raise CommandError(ExitCode.UNAUTHORISED, message)


def validate_url(url: str, origin: str) -> str:
    """Validate and return a URL. Errors (``CommandError``, usage) name the URL's ``origin``."""
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets, or a port that is not a number
        is_good = False
    if not is_good or any(c <= " " or c == "\x7f" for c in url):
        message = f"{origin} ({url}) must be a URL of http or https, such as {DEFAULT_URL}"
        raise CommandError(ExitCode.USAGE, message)
    return url.rstrip("/")


def _check_keys(*keys: str) -> None:
    """Raise ``CommandError`` (usage), without the key, if no HTTP header can hold a key."""
    if not all(key.isprintable() and key.isascii() for key in keys):
        message = "--api-key and --admin-key must have printable ASCII characters only"
        raise CommandError(ExitCode.USAGE, message)


def response_error(status: int, body: bytes) -> CommandError:
    """Convert the error object of a response to a ``CommandError``."""
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        message = body[:200].decode(errors="replace").strip() or f"HTTP status {status}"
    codes = {
        **dict.fromkeys((400, 404, 409, 413, 501), ExitCode.REFUSED),
        **dict.fromkeys((401, 403), ExitCode.UNAUTHORISED),
        **dict.fromkeys((408, 429, 503, 504), ExitCode.NOT_READY),
    }
    return CommandError(codes.get(status, ExitCode.FAILED), message)
