"""What ``serve`` prints when it is ready."""

from __future__ import annotations

import pytest

from cluster.cli.cluster.serve import call_hints
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection

TLS = GatewaySection(tls_cert="c", tls_key="k")
MUTUAL_TLS = GatewaySection(tls_cert="c", tls_key="k", tls_client_ca="a")


@pytest.mark.parametrize(
    ("section", "curl", "grpcurl"),
    [
        (GatewaySection(), "curl -N https", "grpcurl -plaintext -d"),
        (TLS, "curl --cacert CA.pem -N https", "grpcurl -cacert CA.pem -d"),
        (
            MUTUAL_TLS,
            "curl --cacert CA.pem -N --cert CLIENT.crt --key CLIENT.key https",
            "grpcurl -cacert CA.pem -cert CLIENT.crt -key CLIENT.key -d",
        ),
    ],
)
def test_hints_bring_the_certificates_that_are_asked_for(
    section: GatewaySection, curl: str, grpcurl: str
) -> None:
    model = ModelSection(path="x", served_model_name="m")
    hints = call_hints(
        ClusterConfig(model=model, gateway=section), "https://h:8000", "h:50051", True
    )
    assert hints[0].startswith(curl)
    assert hints[1].startswith(grpcurl)


def test_hints_have_token_ids_where_there_is_no_tokenizer() -> None:
    config = ClusterConfig(model=ModelSection(path="x", served_model_name="m"))
    curl, grpcurl, _ = call_hints(config, "http://h:8000", "h:50051", False)
    assert '"prompt": [1, 2, 3]' in curl
    assert '"token_ids": {"ids": [1, 2, 3]}' in grpcurl
