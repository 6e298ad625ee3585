"""The handshake as a pure exchange of bytes."""

from __future__ import annotations

import hashlib
import hmac
import random

import msgspec
import pytest
from msgspec.structs import replace

from cluster.core.errors import HandshakeError
from cluster.core.release import RELEASE
from workers.transport.handshake import (
    MAX_HELLO_BYTES,
    ConnectorHandshake,
    ListenerHandshake,
    PeerIdentity,
)

HOME = PeerIdentity(
    name="attention-0",
    role="attention",
    rank=0,
    checkpoint_id="ck",
    config_hash="cf",
    kv_cache_dtype="auto",
    generation=3,
)
EXPERT = PeerIdentity(
    name="expert-1",
    role="expert",
    rank=1,
    checkpoint_id="ck",
    config_hash="cf",
    kv_cache_dtype="auto",
    generation=3,
)


def shake(connector: ConnectorHandshake, listener: ListenerHandshake, piece: int = 10_000) -> None:
    """Carry bytes in pieces of this size until both sides are silent."""
    there, back = connector.start(), b""
    while there or back:
        chunk, there = there[:piece], there[piece:]
        back += listener.feed(chunk) if chunk else b""
        chunk, back = back[:piece], back[piece:]
        there += connector.feed(chunk) if chunk else b""


def accept(peer: PeerIdentity) -> None:
    return None


def pack(body: object) -> bytes:
    """A message as it is sent."""
    data = msgspec.msgpack.encode(body)
    return b"EMhs" + len(data).to_bytes(2, "big") + data


def nonce_of(hello: bytes) -> str:
    return str(msgspec.msgpack.decode(hello[6:])["nonce"])


def signed(token: str, side: str, nonces: tuple[str, str], words: object) -> bytes:
    """Words with their proof, as ``side`` sends them; the caller's nonce is first."""
    data = msgspec.msgpack.encode(words)
    text = msgspec.msgpack.encode(("data", side, *nonces, data))
    proof = hmac.new(token.encode(), text, hashlib.sha256).hexdigest()
    return pack({"words": data, "proof": proof})


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_both_sides_learn_the_name_of_the_other(piece: int) -> None:
    connector = ConnectorHandshake(HOME, "token")
    listener = ListenerHandshake(EXPERT, "token", accept)
    shake(connector, listener, piece)
    assert connector.done
    assert listener.done
    assert connector.peer == EXPERT
    assert listener.peer == HOME


def test_a_wrong_token_learns_nothing() -> None:
    connector = ConnectorHandshake(HOME, "wrong")
    listener = ListenerHandshake(EXPERT, "token", accept)
    challenge = listener.feed(connector.start())
    assert "expert-1" not in challenge.decode("latin1")
    with pytest.raises(HandshakeError, match="token differs"):
        listener.feed(connector.feed(challenge))
    assert listener.peer is None


def test_a_listener_without_the_token_is_noticed() -> None:
    connector = ConnectorHandshake(HOME, "token")
    listener = ListenerHandshake(EXPERT, "other", accept)
    hello = connector.start()
    answer = listener.feed(hello)
    assert connector.feed(answer)
    nonces, refusal = (nonce_of(hello), nonce_of(answer)), {"type": "_Refusal", "reason": "no"}
    with pytest.raises(HandshakeError, match="token differs"):
        connector.feed(signed("other", "listener", nonces, refusal))
    assert not connector.has_verdict
    with pytest.raises(HandshakeError, match="refused: no"):
        connector.feed(signed("token", "listener", nonces, refusal))


def test_a_proof_cannot_be_reflected() -> None:
    connector = ConnectorHandshake(HOME, "token")
    listener = ListenerHandshake(EXPERT, "token", accept)
    proof = connector.feed(listener.feed(connector.start()))
    with pytest.raises(HandshakeError, match="token differs"):
        connector.feed(proof)


