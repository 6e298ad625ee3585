"""TLS files of a command that calls servers, from options or variables."""

from __future__ import annotations

import argparse
import os
import ssl

from cluster.cli.terminal.exit_codes import CommandError, ExitCode

_NAMES = ("ca_cert", "client_cert", "client_key")


def tls_files(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the paths of ``--ca-cert``, ``--client-cert`` and ``--client-key`` by name.

    Environment variables are the defaults; None: not given. Raises ``CommandError`` (usage) for a
    file that cannot be read, or a key without a certificate.
    """
    found = {name: getattr(args, name) or os.environ.get(_variable(name)) for name in _NAMES}
    for name, path in found.items():
        if path:
            try:
                with open(path, "rb"):
                    pass
            except OSError as err:
                message = f"{_origin(args, name)} ({path}) cannot be read: {err.strerror}"
                raise CommandError(ExitCode.USAGE, message) from err
    if found["client_key"] and not found["client_cert"]:
        message = f"{_origin(args, 'client_key')} ({found['client_key']}) needs --client-cert"
        raise CommandError(ExitCode.USAGE, message)
    return found


def tls_context(args: argparse.Namespace) -> ssl.SSLContext:
    """Make the TLS context for https from the TLS options. Raises ``CommandError`` (usage)."""
    given, used = tls_files(args), "ca_cert"
    try:
        context = ssl.create_default_context(cafile=given["ca_cert"])
        if given["client_cert"]:
            used = "client_cert"
            context.load_cert_chain(given["client_cert"], given["client_key"])
    except OSError as err:
        message = f"{_origin(args, used)} ({given[used]}) cannot be used: {err.strerror or err}"
        raise CommandError(ExitCode.USAGE, message) from err
    return context


def _variable(name: str) -> str:
    return f"EXPERTMESH_{name.upper()}"


def _origin(args: argparse.Namespace, name: str) -> str:
    """Return the flag or variable that named the file."""
    return f"--{name.replace('_', '-')}" if getattr(args, name) else _variable(name)
