"""Checks certificate and key files before the servers start."""

from __future__ import annotations

import ssl
from pathlib import Path

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ConfigError


def check_tls_files(section: GatewaySection) -> None:
    """Raise ``ConfigError`` for unusable files."""
    if section.tls_cert is None or section.tls_key is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for name in ("tls_cert", "tls_key"):
        read_file(section, name)
    try:
        context.load_cert_chain(section.tls_cert, section.tls_key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as err:
        rule = f"and tls_key are not a certificate and its key in PEM: {err}"
        raise ConfigError("tls_cert", section.tls_cert, rule) from err
    if section.tls_client_ca is not None:
        read_file(section, "tls_client_ca")
        try:
            context.load_verify_locations(section.tls_client_ca)
        except (ssl.SSLError, OSError) as err:
            raise ConfigError("tls_client_ca", section.tls_client_ca, f"is not PEM: {err}") from err


def read_file(section: GatewaySection, name: str) -> bytes:
    """Read the file whose path is the setting ``name``. Raises ``ConfigError``."""
    path = str(getattr(section, name))
    try:
        return Path(path).read_bytes()
    except OSError as err:
        raise ConfigError(name, path, f"cannot be read: {err.strerror}") from err


def _no_password() -> str:
    raise ValueError("the key is encrypted")