@pytest.mark.parametrize(
    ("theirs", "item"),
    [
        (replace(HOME, checkpoint_id="other"), "checkpoint of attention-0 is other"),
        (replace(HOME, config_hash="other"), "configuration of attention-0 is other"),
        (
            replace(HOME, config_hash="other", kv_cache_dtype="fp8"),
            "KV cache type of attention-0 is fp8, expert-1 has auto",
        ),
        (
            replace(HOME, release="9.9.9"),
            f"release of attention-0 is 9.9.9, expert-1 has {RELEASE}",
        ),
    ],
)
def test_the_item_that_differs_is_named_to_both(theirs: PeerIdentity, item: str) -> None:
    connector = ConnectorHandshake(theirs, "token")
    listener = ListenerHandshake(EXPERT, "token", accept)
    with pytest.raises(HandshakeError, match=item):
        shake(connector, listener)
    assert listener.refusal is not None
    assert item in listener.refusal
    assert connector.has_verdict


def test_the_owner_may_refuse() -> None:
    connector = ConnectorHandshake(HOME, "token")
    listener = ListenerHandshake(EXPERT, "token", lambda peer: f"no {peer.name} today")
    with pytest.raises(HandshakeError, match="refused: no attention-0 today"):
        shake(connector, listener)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not the handshake"),
        (b"EMhs\xff\xff", "at most 4096"),
        (b"EMhs\x00\x02{]", "not a nonce"),
        (b"EMhs\x00\x01\x90", "not a nonce"),
        (b"EMhs\x00\x01\x80", "not a nonce"),
        (b"EMhs\x00\x00", "not a nonce"),
        (pack({"nonce": 1}), "not a nonce"),
        (pack({"nonce": ""}), "not a nonce"),
        (pack({"nonce": "a", "more": 1}), "not a nonce"),
    ],
)
def test_rubbish_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(HandshakeError, match=message):
        ListenerHandshake(EXPERT, "token", accept).feed(data)


def test_random_changes_never_crash() -> None:
    rng = random.Random(0)
    for _ in range(500):
        connector = ConnectorHandshake(HOME, "token")
        listener = ListenerHandshake(EXPERT, "token", accept)
        message = bytearray(connector.feed(listener.feed(connector.start())))
        for _ in range(rng.randint(1, 4)):
            message[rng.randrange(len(message))] ^= rng.randint(1, 255)
        try:
            listener.feed(bytes(message))
        except HandshakeError:
            continue
        assert not listener.done or listener.refusal is None


IDENTITY = msgspec.to_builtins(HOME)


def listen_to(words: object) -> ListenerHandshake:
    """A listener that got these words from a connector with the token."""
    connector = ConnectorHandshake(HOME, "token")
    listener = ListenerHandshake(EXPERT, "token", accept)
    hello = connector.start()
    nonces = nonce_of(hello), nonce_of(listener.feed(hello))
    listener.feed(signed("token", "caller", nonces, words))
    return listener


@pytest.mark.parametrize(
    "words",
    [
        {"type": "PeerIdentity", "name": "x"},
        [],
        "x",
        {"name": 1},
        IDENTITY | {"role": "cook"},
        IDENTITY | {"rank": "0"},
        IDENTITY | {"rank": True},
        IDENTITY | {"type": "Somebody"},
        {"type": "_Refusal", "reason": "no"},
    ],
)
def test_an_identity_with_wrong_fields_is_refused(words: object) -> None:
    with pytest.raises(HandshakeError, match=r"identity|content of a handshake"):
        listen_to(words)


def test_a_release_with_other_fields_is_named() -> None:
    listener = listen_to(IDENTITY | {"release": "9.9.9", "color": "red"})
    refusal = f"release of attention-0 is 9.9.9, expert-1 has {RELEASE}"
    assert listener.refusal == refusal


def test_own_words_that_are_too_long_are_not_sent() -> None:
    long = replace(HOME, name="x" * MAX_HELLO_BYTES)
    connector = ConnectorHandshake(long, "token")
    with pytest.raises(HandshakeError, match="at most"):
        connector.feed(ListenerHandshake(EXPERT, "token", accept).feed(connector.start()))
