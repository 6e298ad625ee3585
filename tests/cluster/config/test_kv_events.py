"""Where KV events may be published."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.kv_events import KvEventsSection, is_listening, rank_endpoint
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.core.errors import ConfigError

MODEL = ModelSection(path="/m", served_model_name="m")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_events_endpoint": ""}, "must be tcp://HOST:PORT"),
        ({"kv_events_endpoint": "5557"}, "kv_events_endpoint (5557) must be tcp://HOST:PORT"),
        ({"kv_events_endpoint": "ipc:///tmp/x"}, "must be tcp://HOST:PORT"),
        ({"kv_events_endpoint": "tcp://*:0"}, "with a port from 1 to 65535"),
        ({"kv_events_endpoint": "tcp://*:65536"}, "with a port from 1 to 65535"),
        ({"kv_events_replay_endpoint": "tcp://*:5558"}, "needs kv_events_endpoint"),
        (
            {
                "kv_events_endpoint": "tcp://*:5557",
                "kv_events_replay_endpoint": "tcp://router:5558",
            },
            "kv_events_replay_endpoint (tcp://router:5558) must listen",
        ),
        ({"kv_events_topic": "x" * 257}, "must have 256 characters at most"),
        ({"kv_events_buffer_steps": 0}, "must be at least 1"),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as found:
        KvEventsSection(**fields)
    assert words in str(found.value)


@pytest.mark.parametrize(
    ("endpoints", "words"),
    [
        (("tcp://*:5557", "tcp://*:5558"), "must be 2 ports or more away from kv_events_endpoint"),
        (("tcp://*:5557", "tcp://*:5556"), "must be 2 ports or more away"),
        (("tcp://*:65535", None), "kv_events_endpoint (tcp://*:65535) must leave 2 ports"),
        (("tcp://*:5557", "tcp://*:5559"), ""),
        (("tcp://router:65535", None), ""),
        (("tcp://router:5557", "tcp://*:5557"), ""),
    ],
    ids=str,
)
def test_every_attention_worker_has_ports_of_its_own(
    endpoints: tuple[str, str | None], words: str
) -> None:
    section = KvEventsSection(
        kv_events_endpoint=endpoints[0], kv_events_replay_endpoint=endpoints[1]
    )
    workers = WorkersSection(num_attention_workers=2)
    try:
        ClusterConfig(model=MODEL, workers=workers, kv_events=section)
        found = ""
    except ConfigError as err:
        found = str(err)
    assert words in found
    assert bool(words) == bool(found)


def test_events_need_a_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="needs enable_prefix_caching"):
        ClusterConfig(
            model=MODEL,
            engine=EngineSection(enable_prefix_caching=False),
            kv_events=KvEventsSection(kv_events_endpoint="tcp://*:5557"),
        )


@pytest.mark.parametrize(
    ("endpoint", "listens", "third"),
    [
        ("tcp://*:5557", True, "tcp://*:5559"),
        ("tcp://0.0.0.0:5557", True, "tcp://0.0.0.0:5559"),
        ("tcp://127.0.0.1:5557", True, "tcp://127.0.0.1:5559"),
        ("tcp://[::1]:5557", True, "tcp://[::1]:5559"),
        ("tcp://10.0.0.4:5557", False, "tcp://10.0.0.4:5557"),
        ("tcp://router.llm:5557", False, "tcp://router.llm:5557"),
    ],
)
def test_who_listens_does_so_at_one_port_more_for_each_rank(
    endpoint: str, listens: bool, third: str
) -> None:
    KvEventsSection(kv_events_endpoint=endpoint)
    assert is_listening(endpoint) is listens
    assert rank_endpoint(endpoint, 0) == endpoint
    assert rank_endpoint(endpoint, 2) == third
