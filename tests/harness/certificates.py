"""Certificates made for a test: a server's, a client's, and those of their authorities."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import trustme

from cluster.config.gateway import GatewaySection


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """PEM files."""

    server_cert: Path
    """Certificate for localhost and 127.0.0.1."""
    server_key: Path
    """Its key."""
    server_ca: Path
    """Who signed it."""
    client_cert: Path
    """A client's certificate."""
    client_key: Path
    """Its key."""
    client_ca: Path
    """Who signed it."""

    @classmethod
    def make(cls, folder: Path) -> Certificates:
        """New ones in an empty folder."""
        authorities = {name: trustme.CA() for name in ("server", "client")}
        for name, authority in authorities.items():
            leaf = authority.issue_cert("localhost", "127.0.0.1")
            (folder / f"{name}_cert").write_bytes(b"".join(p.bytes() for p in leaf.cert_chain_pems))
            leaf.private_key_pem.write_to_path(folder / f"{name}_key")
            authority.cert_pem.write_to_path(folder / f"{name}_ca")
        names = [f"{who}_{what}" for who in authorities for what in ("cert", "key", "ca")]
        return cls(**{name: folder / name for name in names})

    def section(self, *, mutual: bool, **values: object) -> GatewaySection:
        """Settings of a gateway that serves with them."""
        files = {"tls_cert": str(self.server_cert), "tls_key": str(self.server_key)}
        if mutual:
            files["tls_client_ca"] = str(self.client_ca)
        return GatewaySection(**files, **values)  # type: ignore[arg-type]

    def context(self, *, with_client: bool) -> ssl.SSLContext:
        """What an HTTPS client connects with."""
        context = ssl.create_default_context(cafile=self.server_ca)
        if with_client:
            context.load_cert_chain(self.client_cert, self.client_key)
        return context

    def channel(self, target: str, *, with_client: bool) -> grpc.Channel:
        """A gRPC client."""
        key = self.client_key.read_bytes() if with_client else None
        cert = self.client_cert.read_bytes() if with_client else None
        credentials = grpc.ssl_channel_credentials(self.server_ca.read_bytes(), key, cert)
        return grpc.secure_channel(target, credentials)
