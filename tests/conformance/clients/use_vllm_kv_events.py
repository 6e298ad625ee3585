"""Follows KV events with vLLM's own types, and prints the cached prefixes as JSON.

python use_vllm_kv_events.py MODULE ENDPOINT REPLAY_ENDPOINT TOPIC

MODULE is ``vllm/distributed/kv_events.py`` of a vLLM that is not installed: what it imports of vLLM
is replaced here by the little that its types need. Each payload must be what vLLM would send for
the same events: no field more, none less.
"""

import importlib.util
import json
import logging
import sys
import types

import msgspec
import zmq

LIMIT_MS = 120_000


def stand_in(name, **names):
    """A module of vLLM, and the packages that it is in."""
    for end in range(1, name.count(".") + 1):
        package = ".".join(name.split(".")[:end])
        sys.modules.setdefault(package, types.ModuleType(package)).__path__ = []
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(names)


def load(path):
    """The module of vLLM."""
    stand_in("vllm.logger", init_logger=logging.getLogger)
    stand_in("vllm.config.kv_events", KVEventsConfig=object)
    network = ("get_ip", "get_tcp_uri", "is_valid_ipv6_address", "split_zmq_path")
    stand_in("vllm.utils.network_utils", **dict.fromkeys(network))
    stand_in("vllm.v1.core.kv_cache_utils", ExternalBlockHash=bytes | int)
    spec = importlib.util.spec_from_file_location("vllm.distributed.kv_events", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path, endpoint, replay_endpoint, topic):
    vllm = load(path)
    decoder = msgspec.msgpack.Decoder(type=vllm.KVEventBatch)
    context = zmq.Context()
    events = context.socket(zmq.SUB)
    events.setsockopt_string(zmq.SUBSCRIBE, topic)
    events.connect(endpoint)
    assert events.poll(LIMIT_MS), "no event"
    found_topic, seq_bytes, payload = events.recv_multipart()
    assert found_topic == topic.encode()
    last = int.from_bytes(seq_bytes, "big")
    replay = context.socket(zmq.DEALER)
    replay.connect(replay_endpoint)
    replay.send_multipart((b"", (0).to_bytes(8, "big")))
    first, payloads = None, []
    while True:
        assert replay.poll(LIMIT_MS), "no answer"
        _, _, seq_bytes, again = replay.recv_multipart()
        if seq_bytes == vllm.ZmqEventPublisher.END_SEQ:
            assert again == b""
            break
        number = int.from_bytes(seq_bytes, "big")
        first = number if first is None else first
        if number < last:
            assert number == first + len(payloads)
            payloads.append(again)
    assert first + len(payloads) == last, "all messages before the first one"
    prefixes = {}
    for each in (*payloads, payload):
        batch = decoder.decode(each)
        theirs = msgspec.msgpack.encode(batch)
        assert msgspec.msgpack.decode(theirs) == msgspec.msgpack.decode(each), (theirs, each)
        assert isinstance(batch.data_parallel_rank, int)
        for event in batch.events:
            if isinstance(event, vllm.BlockStored):
                tokens = prefixes.get(event.parent_block_hash, [])
                assert event.medium == vllm.MEDIUM_GPU
                for place, name in enumerate(event.block_hashes):
                    first = place * event.block_size
                    tokens = tokens + event.token_ids[first : first + event.block_size]
                    prefixes[name] = tokens
            elif isinstance(event, vllm.BlockRemoved):
                for name in event.block_hashes:
                    del prefixes[name]
            else:
                assert isinstance(event, vllm.AllBlocksCleared)
                prefixes.clear()
    print(json.dumps(sorted(prefixes.values())))


if __name__ == "__main__":
    main(*sys.argv[1:])
