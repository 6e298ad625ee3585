"""What a caller sees of adapters that belong to other keys: nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config.api_keys import hash_key
from cluster.config.gateway import GatewaySection
from gateway.auth.adapter_catalog import AdapterCatalog
from gateway.auth.auth import CALLER, KeyRing, make_key_rings

ADAPTERS = [
    {"name": "sql", "key": "sql@1", "state": "READY", "tenants": ["acme"]},
    {"name": "open", "key": "open@2", "state": "READY", "tenants": []},
    {"name": "old", "key": "old@3", "state": "UNLOADING", "tenants": ["acme"]},
]
METRICS = b"""# TYPE lora_requests_running gauge
lora_requests_running{engine="0",lora_name="sql"} 1
lora_requests_running{engine="0",lora_name="open"} 2
lora_requests_running{engine="0",lora_name="old"} 1
vllm:lora_requests_info{max_lora="4",running_lora_adapters="open,sql",waiting_lora_adapters=""} 9
vllm:lora_requests_info{max_lora="4",running_lora_adapters="open",waiting_lora_adapters=""} 9
"""


def test_metrics_and_status_name_no_adapter_of_another_key() -> None:
    catalog = AdapterCatalog()
    catalog.follow({"adapters": ADAPTERS})
    lines = METRICS.splitlines(keepends=True)
    assert catalog.without_series_of_others(METRICS).splitlines(keepends=True) == [
        lines[0],
        lines[2],
        lines[5],
    ]
    status: dict[str, Any] = {"state": "SERVING", "adapters": ADAPTERS}
    assert catalog.without_others(status) == {"state": "SERVING", "adapters": [ADAPTERS[1]]}
    assert (catalog.names(), catalog.find("sql"), catalog.find("open")) == (
        ["open"],
        None,
        "open@2",
    )
    assert catalog.keys == ["sql@1", "open@2"]


def test_an_admin_key_sees_all() -> None:
    admins = KeyRing((hash_key("boss"),), are_admin=True)
    catalog = AdapterCatalog()
    catalog.follow({"adapters": ADAPTERS})
    token = CALLER.set(admins.check("Bearer boss"))
    try:
        assert catalog.without_series_of_others(METRICS) == METRICS
        assert catalog.names() == ["sql", "open"]
    finally:
        CALLER.reset(token)


def test_a_client_with_the_name_of_an_admin_key_sees_its_own(tmp_path: Path) -> None:
    files = {}
    for kind in ("client", "admin"):
        files[kind] = tmp_path / kind
        files[kind].write_text(f"keys:\n- name: ops\n  key: {kind}\n")
    section = GatewaySection(api_key_file=str(files["client"]), admin_key_file=str(files["admin"]))
    public, _ = make_key_rings(section)
    catalog = AdapterCatalog()
    catalog.follow({"adapters": ADAPTERS})
    for key, names in (("client", ["open"]), ("admin", ["sql", "open"])):
        token = CALLER.set(public.check(f"Bearer {key}"))
        try:
            assert catalog.names() == names
        finally:
            CALLER.reset(token)
