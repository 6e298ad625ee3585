"""TLS and mutual TLS on all ports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from starlette.types import Receive, Scope, Send

from cluster.cli.main import main
from cluster.config.gateway import GatewaySection
from cluster.core.errors import ConfigError, StartError
from cluster.launch.readiness import wait_ready
from gateway.auth.tls import tls_files
from gateway.auth.tls_files import check_tls_files
from gateway.listener.http_listener import HttpListener
from protos.admin_pb2 import ListOperationsRequest
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2 import ListModelsRequest
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import WAIT_S, Stack, running_stack
from tests.harness.certificates import Certificates


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=[False, True], ids=["tls", "mutual"])
def secured(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Stack]:
    with running_stack(certificates.section(mutual=request.param)) as stack:
        yield stack


def is_mutual(stack: Stack) -> bool:
    return stack.config.gateway.tls_client_ca is not None


def test_grpc_speaks_tls(secured: Stack, certificates: Certificates) -> None:
    for with_client in (True, False):
        for target in (secured.grpc_target, secured.admin.grpc):
            with certificates.channel(target, with_client=with_client) as channel:
                if not with_client and is_mutual(secured):
                    with pytest.raises(grpc.RpcError) as caught:
                        InferenceStub(channel).ListModels(ListModelsRequest(), timeout=WAIT_S)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                elif target == secured.grpc_target:
                    asked = ListModelsRequest()
                    assert InferenceStub(channel).ListModels(asked, timeout=WAIT_S).models
                else:
                    AdminStub(channel).ListOperations(ListOperationsRequest(), timeout=WAIT_S)


def test_a_client_without_tls_is_refused(secured: Stack) -> None:
    with grpc.insecure_channel(secured.grpc_target) as channel, pytest.raises(grpc.RpcError):
        InferenceStub(channel).ListModels(ListModelsRequest(), timeout=WAIT_S)
    for address in (secured.admin.http, secured.url.removeprefix("https://")):
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{address}/health", timeout=WAIT_S)


def test_http_speaks_tls(secured: Stack, certificates: Certificates) -> None:
    def get(url: str, with_client: bool) -> httpx.Response:
        context = certificates.context(with_client=with_client)
        return httpx.get(f"{url}/health", verify=context, timeout=WAIT_S)

    for url in (f"https://{secured.admin.http}", secured.url):
        assert get(url, with_client=True).status_code == 200
        if not is_mutual(secured):
            assert get(url, with_client=False).status_code == 200
            continue
        with pytest.raises(httpx.HTTPError):
            get(url, with_client=False)


def test_the_launcher_waits_without_a_certificate(
    secured: Stack, certificates: Certificates
) -> None:
    reasons = [["loading"], []]

    def ask() -> list[str]:
        assert is_mutual(secured), "the port itself is asked"
        return reasons.pop(0)

    wait_ready(secured.url, secured.config.gateway, ask)
    assert len(reasons) == (0 if is_mutual(secured) else 2)


def test_the_command_line_speaks_tls(
    secured: Stack, certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--admin-url", f"https://{secured.admin.http}", "operations", "get", "none"]
    own = ["--client-cert", str(certificates.client_cert)]
    own += ["--client-key", str(certificates.client_key)]
    trusted = [*words, "--ca-cert", str(certificates.server_ca)]
    assert main([*trusted, *own]) == 5, "no such operation"
    assert main([*words, *own]) == 3, "no known authority has signed this"
    assert main(trusted) == (3 if is_mutual(secured) else 5)
    assert main([*words, "--ca-cert", "/nowhere"]) == 2
    assert "--ca-cert (/nowhere) cannot be read" in capsys.readouterr().err


def test_http_servers_get_the_files(certificates: Certificates) -> None:
    assert tls_files(GatewaySection()) == {}
    assert tls_files(certificates.section(mutual=True)) == {
        "ssl_certfile": str(certificates.server_cert),
        "ssl_keyfile": str(certificates.server_key),
        "ssl_ca_certs": str(certificates.client_ca),
    }


def test_files_that_will_not_do_are_refused_by_name(
    certificates: Certificates, tmp_path: Path
) -> None:
    cert, key = str(certificates.server_cert), str(certificates.server_key)
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("-----BEGIN CERTIFICATE-----\nno\n")
    check_tls_files(GatewaySection())
    check_tls_files(certificates.section(mutual=True))
    for field, values in (
        ("tls_cert", {"tls_cert": str(tmp_path / "none"), "tls_key": key}),
        ("tls_key", {"tls_cert": cert, "tls_key": str(tmp_path / "none")}),
        ("tls_cert", {"tls_cert": str(rubbish), "tls_key": key}),
        ("tls_cert", {"tls_cert": cert, "tls_key": str(certificates.client_key)}),
        ("tls_client_ca", {"tls_cert": cert, "tls_key": key, "tls_client_ca": str(rubbish)}),
        ("tls_client_ca", {"tls_client_ca": cert}),
        ("tls_key", {"tls_cert": cert}),
        ("tls_key", {"tls_key": key}),
    ):
        with pytest.raises(ConfigError) as caught:
            check_tls_files(GatewaySection(**values))  # type: ignore[arg-type]
        assert caught.value.field == field, values


def test_a_port_does_not_start_with_files_that_no_longer_fit(certificates: Certificates) -> None:
    """An operator replaced the certificate, and not yet its key."""

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("nobody is served")

    files = {"tls_cert": str(certificates.server_cert), "tls_key": str(certificates.client_key)}
    section = GatewaySection(**files)  # type: ignore[arg-type]
    listener = HttpListener(nothing, section, "HTTP", "127.0.0.1", 0, max_connections=1)

    async def work() -> None:
        with pytest.raises(StartError, match=r"cannot use the TLS files: .*mismatch"):
            await listener.start()
        await listener.stop()

    asyncio.run(work())


def test_serve_refuses_at_once(
    certificates: Certificates, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--dry-run", "--port", "0", "--grpc-port", "0"]
    files = ["--tls-cert", str(certificates.server_cert), "--tls-key"]
    assert main([*words, *files, str(certificates.client_key)]) == 5
    assert "--tls-cert" in capsys.readouterr().err
    mutual = [*files, str(certificates.server_key), "--tls-client-ca", str(certificates.client_ca)]
    assert main([*words, *mutual, "--serve-proxy"]) == 2
    assert "--serve-proxy (8002) cannot be used with" in capsys.readouterr().err
