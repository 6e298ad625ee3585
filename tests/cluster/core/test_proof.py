"""Proofs of the cluster token."""

from __future__ import annotations

import pytest

from cluster.core.proof import TokenProof


def ends(token: str = "t", channel: str = "data") -> tuple[TokenProof, TokenProof]:
    """A caller with token t on a data connection, and the side that it calls."""
    caller = TokenProof("t", "data", is_caller=True)
    listener = TokenProof(token, channel, is_caller=False, their_nonce=caller.nonce)
    caller.their_nonce = listener.nonce
    return caller, listener


def test_two_sides_with_one_token_accept_each_other() -> None:
    caller, listener = ends()
    assert caller.is_peer_proof(listener.make_proof())
    assert listener.is_peer_proof(caller.make_proof(b"words"), b"words")


@pytest.mark.parametrize(("token", "channel"), [("u", "data"), ("t", "engine")])
def test_another_token_or_kind_of_connection_proves_nothing(token: str, channel: str) -> None:
    caller, listener = ends(token, channel)
    assert not caller.is_peer_proof(listener.make_proof())
    assert not listener.is_peer_proof(caller.make_proof())


def test_a_proof_holds_for_its_side_connection_and_words_only() -> None:
    caller, listener = ends()
    assert not caller.is_peer_proof(caller.make_proof())
    assert not listener.is_peer_proof(ends()[0].make_proof())
    assert not listener.is_peer_proof(caller.make_proof(b"words"), b"other words")
    caller.their_nonce, listener.their_nonce = listener.nonce, listener.nonce
    assert not listener.is_peer_proof(caller.make_proof())


def test_a_nonce_cannot_take_over_words() -> None:
    caller, listener = ends()
    caller.their_nonce = f"{listener.nonce}|evil"
    assert not listener.is_peer_proof(caller.make_proof(b"words"), b"evil|words")
