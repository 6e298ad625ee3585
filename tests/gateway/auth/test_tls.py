"""TLS and mutual TLS on all ports that are our own, and what Serve's proxy needs for them."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
import uvicorn
import uvicorn.config

from cluster.cli.main import main
from cluster.config.gateway import GatewaySection
from cluster.core.errors import ConfigError, StartError
from cluster.launch.serve_proxy import check_haproxy, wait_ready
from gateway.auth.tls import serve_options
from gateway.auth.tls_files import check_tls_files
from gateway.serve_proxy.client_certificates import demand_client_certificates
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
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{secured.admin.http}/health", timeout=WAIT_S)


def test_admin_http_speaks_tls(secured: Stack, certificates: Certificates) -> None:
    url = f"https://{secured.admin.http}/health"

    def get(with_client: bool) -> httpx.Response:
        context = certificates.context(with_client=with_client)
        return httpx.get(url, verify=context, timeout=WAIT_S)

    assert get(with_client=True).status_code == 200
    if not is_mutual(secured):
        assert get(with_client=False).status_code == 200
        return
    with pytest.raises(httpx.HTTPError):
        get(with_client=False)


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


def test_serve_gives_its_proxy_the_files(certificates: Certificates) -> None:
    assert serve_options(GatewaySection()) == {}
    assert serve_options(certificates.section(mutual=True)) == {
        "ssl_certfile": str(certificates.server_cert),
        "ssl_keyfile": str(certificates.server_key),
        "ssl_ca_certs": str(certificates.client_ca),
    }


def proxy_config(section: GatewaySection) -> uvicorn.Config:
    """As Serve's proxy makes it."""
    options = serve_options(section)

    async def app(scope: object, receive: object, send: uvicorn._types.ASGISendCallable) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": False})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        lifespan="off",
        log_config=None,
        ssl_keyfile=options["ssl_keyfile"],
        ssl_certfile=options["ssl_certfile"],
        ssl_ca_certs=options.get("ssl_ca_certs"),
    )
    config.load()
    return config


def try_proxy(config: uvicorn.Config, section: GatewaySection) -> None:
    """Start a server as Serve's proxy does, and look at it as the launcher does."""

    async def work() -> None:
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            url = f"https://127.0.0.1:{port}"
            await asyncio.to_thread(wait_ready, url, section, list)
        finally:
            server.should_exit = True
            await task

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def test_a_proxy_that_asks_for_no_certificates_is_found_out(certificates: Certificates) -> None:
    section = certificates.section(mutual=True)
    config = proxy_config(section)
    assert config.ssl is not None
    assert config.ssl.verify_mode is ssl.CERT_NONE, "Serve and uvicorn demand them: drop the hook"
    with pytest.raises(StartError, match="takes clients without certificates"):
        try_proxy(config, section)


def test_the_hook_makes_the_proxy_ask(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = uvicorn.config.create_ssl_context
    monkeypatch.setattr(uvicorn.config, "create_ssl_context", make)  # as it was, afterwards
    demand_client_certificates.cache_clear()
    for _ in range(2):
        demand_client_certificates()
    for mutual in (False, True):
        section = certificates.section(mutual=mutual)
        config = proxy_config(section)
        assert config.ssl is not None
        assert config.ssl.verify_mode is (ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE)
        try_proxy(config, section)


def test_haproxy_mode_is_refused_by_name(certificates: Certificates) -> None:
    section = certificates.section(mutual=False)
    check_haproxy(section, {})
    check_haproxy(GatewaySection(), {"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    with pytest.raises(ConfigError, match=r"HAProxy mode \(RAY_SERVE_ENABLE_HA_PROXY=1\)"):
        check_haproxy(section, {"RAY_SERVE_ENABLE_HA_PROXY": "1"})


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


def test_serve_refuses_at_once(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--dry-run", "--port", "0", "--grpc-port", "0"]
    files = ["--tls-cert", str(certificates.server_cert), "--tls-key"]
    assert main([*words, *files, str(certificates.client_key)]) == 5
    assert "--tls-cert" in capsys.readouterr().err
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert main([*words, *files, str(certificates.server_key)]) == 5
    assert "HAProxy" in capsys.readouterr().err
